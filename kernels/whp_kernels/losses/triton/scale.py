"""Multiplies a tensor in place by a number that is on the GPU, without waiting for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whp_kernels.losses.triton.launch import Launch

_BLOCK, _WARPS = 8192, 8  # 32 elements a lane: 4 loads of 16 bytes under way in bfloat16, 8 in float32


def scale_(tensor: Tensor, scale: Tensor) -> Tensor:
    """``tensor *= scale``, and nothing but the look at ``scale`` where it is exactly 1.

    The gradient of a loss is made in the forward pass; what arrives in the backward pass is a factor,
    nearly always 1. Computed in float32 and rounded once.

    Args:
        tensor: float32, bfloat16 or float16 of any shape, contiguous.
        scale: one number on the same device.

    Raises:
        ValueError: another dtype or layout.
    """
    scale_launch(tensor, scale).run(tensor.device)
    return tensor


def scale_launch(tensor: Tensor, scale: Tensor) -> Launch:
    """What :func:`scale_` runs."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"scale_ takes a float32, bfloat16 or float16 tensor, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"scale_ takes a contiguous tensor, got strides {tensor.stride()}")
    if scale.numel() != 1:
        raise ValueError(f"scale_ takes one number, got a tensor of shape {tuple(scale.shape)}")
    grid = (triton.cdiv(tensor.numel(), _BLOCK),)
    arguments = {"p_x": tensor, "p_scale": scale, "n": tensor.numel(), "BLOCK": _BLOCK}
    return Launch(scale_kernel, grid, arguments, _WARPS)


@triton.jit
def scale_kernel(p_x, p_scale, n, BLOCK: tl.constexpr):
    scale = tl.load(p_scale).to(tl.float32)
    if scale == 1.0:
        return
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < n).to(tl.float32)
    tl.store(p_x + o_x, (b_x * scale).to(p_x.dtype.element_ty), mask=o_x < n)
