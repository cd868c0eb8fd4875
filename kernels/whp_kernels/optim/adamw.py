"""AdamW with decoupled weight decay on an exact float32 master.

At learning rates of 1e-6 nearly every step is smaller than half a unit in the last place of a bfloat16
weight, and would be rounded away. A bfloat16 parameter therefore has an int16 remainder in the state, and
both together are the float32 weight that is trained (``split.py``). With float32 moments the result is, bit
for bit, that of ``torch.optim.AdamW(fused=True)`` on float32 parameters with the same gradients; see
``update.py``.

Bytes in memory for each element, the gradient left out:

    parameter   moments    parameter + remainder   moments   together
    float32     float32    4                       8         12
    bfloat16    float32    2 + 2                   8         12
    bfloat16    bfloat16   2 + 2                   4         8
    bfloat16    int8       2 + 2                   2.03      6.03
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whp_kernels.optim import moments as formats
from whp_kernels.optim import offload as offloading
from whp_kernels.optim.backends import update_function
from whp_kernels.optim.sharding import first_row, is_sharded, local
from whp_kernels.optim.split import join, split
from whp_kernels.optim.update import Numbers, Tensors

_OWN = ("moments", "offload", "impl")


class AdamW(torch.optim.Optimizer):
    """
    The state exists from the start. ``state[param]`` holds ``step`` (int) and tensors of the local shard,
    each with its dimension 0: ``remainder`` (int16, of bfloat16 parameters), ``exp_avg``, ``exp_avg_sq`` (of
    the shard's shape) and, with 8-bit moments (codes int8 and uint8, see ``moments.py``), ``exp_avg_scale``
    and ``exp_avg_sq_scale`` (float32, one for 1024 columns of the last dimension).

    The numbers do not depend on how parameters are sharded along dimension 0.

    Args:
        params: parameters or groups, float32 or bfloat16, contiguous; also DTensors, replicated or sharded
            along dimension 0. A group may have its own ``lr``, ``betas``, ``eps`` and ``weight_decay``, and
            they may be changed between steps.
        moments: how the two moments are kept. Parameters with one dimension or fewer than 4096 elements (of
            the whole parameter) keep float32 moments.
        offload: state in host memory (pinned beside a GPU); it goes through the device a piece at a time.
        impl: ``auto``: compiled C++ on the CPU, Triton on GPUs, else eager torch. All give the same bits.

    Raises:
        ValueError: a number, dtype, layout or placement that it does not take.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: str = "float32",
        offload: bool = False,
        impl: str = "auto",
    ):
        if moments not in formats.FORMATS:
            raise ValueError(f"moments is {moments!r}, give one of {', '.join(formats.FORMATS)}")
        self.moments, self.offload, self.impl = moments, offload, impl
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A further group; its state is made now."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_numbers(group)
            for device in {param.device for param in group["params"]}:
                update_function(self.impl, device)
            states = [self._new_state(param) for param in group["params"]]
        except ValueError:
            self.param_groups.pop()
            raise
        self.state.update(zip(group["params"], states))

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """One step of every parameter that has a gradient.

        Args:
            grad_scale: one number that gradients are multiplied by in float32 (for clipping; it stays on the
                device). Without it, or with exactly 1, no bit of the gradients changes.

        Raises:
            ValueError: a gradient that is not float32 or bfloat16, or not laid out like its parameter.
        """
        found = [
            (number, group, param, _tensors(param, self.state[param]))
            for number, (group, param) in enumerate(self._all_params())
            if param.grad is not None
        ]  # whatever is refused is refused before anything has changed
        scales = {t.weights.device: _grad_scale(grad_scale, t.weights.device) for *_, t in found}
        work: dict[torch.device, list[tuple[Tensors, Numbers]]] = {}
        for number, group, param, tensors in found:
            self.state[param]["step"] += 1
            if tensors.weights.numel():
                device = tensors.weights.device
                numbers = Numbers.of(group, self.state[param]["step"], number)
                work.setdefault(device, []).append((replace(tensors, grad_scale=scales[device]), numbers))
            torch.autograd.graph.increment_version(param)  # the kernels do not tell autograd
        for device, all_work in work.items():
            update = update_function(self.impl, device)
            if self.offload:
                offloading.step(all_work, update)
                continue
            for tensors, numbers in all_work:
                update(tensors, numbers)

    @torch.no_grad()
    def master(self, param: Tensor) -> Tensor:
        """The float32 weights of this process's shard, a copy on the parameter's device."""
        self._synchronize()
        weights, state = local(param), self.state[param]
        if "remainder" not in state:
            return weights.clone()
        return join(weights, state["remainder"].to(weights.device))

    @torch.no_grad()
    def set_master(self, param: Tensor, value: Tensor) -> None:
        """Set the weights of this process's shard: ``value`` is float32 and of the shard's shape.

        Raises:
            ValueError: another dtype or shape.
        """
        self._synchronize()
        weights, state = local(param), self.state[param]
        if value.dtype != torch.float32 or value.shape != weights.shape:
            raise ValueError(
                f"set_master: got {tuple(value.shape)} of {value.dtype}, expected {tuple(weights.shape)} of "
                "torch.float32"
            )
        if "remainder" in state:
            value, low = split(value)
            state["remainder"].copy_(low)
        weights.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's; the tensors are this process's own, not copies."""
        self._synchronize()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy what :meth:`state_dict` gave for the same parameters and the same ``moments`` into this state.

        Nothing is converted: the numbers of the next steps are those of the saved optimizer. The weights of
        bfloat16 parameters must be loaded too; the remainder belongs to them.

        Raises:
            ValueError: other groups, tensors, shapes or dtypes; then nothing has been changed.
        """
        self._synchronize()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for _, param in self._all_params()]
        if len(saved) != len(params):
            raise ValueError(f"the saved optimizer has {len(saved)} parameters, this one {len(params)}")
        for index, param in zip(saved, params):
            _check_state(index, state_dict["state"].get(index, {}), self.state[param])
        own = dict(self.state)
        super().load_state_dict({**state_dict, "state": {}})  # it would round the state to the weights' dtype
        self.state.update(own)
        for index, param in zip(saved, params):
            for name, value in state_dict["state"][index].items():
                if name == "step":
                    self.state[param][name] = int(value)
                else:
                    self.state[param][name].copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _OWN}

    def _all_params(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, param) for group in self.param_groups for param in group["params"]]

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        weights = local(param)
        if weights.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"AdamW takes float32 and bfloat16 parameters, got {weights.dtype}")
        if not weights.is_contiguous():
            raise ValueError(f"AdamW takes contiguous parameters, got strides {weights.stride()}")
        first_row(param)
        kept = formats.format_of(self.moments, param.shape)
        shape, float32 = weights.shape, torch.float32
        if kept == "int8":
            scales = formats.scale_shape(shape)
            wanted = {
                "exp_avg": (shape, torch.int8),
                "exp_avg_sq": (shape, torch.uint8),
                "exp_avg_scale": (scales, float32),
                "exp_avg_sq_scale": (scales, float32),
            }
        else:
            wanted = dict.fromkeys(("exp_avg", "exp_avg_sq"), (shape, getattr(torch, kept)))
        if weights.dtype == torch.bfloat16:
            wanted["remainder"] = (shape, torch.int16)
        state: dict[str, Any] = {"step": 0}
        for name, (its_shape, dtype) in wanted.items():
            if self.offload:
                state[name] = offloading.host_zeros(its_shape, dtype, weights.device)
            else:
                state[name] = torch.zeros(its_shape, dtype=dtype, device=weights.device)
        return state

    def _synchronize(self) -> None:
        """Wait until the state in host memory is what the last step left."""
        if self.offload:
            for device in {param.device for _, param in self._all_params() if param.is_cuda}:
                torch.cuda.synchronize(device)


def _tensors(param: Tensor, state: dict[str, Any]) -> Tensors:
    """What a step works on: rows where blocks must not cross them, else single elements."""
    weights, gradient = local(param), local(param.grad)
    if is_sharded(param) and param.grad.placements != param.placements:
        raise ValueError(
            f"a gradient has the placements {param.grad.placements}, its parameter {param.placements}"
        )
    if gradient.dtype not in (torch.float32, torch.bfloat16) or gradient.layout != torch.strided:
        raise ValueError(
            f"AdamW takes dense gradients in float32 or bfloat16, got {gradient.dtype}, {gradient.layout}"
        )
    blocks = "exp_avg_scale" in state
    columns = weights.shape[-1] if blocks else 1

    def rows(tensor: Tensor, width: int) -> Tensor:
        return tensor.view(tensor.numel() // max(width, 1), width)

    named = {
        name: rows(tensor, tensor.shape[-1] if blocks else 1)
        for name, tensor in state.items()
        if name != "step"
    }
    before = first_row(param) * (param.numel() // param.shape[0]) if param.ndim and param.shape[0] else 0
    return Tensors(rows(weights, columns), rows(gradient.contiguous(), columns), **named, first=before)


def _grad_scale(scale: Tensor | None, device: torch.device) -> Tensor | None:
    if scale is None:
        return None
    if is_sharded(scale) or scale.numel() != 1:
        raise ValueError(
            f"grad_scale must be a plain tensor of one number, got {type(scale).__name__} of shape "
            f"{tuple(scale.shape)}"
        )
    return scale.detach().to(device=device, dtype=torch.float32).reshape(1)


def _check_numbers(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas are {group['betas']}, they must be at least 0 and below 1")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} is {group[name]}, it must not be negative")


def _check_state(index: Any, saved: dict[str, Any], own: dict[str, Any]) -> None:
    def described(state):
        return {
            name: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)
            for name, value in state.items()
            if name != "step"
        }

    if "step" not in saved or described(saved) != described(own):
        raise ValueError(
            f"the saved state of parameter {index} is {described(saved)}, expected {described(own)}; it was "
            "saved with other parameters, moments or sharding"
        )
