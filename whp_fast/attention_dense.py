"""Attention over a batch of equal lengths: for caches, for masks, and what packed sequences fall back on.

Three backends: ``scaled_dot_product_attention`` of torch; for causal attention on a CPU the compiled one of
``whp_kernels.layers``; and where that is not there, in bfloat16, blocks of plain matrix products, because
torch's fused CPU kernel is no faster in bfloat16 than in float32 while the products are. Forward and backward
of [8, 6 heads (2 of keys), T, 32] on one AVX-512 core, torch 2.13, take in milliseconds

    T                     128   256   512  1024
    bfloat16  compiled    1.6   4.8    14    49
              blocked     2.7   8.9    35   148
              SDPA       14.7  27.1    84   224
    float32   compiled    2.5   7.2    23    90
              SDPA        6.1  20.6    82   247

The compiled backend keeps scores and sums in float32. The blocked one rounds scores to bfloat16 before the
softmax, as in the eager attention of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from whp_kernels.layers import causal_attention, has_causal_attention

BLOCK = 64
"""Queries in a block of the blocked backend: 128 takes 1.2 to 1.4 times as long with grouped queries, and 32
spends its time between the operators."""

LONGEST_BLOCKED = 1024
"""Beyond so many tokens the blocked backend is not used: it keeps all weights, T * T / 2 of a head."""


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    key_mask: torch.Tensor | None = None,
    compiled: bool = True,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, with grouped queries.

    Args:
        q: [B, heads, T, D].
        k, v: [B, kv_heads, S, D]; kv_heads divides heads.
        causal: a query sees no later key. The last query stands at the last key: query i at place S - T + i.
        window: a query sees this many keys, its own place included; None: all. Only with ``causal``.
        key_mask: [B, S] bool, True where a key may be seen; None: everywhere. A query that sees no key gives
        0.
        compiled: take the compiled backend where it is there.

    Returns:
        [B, heads, T, D] in the dtype of q (under autocast: the autocast dtype).
    """
    length, keys = q.shape[2], k.shape[2]
    if window is not None and not causal:
        raise ValueError("a window counts backwards from the query and needs causal=True")
    if causal and length > keys:
        raise ValueError(f"{length} queries cannot stand at the last of {keys} keys")
    if window is not None and window >= keys:
        window = None

    on_cpu = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype
    if on_cpu and causal and key_mask is None and length > 1:
        if compiled and has_causal_attention(q.dtype):
            return causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), window=window).transpose(1, 2)
        if q.dtype == torch.bfloat16 and keys <= LONGEST_BLOCKED:
            return _BlockedAttention.apply(q, k, v, window)

    mask = None
    if causal and (window is not None or key_mask is not None or length != keys):
        # is_causal of SDPA goes with neither a mask nor the alignment at the last key.
        causal = False
        if length > 1 or window is not None:
            mask = causal_mask(length, keys, window, q.device)
    if key_mask is not None:
        mask = key_mask[:, None, None, :] if mask is None else mask & key_mask[:, None, None, :]
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype == torch.float32:
        # no fused kernel of SDPA takes float32 with grouped heads; repeated heads are smaller than all scores
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def causal_mask(length: int, keys: int, window: int | None, device: torch.device | str) -> torch.Tensor:
    """[length, keys] bool, True where query i, at place keys - length + i, sees the key."""
    mask = torch.ones(length, keys, dtype=torch.bool, device=device).tril_(keys - length)
    return mask if window is None else mask.triu_(keys - length - window + 1)


class _BlockedAttention(torch.autograd.Function):
    """Causal attention over blocks of queries, each with only the keys that it sees.

    Queries that share a key head are stacked, so keys are never repeated. With scores s = q k^T / sqrt(D),
    weights p = softmax(s), and the incoming gradient g:
    dv = p^T g,   ds = p * (g v^T - sum(p * g v^T)),   dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D).
    """

    @staticmethod
    def forward(ctx, q, k, v, window):
        b, heads, length, d = q.shape
        kv_heads, keys = k.shape[1], k.shape[2]
        group = heads // kv_heads
        k, v = k.reshape(b * kv_heads, keys, d), v.reshape(b * kv_heads, keys, d)
        q = q.reshape(b * kv_heads, group, length, d)
        out = torch.empty_like(q)
        saved = []
        for rows, seen, mask in _blocks(length, keys, window, group, q.dtype):
            block_q = q[:, :, rows].flatten(1, 2)
            scores = torch.baddbmm(mask, block_q, k[:, seen].transpose(1, 2), alpha=d**-0.5)
            weights = torch.softmax(scores, -1)
            out[:, :, rows] = torch.bmm(weights, v[:, seen]).unflatten(1, (group, -1))
            if any(ctx.needs_input_grad):
                saved.append(weights)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.window, ctx.sizes = window, (b, heads, kv_heads)
        return out.view(b, heads, length, d)

    @staticmethod
    def backward(ctx, g):
        q, k, v, *saved = ctx.saved_tensors
        b, heads, kv_heads = ctx.sizes
        _, group, length, d = q.shape
        keys = k.shape[1]
        g = g.reshape(q.shape)
        dq = torch.empty_like(q)
        # Several blocks add to the same key: in bf16 the later ones would be rounded away.
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        with torch.autocast(q.device.type, enabled=False):  # backward may be called inside an autocast region
            blocks = _blocks(length, keys, ctx.window, group, q.dtype)
            for (rows, seen, _), weights in zip(blocks, saved, strict=True):
                block_q, block_g = q[:, :, rows].flatten(1, 2), g[:, :, rows].flatten(1, 2)
                dv[:, seen] += torch.bmm(weights.transpose(1, 2), block_g)
                d_weights = torch.bmm(block_g, v[:, seen].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                dq[:, :, rows] = torch.bmm(d_scores, k[:, seen]).unflatten(1, (group, -1))
                dk[:, seen] += torch.bmm(d_scores.transpose(1, 2), block_q)
        scale = d**-0.5
        dq = dq.mul_(scale).view(b, heads, length, d)
        dk, dv = dk.mul_(scale).to(k.dtype), dv.to(v.dtype)
        return dq, dk.view(b, kv_heads, keys, d), dv.view(b, kv_heads, keys, d), None


def _blocks(
    length: int, keys: int, window: int | None, group: int, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """For each block: its queries, the keys they see between them, and 0 or -inf [group * queries, keys]."""
    before = keys - length
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        left = 0 if window is None else max(0, before + first - window + 1)
        right = before + last
        allowed = causal_mask(last - first, right - left, window, "cpu")
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
        yield slice(first, last), slice(left, right), mask.repeat(group, 1)
