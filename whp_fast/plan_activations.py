"""What a training keeps between forward and backward, counted tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from whp_kernels.layers import has_causal_attention

from whp_fast.attention_dense import BLOCK, LONGEST_BLOCKED
from whp_fast.plan_setup import ITEM, RESIDUAL, Setup, numel, projections


@dataclass(frozen=True)
class Saved:
    """One tensor that a block saves for its backward pass.

    Attributes:
        bytes: for each token.
        kept: by which kinds of checkpointing.
    """

    name: str
    bytes: float
    kept: tuple[str, ...]


_ALWAYS, _PRODUCTS, _ALONE = ("none", "selective", "full"), ("none", "selective"), ("none",)


def saved_per_token(s: Setup) -> list[Saved]:
    """What autograd saves in one block for each token; the one place where the model's arithmetic is counted.

    Follows ``whp_fast.model``: with r bytes an element in the residual stream and c in the products,

        x [H] r, normed [H] c, q k v [Q + 2 KV] c, attention [Q] c and its log-sum-exp,
        x [H] r, normed [H] c, gate up product [3 I] c

    With 8-bit products what a projection reads is kept in one byte an element; the attention's result in both
    forms, as attention itself needs it too.
    """
    shape, targets = s.shape, s.memory.lora_targets
    r, c = RESIDUAL, ITEM[s.compute_dtype]
    read = 1 if s.fp8 else c
    width, inner = shape.hidden_size, shape.intermediate_size
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    q, kv = heads * shape.head_dim, kv_heads * shape.head_dim

    def read_by(*names: str) -> bool:  # a product keeps its input for the gradient of a weight alone
        return not s.lora or any(name in targets for name in names)

    saved = [
        Saved("block input", width * r, _ALWAYS),
        Saved("norm 1 (a number a row)", 4, _ALONE),
        Saved("normed 1", width * read * read_by("q_proj", "k_proj", "v_proj"), _ALONE),
        Saved("q, k, v", (q + 2 * kv) * c, _PRODUCTS),
        Saved("attention", q * c, _PRODUCTS),
        Saved("attention's inside", _inside_attention(s), _PRODUCTS),
        Saved("middle of the block", width * r, _ALONE),
        Saved("norm 2 (a number a row)", 4, _ALONE),
        Saved("normed 2", width * read * read_by("gate_proj", "up_proj"), _ALONE),
        Saved("gate, up", 2 * inner * c, _PRODUCTS),
        Saved("product", inner * read * read_by("down_proj"), _ALONE),
        Saved("results of o and down", 2 * width * c, ("selective",)),
    ]
    if s.fp8:
        saved.append(Saved("attention in 8 bits", q, _ALONE))
    if shape.qk_norm:
        saved.append(Saved("q, k before their norms", (q + kv) * c + 4 * (heads + kv_heads), _ALONE))
    if s.lora:
        results = sum(w.rows for w in projections(shape) if w.name in targets)
        saved.append(Saved("inside adapters", s.memory.lora_rank * c * len(set(targets)), _PRODUCTS))
        saved.append(Saved("results before adapters", results * c, ("selective",)))
    return saved


def _inside_attention(s: Setup) -> float:
    """A log-sum-exp for each head; on a CPU without the compiled attention, bfloat16 keeps its weights
    instead (``whp_fast.attention_dense``)."""
    heads = s.shape.num_attention_heads
    blocked = s.cpu and s.compute_dtype == "bfloat16" and s.context <= LONGEST_BLOCKED
    if not blocked or has_causal_attention(torch.bfloat16):
        return 4 * heads
    ends = [min(first + BLOCK, s.context) for first in range(0, s.context, BLOCK)]
    seen = sum((last - first) * last for first, last in zip([0, *ends], ends))
    return heads * seen * 2 / s.context


def activation_bytes(s: Setup) -> tuple[int, int]:
    """(kept between forward and backward, recomputed for one block at a time) of a micro-batch.

    Weights that autocast casts (one process, float32 weights, bfloat16 products) are saved like activations:
    they are among the first.
    """
    saved, checkpointing = saved_per_token(s), s.memory.checkpointing
    kept = sum(one.bytes for one in saved if checkpointing in one.kept)
    again = sum(one.bytes for one in saved if "none" in one.kept and checkpointing not in one.kept)
    outside = 8 + s.shape.hidden_size * RESIDUAL + 4  # token ids, input of the last norm and its number
    copies = 0 if checkpointing != "none" else cast_bytes(s)
    return int(s.tokens * (kept * s.shape.num_hidden_layers + outside)) + copies, int(s.tokens * again)


def cast_bytes(s: Setup) -> int:
    """Copies of the projections that autocast makes; none where they are read in 8 bits."""
    return ITEM[s.compute_dtype] * numel(projections(s.shape)) if s.autocast and not s.fp8 else 0
