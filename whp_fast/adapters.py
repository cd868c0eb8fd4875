"""Low-rank adapters (LoRA, arXiv 2106.09685) over one frozen base: several by name, of which one or none is
active.

An adapter adds (alpha / rank) B A to the weight of a projection, A [rank, in], B [out, rank]. Base,
reinforced and
unlearned model are then one set of weights and two small adapters: ``use_adapter`` says which of the three
the model is. The base may be ordinary linear layers or quantised ones (``whp_fast.quantised``).

The names of the base's parameters do not change; those of an adapter are ``...q_proj.adapters.NAME.a`` and
``.b``. On disk an adapter has the format of PEFT
(https://huggingface.co/docs/peft/developer_guides/checkpoint), so that ``PeftModel.from_pretrained`` reads
it.

With recomputed activations the backward pass runs the blocks again with the adapter that is active *then*:
leave an adapter active until its backward pass is over.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from whp_fast.checkpoint import damaged_file, read_json, whole_file, write_json
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.quantised import PROJECTIONS, QuantisedLinear, dequantised

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


class Adapter(nn.Module):
    """a [rank, in] and b [out, rank], and the scale alpha / rank of their product."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """scale * B A, float32 [out, in]; of sharded parameters a collective call."""
        return _whole(self.b).float() @ _whole(self.a).float() * self.scale

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + scale * B (A x) in the dtype of y: x [..., in], y [..., out] -> [..., out].

        The sum is taken inside the product, so it is rounded once.
        """
        inner = F.linear(x.to(y.dtype), self.a.to(y.dtype)) * self.scale
        total = torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), self.b.to(y.dtype).t())
        return total.view(y.shape)


def add_adapter(
    model: Llama,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Adds an adapter that changes nothing yet (B = 0) and makes it the one that is trained: its parameters,
    and no others of the model, require grad. ``use_adapter`` activates it.

    Args:
        model: its base; of a model that is to be sharded, before it is sharded. On the meta device A stays
            empty: call ``init_adapter`` when the parameters have memory.
        name: an identifier.
        rank: of the product, 1 or more; alpha: its scale is alpha / rank.
        targets: of "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj".
        generator: of the draw of A, see ``init_adapter``.
        dtype: of A and B; they are cast to the dtype of the products at each use.

    Raises:
        UserError: a rank, alpha or target that cannot be.
        ValueError: a name that is taken or no identifier.
    """
    _insert(model, name, rank, alpha, tuple(dict.fromkeys(targets)), dtype)
    init_adapter(model, name, generator)


@torch.no_grad()
def init_adapter(model: Llama, name: str, generator: torch.Generator | None = None) -> None:
    """A uniform in +-1 / sqrt(in) (PEFT's default, kaiming-uniform with a = sqrt(5)), B zero.

    The numbers are drawn in float32 on the generator's device in the order of the model, whole: the same
    generator state gives the same adapter whatever the device, the dtype and the sharding. On the meta device
    nothing is drawn.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    for _, adapter in _of_name(model, name):
        if adapter.a.is_meta:
            continue
        bound = 1 / math.sqrt(adapter.a.shape[1])
        drawn = torch.empty(tuple(adapter.a.shape), dtype=torch.float32, device=device)
        _fill(adapter.a, drawn.uniform_(-bound, bound, generator=generator))
        adapter.b.zero_()


class use_adapter:  # noqa: N801 (called like a function)
    """``use_adapter(model, name)``: from now on the model is its base with this adapter, or with none
    (``None``).

    As a context manager it brings back what was active before.

    Raises:
        ValueError: no adapter of this name.
    """

    def __init__(self, model: Llama, name: str | None) -> None:
        if name is not None and name not in adapter_names(model):
            raise ValueError(f"the model has no adapter {name!r}")
        self._model = model
        self._before = active_adapter(model)
        _activate(model, name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        _activate(self._model, self._before)


def active_adapter(model: Llama) -> str | None:
    """The name of the adapter in use."""
    names = {module.active_adapter for module in _adapted(model)} - {None}
    return next(iter(names), None)


def adapter_names(model: Llama) -> list[str]:
    """In the order in which they were added."""
    return list(dict.fromkeys(name for module in _adapted(model) for name in module.adapters))


def adapter_parameters(model: Llama, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter under their names in the model."""
    part = f".adapters.{name}."
    found = {path: parameter for path, parameter in model.named_parameters() if part in path}
    if not found:
        raise ValueError(f"the model has no adapter {name!r}")
    return found


def remove_adapter(model: Llama, name: str) -> None:
    """Takes the adapter away; if it was active, none is. The base stays frozen."""
    if name not in adapter_names(model):
        raise ValueError(f"the model has no adapter {name!r}")
    for module in list(_adapted(model)):
        if name in module.adapters:
            del module.adapters[name]
        if module.active_adapter == name:
            module.active_adapter = None
        if not module.adapters:
            module.adapter_hook.remove()
            del module.adapters, module.active_adapter, module.adapter_hook


def merged(model: Llama, name: str | None) -> dict[str, Callable[[], torch.Tensor]]:
    """The ordinary model of an adapter, tensor by tensor: names of ``Llama`` -> a call that makes the tensor.

    Weights that the adapter changes are W + scale * B A, added in float32, of quantised layers upon the
    dequantised weight; all others are the base's own, in their dtype. ``save_model(merged(model, name),
    folder, config=..., dtype=...)`` writes them with one tensor at a time in memory beside the shard that is
    written.

    Args:
        name: of the adapter; None: the base alone.

    With sharded parameters each call is collective: every process makes the same calls in the same order.
    """
    changed = {} if name is None else dict(_of_name(model, name))
    owners = dict(model.named_modules())
    with torch.device("meta"):
        names = [path for path, _ in Llama(model.config).named_parameters()]
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    for path in names:
        owner, _, leaf = path.rpartition(".")
        adapter = changed.get(owner) if leaf == "weight" else None
        tensors[path] = _maker(owners[owner], leaf, adapter)
    return tensors


def save_adapter(model: Llama, name: str, folder: str | os.PathLike, base_model_name: str) -> None:
    """Writes the adapter as PEFT does: adapter_model.safetensors, then adapter_config.json.

    Args:
        folder: made if need be.
        base_model_name: the folder or hub name of the base, for whoever loads the adapter.
    """
    folder = Path(folder)
    adapters = dict(_of_name(model, name))
    first = next(iter(adapters.values()))
    tensors = {}
    for path, adapter in adapters.items():
        for leaf, parameter in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            tensors[_peft_name(path, leaf)] = _whole(parameter.detach()).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / _WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapters}),
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    write_json(folder / _CONFIG, config)


def load_adapter(model: Llama, name: str, folder: str | os.PathLike) -> None:
    """Adds an adapter from a folder in PEFT's format; its values become float32 and, as in ``add_adapter``,
    are the only parameters that require grad.

    Raises:
        UserError: a file is missing or damaged, a kind of adapter that is not plain LoRA on the projections,
            or tensors that do not fit the model. The model is then as it was.
    """
    folder = Path(folder)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: there is no {file}; give the folder of a saved LoRA adapter.")
    config = read_json(folder / _CONFIG)
    rank, alpha, targets = _plain_lora(config, folder / _CONFIG)

    wanted: dict[str, tuple[str, str, tuple[int, int]]] = {}
    for path, module in _projections(model):
        if path.rpartition(".")[2] in targets:
            wanted[_peft_name(path, "lora_A")] = (path, "a", (rank, module.in_features))
            wanted[_peft_name(path, "lora_B")] = (path, "b", (module.out_features, rank))
    weights = folder / _WEIGHTS
    hint = "use an adapter that was trained on this base model."
    read: dict[tuple[str, str], torch.Tensor] = {}
    with damaged_file(weights), safe_open(weights, framework="pt", device="cpu") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if key not in wanted:
                raise UserError(f"{weights}: the tensor {key} has no place in this model; {hint}")
            path, leaf, shape = wanted[key]
            tensor = file.get_tensor(key)
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"{weights}: the tensor {key} has shape {list(tensor.shape)}, and the model and "
                    f"{_CONFIG} ask for {list(shape)}; {hint}"
                )
            read[path, leaf] = tensor.to(torch.float32, copy=True)
    missing = [key for key, (path, leaf, _) in wanted.items() if (path, leaf) not in read]
    if missing:
        raise UserError(f"{weights}: the tensor {missing[0]} is missing; {hint}")

    _insert(model, name, rank, alpha, targets, torch.float32)
    with torch.no_grad():
        for path, adapter in _of_name(model, name):
            adapter.a.copy_(read[path, "a"])
            adapter.b.copy_(read[path, "b"])


def _plain_lora(config: dict[str, Any], path: Path) -> tuple[int, float, tuple[str, ...]]:
    """rank, alpha and targets, or a refusal of all that would change what the numbers mean."""
    plain = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_rslora": (False, None),
        "use_dora": (False, None),
        "use_qalora": (False, None),
        "lora_bias": (False, None),
        "alora_invocation_tokens": (None,),
        "layer_replication": (None,),
        "fan_in_fan_out": (False, None),
        "modules_to_save": (None, []),
        "rank_pattern": (None, {}),
        "alpha_pattern": (None, {}),
        "layers_to_transform": (None, []),
    }
    for key, allowed in plain.items():
        if config.get(key) not in allowed:
            raise UserError(
                f"{path}: {key} is {config.get(key)!r}, and only plain LoRA is read here; merge the "
                "adapter with PEFT (merge_and_unload) and use the merged model."
            )
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise UserError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}; both must be numbers above 0.")
    if not isinstance(targets, list) or not targets or not set(targets) <= set(PROJECTIONS):
        raise UserError(
            f"{path}: target_modules is {targets!r}; it must be a list of {', '.join(PROJECTIONS)}."
        )
    return rank, float(alpha), tuple(targets)


def _insert(
    model: Llama, name: str, rank: int, alpha: float, targets: tuple[str, ...], dtype: torch.dtype
) -> None:
    """An adapter whose A is still empty."""
    if rank < 1:
        raise UserError(f"memory.lora_rank: an adapter of rank {rank} does not exist; give 1 or more.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UserError(f"memory.lora_alpha: it is {alpha}; give a number above 0, for example the rank.")
    unknown = [target for target in targets if target not in PROJECTIONS]
    if unknown or not targets:
        found = f'"{unknown[0]}" is no projection' if unknown else "the list is empty"
        raise UserError(f"memory.lora_targets: {found}; choose from {', '.join(PROJECTIONS)}.")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"the name of an adapter must be an identifier of its own, got {name!r}")
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter {name!r} already")

    model.requires_grad_(False)
    for path, module in _projections(model):
        if path.rpartition(".")[2] not in targets:
            continue
        if "adapters" not in module._modules:
            module.adapters = nn.ModuleDict()
            module.active_adapter = None
            # A hook leaves the base's modules and the names of its parameters as they are.
            module.adapter_hook = module.register_forward_hook(_add_active)
        device = module.data.device if isinstance(module, QuantisedLinear) else module.weight.device
        module.adapters[name] = Adapter(
            module.in_features, module.out_features, rank, alpha, device=device, dtype=dtype
        )


def _add_active(module: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    name = module.active_adapter
    return y if name not in module.adapters else module.adapters[name].add_to(y, args[0])


def _maker(owner: nn.Module, leaf: str, adapter: Adapter | None) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def make() -> torch.Tensor:
        if leaf == "weight" and isinstance(owner, QuantisedLinear):
            base = dequantised(owner)
        else:
            base = _whole(getattr(owner, leaf).detach())
        return base if adapter is None else base.float() + adapter.delta()

    return make


def _projections(model: Llama) -> list[tuple[str, nn.Linear | QuantisedLinear]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in PROJECTIONS and isinstance(module, (nn.Linear, QuantisedLinear))
    ]


def _adapted(model: Llama) -> list[nn.Module]:
    return [module for _, module in _projections(model) if "adapters" in module._modules]


def _of_name(model: Llama, name: str) -> list[tuple[str, Adapter]]:
    """(path of the projection, adapter) in the order of the model."""
    found = [
        (path, module.adapters[name])
        for path, module in _projections(model)
        if "adapters" in module._modules and name in module.adapters
    ]
    if not found:
        raise ValueError(f"the model has no adapter {name!r}")
    return found


def _activate(model: Llama, name: str | None) -> None:
    for module in _adapted(model):
        module.active_adapter = name


def _peft_name(path: str, leaf: str) -> str:
    return f"base_model.model.{path}.{leaf}.weight"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _fill(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Copies whole values into a parameter, or into the local shard of a sharded one, without
    communication."""
    if not hasattr(parameter, "to_local"):
        parameter.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    values = values.to(parameter.to_local().device)
    shard = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.to_local().copy_(shard.to_local())
