"""SwiGLU on GPUs: layouts and launches; the contract is in :mod:`whp_kernels.layers.reference`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from whp_kernels.layers.columns import empty_columns
from whp_kernels.layers.triton.swiglu_backward import swiglu_backward_kernel
from whp_kernels.layers.triton.swiglu_forward import swiglu_forward_kernel
from whp_kernels.losses.triton.launch import Launch

BLOCK, WARPS = 1024, 4  # 8 columns a lane: one load of 16 bytes of each 16-bit tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`whp_kernels.layers.reference.swiglu`."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    swiglu_forward_launch(gate, up, out).run(gate.device)
    return out


def swiglu_backward(g: Tensor, gate: Tensor, up: Tensor, in_one: bool = False) -> tuple[Tensor, Tensor]:
    """See :func:`whp_kernels.layers.reference.swiglu_backward`."""
    g_gate, g_up = empty_columns([gate, up]) if in_one else (_empty_like(gate), _empty_like(up))
    swiglu_backward_launch(g, gate, up, g_gate, g_up).run(gate.device)
    return g_gate, g_up


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def swiglu_forward_launch(gate: Tensor, up: Tensor, out: Tensor) -> Launch:
    """What :func:`swiglu` runs."""
    return _launch(swiglu_forward_kernel, {"gate": gate, "up": up, "out": out})


def swiglu_backward_launch(g: Tensor, gate: Tensor, up: Tensor, g_gate: Tensor, g_up: Tensor) -> Launch:
    """What :func:`swiglu_backward` runs."""
    tensors = {"g": g, "gate": gate, "up": up, "g_gate": g_gate, "g_up": g_up}
    return _launch(swiglu_backward_kernel, tensors)


def _launch(kernel, tensors: dict[str, Tensor]) -> Launch:
    rows, width, strides = 1, next(iter(tensors.values())).numel(), dict.fromkeys(tensors, 0)
    if not all(tensor.is_contiguous() for tensor in tensors.values()):
        width = next(iter(tensors.values())).shape[-1]
        rows = width and next(iter(tensors.values())).numel() // width
        # what is written has rows at even distances; what is read is copied if it has not
        tensors = {name: _as_rows(tensor) for name, tensor in tensors.items()}
        strides = {name: tensor.stride(0) for name, tensor in tensors.items()}
    arguments = {f"p_{name}": tensor for name, tensor in tensors.items()}
    arguments |= {f"{name}_stride": stride for name, stride in strides.items()}
    arguments |= {"width": width, "BLOCK": BLOCK}
    return Launch(kernel, (rows * triton.cdiv(width, BLOCK),), arguments, WARPS)


def _as_rows(x: Tensor) -> Tensor:
    """[rows, width] with adjacent columns: a view if that is possible."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])
