"""A model in training: its weights, their optimizer, and what has to be kept so that it can go on later.

    memory.weights   parameters          exact float32 master
    float32          float32             the parameters
    bfloat16         bfloat16            parameter + 16-bit remainder, in the optimizer
    (adapters)       frozen base         the float32 adapter

With several processes a fully trained model is sharded (``whp_fast.sharding``). Under adapters each process
holds the frozen base, and the small gradients are added up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from whp_kernels.optim import AdamW

from whp_fast import adapters, quantised, sharding
from whp_fast.checkpoint import load_config, load_model, save_model
from whp_fast.config import MemoryConfig, TrainConfig
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.processes import Processes
from whp_fast.projections import stack_in_memory
from whp_fast.snapshots import Rows, Snapshot


class Trainee:
    """The model of one training.

    Attributes:
        model: the module; after ``load`` its trained parameters require grad and no others.
        optimizer: whose groups' ``lr`` is set at each step.
        trained: name -> parameter, in the order of the model.
        sharded: whether the parameters are divided among processes.
        compute_dtype: of matrix products.
    """

    def __init__(
        self,
        model: Llama,
        settings: TrainConfig,
        memory: MemoryConfig,
        *,
        compute_dtype: torch.dtype,
        processes: Processes | None = None,
        adapter: str | None = None,
    ):
        """Take a model as it is: float32 or bfloat16 parameters (whose remainders are zero), sharded or
        not."""
        self.model, self.compute_dtype, self.adapter = model, compute_dtype, adapter
        self.processes = processes or Processes()
        model.checkpointing = memory.checkpointing
        stack_in_memory(model)
        if adapter is None:
            self.trained = dict(model.named_parameters())
        else:
            self.trained = adapters.adapter_parameters(model, adapter)
        first = next(iter(model.parameters()))
        self.sharded = sharding.is_sharded(first)
        self._autocast = first.dtype == torch.float32 != compute_dtype and not self.sharded
        # weights in bfloat16 take the place of autocast's copies: beside them the residual stream is float32
        # too
        model.residual_dtype = None if self._autocast or compute_dtype == torch.float32 else torch.float32
        self._wide_gradients: dict[nn.Parameter, Tensor] = {}
        if memory.gradients == "float32":
            self._add_gradients_in_float32()
        self.optimizer = self._optimizer(settings, memory)

    @classmethod
    def load(
        cls,
        folder: Path,
        settings: TrainConfig,
        memory: MemoryConfig,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        processes: Processes | None = None,
        seed: int = 0,
    ) -> Trainee:
        """The base model of a folder, ready to be trained.

        No process holds more of the weights than what it keeps, and one tensor.

        Raises:
            UserError: see ``load_model``; processes that do not divide; a package that is not installed.
        """
        processes = processes or Processes()
        if memory.lora_rank:
            return cls._load_with_adapter(
                folder,
                settings,
                memory,
                compute_dtype=compute_dtype,
                device=device,
                processes=processes,
                seed=seed,
            )
        dtype = _weights_dtype(memory, compute_dtype)
        config = load_config(folder)
        with torch.device("meta"):
            model = Llama(config).to(dtype)
        if processes.several:
            sharding.shard(model, sharding.process_mesh(processes, device, memory.replicas), compute_dtype)
        model.to_empty(device=device)
        trainee = cls(model, settings, memory, compute_dtype=compute_dtype, processes=processes)
        for name, rows in sharding.read_rows(folder, config, trainee.trained, torch.float32):
            trainee._set_master(trainee.trained[name], rows)
        return trainee

    @classmethod
    def from_model(
        cls,
        model: Llama,
        settings: TrainConfig,
        memory: MemoryConfig | None = None,
        *,
        compute_dtype: torch.dtype,
    ) -> Trainee:
        """A float32 model in this process; its parameters are cast where ``memory.weights`` says so.

        Nothing of them is lost: ``masters`` gives float32 back."""
        memory = memory or MemoryConfig()
        dtype = _weights_dtype(memory, compute_dtype)
        if dtype == torch.float32:
            return cls(model, settings, memory, compute_dtype=compute_dtype)
        exact = {name: parameter.detach() for name, parameter in model.named_parameters()}
        trainee = cls(model.to(dtype), settings, memory, compute_dtype=compute_dtype)
        for name, values in exact.items():
            trainee._set_master(trainee.trained[name], values)
        return trainee

    @torch.no_grad()
    def to_float32(self) -> Llama:
        """The model with its exact float32 weights; the training is over."""
        exact = {name: make() for name, make in self.masters().items()}
        self.model.to(torch.float32)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(exact[name])
        self.model.residual_dtype = None
        return self.model

    @classmethod
    def _load_with_adapter(
        cls, folder, settings, memory, *, compute_dtype, device, processes, seed
    ) -> Trainee:
        model = load_frozen(folder, memory, compute_dtype, device)
        adapters.add_adapter(
            model,
            settings.name,
            rank=memory.lora_rank,
            alpha=memory.lora_alpha,
            targets=memory.lora_targets,
            generator=torch.Generator().manual_seed(seed),
        )
        adapters.use_adapter(model, settings.name)
        return cls(
            model,
            settings,
            memory,
            compute_dtype=compute_dtype,
            processes=processes,
            adapter=settings.name,
        )

    # A step -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Where hidden states are computed."""
        device = sharding.local(next(self.model.parameters())).device.type
        with torch.autocast(device, dtype=self.compute_dtype, enabled=self._autocast):
            yield

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, float64 scalar; first adds up the gradients of all processes."""
        gradients = [sharding.local(p.grad) for p in self._with_gradients()]
        if self.processes.several and not self.sharded:
            self._add_up(gradients)
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else []
        total = sum((norm.double().square() for norm in norms), torch.zeros((), dtype=torch.float64))
        if self.sharded:
            mesh = next(iter(self.trained.values())).device_mesh
            torch.distributed.all_reduce(total, group=mesh.get_group(mesh.ndim - 1))
        return total.sqrt()

    def update(self, scale: float) -> None:
        """One step of the optimizer with the gradients times ``scale``; the gradients are gone afterwards."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.step(None if scale == 1.0 else torch.tensor(scale, dtype=torch.float32))
        else:
            if scale != 1.0:
                torch._foreach_mul_([sharding.local(p.grad) for p in self._with_gradients()], scale)
            self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Evaluation and saving need not live beside gradients."""
        for parameter in self.trained.values():
            parameter.grad = None
        self._wide_gradients.clear()

    # What is kept -------------------------------------------------------------------------------------

    def masters(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> a call that makes the whole float32 tensor. With shards each call is a collective."""

        def maker(parameter: nn.Parameter) -> Callable[[], Tensor]:
            return lambda: sharding.whole(parameter, self._master(parameter)).float()

        if self.adapter is not None:
            return adapters.merged(self.model, self.adapter)
        return {name: maker(parameter) for name, parameter in self.trained.items()}

    def save(self, folder: Path, base_name: str) -> None:
        """Write ``folder/model`` in float32 (of the base with its adapter merged into it), and the adapter
        beside it. Called by every process; the first one writes."""
        if self.adapter is not None and self.processes.first:
            adapters.save_adapter(self.model, self.adapter, folder / "adapter", base_name)
        if self.processes.first:
            save_model(self.masters(), folder / "model", config=self.model.config, dtype=torch.float32)
        elif self.sharded:  # takes part in gathering
            for make in self.masters().values():
                make()

    def rows(self) -> dict[str, Rows]:
        """Everything that a training goes on from, as the rows that are this process's to save."""
        self.optimizer.state_dict()  # waits for moments that are on their way to host memory
        kept = {}
        for name, parameter in self.trained.items():
            if not sharding.holds_first_copy(parameter, self.processes):
                continue
            first, length = sharding.first_row(parameter), parameter.shape[0]
            for key, tensor in self._state_of(parameter).items():
                kept[f"{key}/{name}"] = Rows(tensor, first, (length, *tensor.shape[1:]))
            for key, tensor in self._unaligned_state_of(parameter).items():
                kept[self._of_this_process(key, name)] = Rows(tensor, 0, tuple(tensor.shape))
        return kept

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Take everything back from a snapshot, which may have been written by any number of processes."""
        for name, parameter in self.trained.items():
            first = sharding.first_row(parameter)
            for key, tensor in self._state_of(parameter).items():
                stored = f"{key}/{name}"
                if stored not in snapshot.names() or tuple(snapshot.shape(stored)[1:]) != tensor.shape[1:]:
                    raise UserError(
                        f"{snapshot.folder}: there is no {stored} of this shape; the snapshot is of another "
                        "training, remove it to start this one anew."
                    )
                tensor.copy_(snapshot.rows(stored, first, first + len(tensor)))
        if not isinstance(self.optimizer, AdamW):
            self._restore_unaligned(snapshot)

    def set_step(self, step: int) -> None:
        """The number of updates made, which the optimizer's bias correction counts."""
        whp = isinstance(self.optimizer, AdamW)
        for parameter in self.trained.values():
            state = self.optimizer.state[parameter] if whp else self.optimizer.state_of(parameter)
            if whp or state:
                state["step"] = step

    # Small things -------------------------------------------------------------------------------------

    def _with_gradients(self) -> list[nn.Parameter]:
        for parameter, gradient in self._wide_gradients.items():
            parameter.grad = gradient
        return [p for p in self.trained.values() if p.grad is not None]

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What a training changes: local tensors whose rows lie as the parameter's do."""
        if not isinstance(self.optimizer, AdamW):
            return {"weight": sharding.local(parameter)}
        state = self.optimizer.state[parameter]
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        return {"weight": sharding.local(parameter), **tensors}

    def _unaligned_state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """bitsandbytes' moments: its blocks run over the rows of a process, so another number of processes
        could not take them."""
        if isinstance(self.optimizer, AdamW):
            return {}
        state = self.optimizer.state_of(parameter)
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def _of_this_process(self, key: str, name: str) -> str:
        where = f"{self.processes.rank}-of-{self.processes.world_size}" if self.sharded else "0-of-1"
        return f"{key}@{where}/{name}"

    def _restore_unaligned(self, snapshot: Snapshot) -> None:
        names = set(snapshot.names())
        for name, parameter in self.trained.items():
            ending = self._of_this_process("", name)
            found = [stored for stored in names if stored.endswith(ending)]
            if not found and any("@" in stored and stored.endswith(f"/{name}") for stored in names):
                raise UserError(
                    f"{snapshot.folder}: the moments of bitsandbytes were saved by another number of "
                    "processes; start as many, or set memory.optimizer whp with memory.moments int8."
                )
            state = self.optimizer.state_of(parameter)
            for stored in found:
                values = snapshot.rows(stored, 0, snapshot.shape(stored)[0])
                state[stored.partition("@")[0]] = values.to(sharding.local(parameter).device)

    def _add_gradients_in_float32(self) -> None:
        for parameter in self.trained.values():
            if parameter.dtype == torch.float32:
                continue
            if not self.sharded:
                parameter.grad_dtype = torch.float32
            else:
                parameter.grad_dtype = None  # any: bfloat16 from the reduction, float32 when they are summed
                parameter.register_post_accumulate_grad_hook(self._widen)

    def _widen(self, parameter: nn.Parameter) -> None:
        """FSDP2 adds the gradients of micro-batches in the parameter's dtype, so they are taken one by
        one."""
        if parameter in self._wide_gradients:
            self._wide_gradients[parameter] += parameter.grad.float()
        else:
            self._wide_gradients[parameter] = parameter.grad.float()
        parameter.grad = None

    def _add_up(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients])
        self.processes.add(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(summed.view_as(gradient))

    def _optimizer(self, settings: TrainConfig, memory: MemoryConfig):
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        # norms and biases: decay would only shift them
        vectors = [p for p in self.trained.values() if p.ndim <= 1]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
            if params
        ]
        betas = tuple(settings.betas)
        if memory.optimizer == "bitsandbytes":
            return quantised.bitsandbytes_adamw8bit(groups, lr=settings.lr, betas=betas, eps=1e-8)
        return AdamW(
            groups,
            lr=settings.lr,
            betas=betas,
            eps=1e-8,
            moments=memory.moments,
            offload=memory.offload_moments,
        )

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if isinstance(self.optimizer, AdamW):
            return self.optimizer.master(parameter)
        return sharding.local(parameter)

    @torch.no_grad()
    def _set_master(self, parameter: nn.Parameter, values: Tensor) -> None:
        if isinstance(self.optimizer, AdamW):
            self.optimizer.set_master(parameter, values)
        else:
            sharding.local(parameter).copy_(values)


def load_frozen(
    folder: Path, memory: MemoryConfig, compute_dtype: torch.dtype, device: torch.device
) -> Llama:
    """A base that is not trained, kept as ``memory.frozen`` says."""
    kind = memory.frozen
    dtype = compute_dtype if kind in ("auto", "nf4", "int8") else getattr(torch, kind)
    quantise = kind if kind in ("nf4", "int8") else None
    return load_model(folder, dtype=dtype, device=device, quantise=quantise).requires_grad_(False)


def _weights_dtype(memory: MemoryConfig, compute_dtype: torch.dtype) -> torch.dtype:
    return getattr(torch, memory.weights_dtype(str(compute_dtype).removeprefix("torch.")))


def clip_scale(norm: float, longest: float) -> float:
    """What a gradient of this norm is multiplied by so that it is no longer than ``longest`` (0: as it
    is)."""
    if not longest or norm <= longest or not math.isfinite(norm):
        return 1.0
    return longest / (norm + 1e-6)
