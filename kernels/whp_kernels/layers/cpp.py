"""The layers on the CPU, compiled: AVX-512, AVX2 or any processor, chosen at run time
(csrc/cpu/layers.cpp).

The functions of ``reference.py`` for float32 and bfloat16. ``WHP_KERNELS_ISA`` asks for another instruction
set than the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.layers.columns import split_columns, whole_of


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    narrow = dtype == torch.bfloat16
    x = x.contiguous()
    if branch is None:
        _, out, scale = torch.ops.whp_kernels_C.rms_norm(x, None, weight, eps, narrow)
        total = x
    else:
        total, out, scale = torch.ops.whp_kernels_C.rms_norm(x, branch.contiguous(), weight, eps, narrow)
    return total, out if out.dtype == dtype else out.to(dtype), scale


def rms_norm_backward(
    g_out: Tensor,
    g_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    branch_dtype: torch.dtype | None,
    weight_too: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    narrow = branch_dtype == torch.bfloat16 and total.dtype != torch.bfloat16
    g_x, g_branch, g_weight = torch.ops.whp_kernels_C.rms_norm_backward(
        g_out.contiguous(),
        None if g_sum is None else g_sum.contiguous(),
        total,
        weight,
        scale,
        narrow,
        weight_too,
    )
    if branch_dtype is None:
        g_branch = None
    elif not narrow:
        g_branch = g_x.to(branch_dtype)
    return g_x, g_branch, g_weight if weight_too else None


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    return torch.ops.whp_kernels_C.rope(x, cos.contiguous(), sin.contiguous(), inverse)


def rope_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    in_one: bool = False,
) -> tuple[Tensor, ...]:
    made = [rope(q, cos, sin, inverse), rope(k, cos, sin, inverse)] + ([] if v is None else [v.clone()])
    return tuple(split_columns(whole_of(made, 2), made, 2) if in_one else made)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.whp_kernels_C.swiglu(gate.contiguous(), up.contiguous())


def swiglu_backward(g: Tensor, gate: Tensor, up: Tensor, in_one: bool = False) -> tuple[Tensor, Tensor]:
    made = torch.ops.whp_kernels_C.swiglu_backward(g.contiguous(), gate.contiguous(), up.contiguous())
    return tuple(split_columns(whole_of(made), made)) if in_one else made
