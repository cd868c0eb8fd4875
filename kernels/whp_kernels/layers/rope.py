"""Rotary embedding (arXiv 2104.09864) in the half-rotation layout of Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.layers.dispatch import backend


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + roll(x, D / 2) * sin over the last axis of queries and keys, computed in the dtype of cos and
    rounded once.

    Args:
        q, k: [B, T, heads, D], each with its number of heads.
        cos, sin: [T, 1, D] or [B, T, 1, D], float32 or wider; the first half of ``sin`` carries the minus
            sign of ``rotate_half``, so that this is the whole rotation. No gradient.

    Returns:
        both, in their shapes and dtypes.
    """
    return _Rope.apply(q, k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend(q, k, cos, sin)
        return ctx.backend.rope(q, cos, sin, False), ctx.backend.rope(k, cos, sin, False)

    @staticmethod
    def backward(ctx, g_q, g_k):
        cos, sin = ctx.saved_tensors
        return ctx.backend.rope(g_q, cos, sin, True), ctx.backend.rope(g_k, cos, sin, True), None, None
