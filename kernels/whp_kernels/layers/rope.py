"""Rotary embedding (arXiv 2104.09864) in the half-rotation layout of Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.layers.columns import are_columns
from whp_kernels.layers.dispatch import backend


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, v: Tensor | None = None
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """x * cos + roll(x, D / 2) * sin over the last axis of queries and keys, computed in the dtype of cos and
    rounded once.

    Queries, keys and values that are columns of one tensor come back as tensors of their own, so that none of
    them keeps that tensor alive; their gradients are written beside each other, as
    :func:`whp_kernels.layers.stacked_linear` wants them.

    Args:
        q, k: [B, T, heads, D], each with its number of heads.
        cos, sin: [T, 1, D] or [B, T, 1, D], float32 or wider; the first half of ``sin`` carries the minus
            sign of ``rotate_half``, so that this is the whole rotation. No gradient.
        v: [B, T, heads, D], which are not rotated; None: the values do not come with them.

    Returns:
        q, k, and v if it was given, in their shapes and dtypes.
    """
    if v is None:
        return _Rope.apply(q, k, None, cos, sin)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and v.requires_grad):
        return *_Rope.apply(q, k, None, cos, sin), v
    if are_columns((q, k, v), 2):
        return _Rope.apply(q, k, v, cos, sin)
    return *_Rope.apply(q, k, None, cos, sin), v.contiguous()


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin):
        ctx.save_for_backward(cos, sin)
        return backend(q, k, cos, sin).rope_heads(q, k, v, cos, sin, False)

    @staticmethod
    def backward(ctx, g_q, g_k, g_v=None):
        cos, sin = ctx.saved_tensors
        in_one = g_v is not None
        made = backend(g_q, g_k, cos, sin).rope_heads(g_q, g_k, g_v, cos, sin, True, in_one)
        return *made[:2], made[2] if in_one else None, None, None
