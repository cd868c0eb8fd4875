"""Rotary embedding on GPUs: layouts and launch; the contract is in :mod:`whp_kernels.layers.reference`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from whp_kernels.layers.columns import empty_columns
from whp_kernels.layers.triton.rope_rotation import rope_kernel
from whp_kernels.losses.triton.launch import Launch

PAIRS, WARPS = 1024, 4  # of elements of a program: 8 a lane, read 16 bytes at a time in 16-bit dtypes
MOST_HEADS = 32


def rope_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    in_one: bool = False,
) -> tuple[Tensor, ...]:
    """See :func:`whp_kernels.layers.reference.rope_heads`."""
    given = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v) if x is not None]
    if in_one:
        made = empty_columns(given, trailing=2)
    else:
        made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    rope_launch(given, made, cos.contiguous(), sin.contiguous(), inverse).run(q.device)
    return tuple(made)


def rope_launch(given, made, cos: Tensor, sin: Tensor, inverse: bool) -> Launch:
    """What :func:`rope_heads` runs; queries, keys and perhaps values, adjacent in depth."""
    batch, places, _, depth = given[0].shape
    half = triton.next_power_of_2(max(depth // 2, 1))
    most = triton.next_power_of_2(max(x.shape[2] for x in given))
    heads = max(1, min(PAIRS // half, most, MOST_HEADS))
    parts = [(x, y, x.shape[2], *x.stride()[:3], *y.stride()[:3]) for x, y in zip(given, made)]
    arguments = dict(zip("qkv", [*parts, None]))
    arguments |= {
        "p_cos": cos,
        "p_sin": sin,
        "places": places,
        "table_stride": 0 if cos.numel() == places * depth else places * depth,
        "INVERSE": inverse,
        "DEPTH": depth,
        "HEADS": heads,
        "HALF": half,
    }
    blocks = sum(triton.cdiv(x.shape[2], heads) for x in given)
    return Launch(rope_kernel, (batch * places, blocks), arguments, WARPS)
