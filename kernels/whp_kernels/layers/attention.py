"""Causal attention on the CPU, compiled (csrc/cpu/attention.cpp): bfloat16 by AVX-512 BF16, float32 by
AVX-512.

Scores, weights and sums are float32, whatever the operands: in bfloat16 only the weights and the scores'
gradients are rounded, for the products that follow. No weights are kept for the backward, so memory grows
with the length and not with its square.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from whp_kernels import extension


@functools.cache
def has_causal_attention(dtype: torch.dtype) -> bool:
    """Whether :func:`causal_attention` and :func:`packed_causal_attention` take CPU tensors of this dtype on
    this machine."""
    return extension.load() is not None and torch.ops.whp_kernels_C.has_attention(dtype)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v, where query i stands at place S - T + i and sees the keys up to its own place.

    Args:
        q: [B, T, heads, D], T <= S.
        k, v: [B, S, kv_heads, D]; kv_heads divides heads.
        window: a query sees this many keys, its own place included; None: all.
        scale: default: 1 / sqrt(D).

    Returns:
        [B, T, heads, D], contiguous, in the dtype of q.

    Raises:
        ValueError: this machine or dtype is not served (see :func:`has_causal_attention`).
    """
    _refuse_unserved("causal_attention", q)
    return _CausalAttention.apply(q, k, v, window or 0, q.shape[-1] ** -0.5 if scale is None else scale)


def packed_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`causal_attention` within each of some sequences that lie after each other.

    One call for sequences of any lengths: threads share them out, the longest first.

    Args:
        q: [tokens, heads, D].
        k, v: [tokens, kv_heads, D]; kv_heads divides heads.
        cu_seqlens: int32 [sequences + 1] on the CPU: where each sequence begins, and the number of tokens. A
            sequence may be empty.
        window, scale: see :func:`causal_attention`.

    Returns:
        [tokens, heads, D], contiguous, in the dtype of q.

    Raises:
        ValueError: this machine or dtype is not served (see :func:`has_causal_attention`).
    """
    _refuse_unserved("packed_causal_attention", q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _PackedCausalAttention.apply(q, k, v, cu_seqlens, window or 0, scale)


def _refuse_unserved(name: str, q: Tensor) -> None:
    if q.device.type != "cpu" or not has_causal_attention(q.dtype):
        raise ValueError(
            f"{name} is not there for {q.dtype} on {q.device}: it needs the compiled extension and "
            "a processor with AVX-512 (for bfloat16 with BF16); use scaled_dot_product_attention"
        )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, window, scale):
        q, k, v = map(_adjacent, (q, k, v))
        out, log_sums = torch.ops.whp_kernels_C.causal_attention(q, k, v, window, scale)
        ctx.save_for_backward(q, k, v, log_sums)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, log_sums = ctx.saved_tensors
        g_q, g_k, g_v = torch.ops.whp_kernels_C.causal_attention_backward(
            _adjacent(g), q, k, v, log_sums, ctx.window, ctx.scale
        )
        return g_q, g_k, g_v, None, None


class _PackedCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, window, scale):
        q, k, v = map(_adjacent, (q, k, v))
        out, log_sums = torch.ops.whp_kernels_C.causal_attention_packed(q, k, v, cu_seqlens, window, scale)
        ctx.save_for_backward(q, k, v, log_sums, cu_seqlens)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, log_sums, cu_seqlens = ctx.saved_tensors
        g_q, g_k, g_v = torch.ops.whp_kernels_C.causal_attention_packed_backward(
            _adjacent(g), q, k, v, log_sums, cu_seqlens, ctx.window, ctx.scale
        )
        return g_q, g_k, g_v, None, None, None


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
