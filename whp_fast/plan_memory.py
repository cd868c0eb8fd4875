"""Bytes that a training or the label pass holds on one GPU, part by part, from shapes and settings alone.

The sizes of weights, moments and gradients are exact. Activations are counted tensor by tensor, as autograd
saves them (``whp_fast.plan_activations``); working memory is what the last block's backward pass has in hand.
Nothing is kept for the allocator's holes.

Of several processes the fullest is counted: the first, whose shard of a tensor of n rows is the ceiling of
n / processes (FSDP2 divides the first axis).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

from whp_kernels.losses.linear_chunks import chunk_rows
from whp_kernels.optim.moments import format_of, scale_shape

from whp_fast.config import MemoryConfig
from whp_fast.model_config import LlamaConfig
from whp_fast.plan_activations import activation_bytes, cast_bytes
from whp_fast.plan_setup import ITEM, Setup, Weight, adapter_weights, numel, outer_weights, projections
from whp_fast.quantised import quantised_bytes


def training_parts(s: Setup) -> dict[str, int]:
    """Bytes on one GPU at the highest point of a step, and under "host" those of offloaded moments."""
    shape, memory = s.shape, s.memory
    everything = [*projections(shape), *outer_weights(shape)]
    trained = adapter_weights(shape, memory) if s.lora else everything
    n = numel(trained, s.shards)
    remainder = 2 * n if s.master == "bfloat16" else 0
    moments = moments_bytes(trained, memory, s.shards)
    kept, _ = activation_bytes(s)
    loss = _loss_bytes(s)
    away = memory.offload_moments
    # Under adapters the teachers' heads are the base's own.
    heads = 0 if s.lora else s.teachers
    return {
        "weights": frozen_bytes(shape, s.frozen, s.outer) if s.lora else n * ITEM[s.master],
        "adapters": n * ITEM[s.master] if s.lora else 0,
        "remainder": 0 if away else remainder,
        "moments": 0 if away else moments,
        "gradients": n * (4 if s.master == "float32" else ITEM[memory.gradients]),
        "activations": kept,
        "loss": loss,
        "teachers": heads * shape.vocab_size * shape.hidden_size * ITEM[s.compute_dtype],
        "fsdp": _gathered_bytes(s) if s.sharded else 0,
        "working": max(0, max(_loss_backward_bytes(s), _block_backward_bytes(s), _forward_bytes(s)) - loss),
        "host": remainder + moments if away else 0,
    }


def label_parts(
    shape: LlamaConfig,
    memory: MemoryConfig,
    dtype: str,
    compute_dtype: str,
    blocks: int,
    context: int,
    chunk_mib: int,
    gpus: int = 1,
) -> dict[str, int]:
    """Bytes on one GPU of the label pass: two models in ``dtype``, or one base and its adapters."""
    s = Setup(shape, memory, compute_dtype, blocks, context, chunk_mib, gpus=gpus)
    shards = s.shards if memory.shard_teachers else 1
    kind, outer = (s.frozen, s.outer) if s.lora else (dtype, dtype)
    item = ITEM[outer]
    n = numel(adapter_weights(shape, memory))
    # The translation is another text than the block and may be longer.
    tokens = int(1.1 * s.tokens)
    q = shape.num_attention_heads * shape.head_dim
    mlp = 2 * shape.hidden_size + 4 * shape.intermediate_size
    attention = (2 * shape.hidden_size + 4 * q) * item + 3 * 4 * q  # RoPE is computed in float32
    gathered = _unsharded_bytes(shape, item) if shards > 1 else 0
    rows = 2 * 2 * tokens * shape.hidden_size * item  # hidden states of both models, at mapped positions too
    logits = chunk_rows(tokens, 2 * 4 * shape.vocab_size, chunk_mib) * 2 * 4 * shape.vocab_size
    inside = tokens * max(mlp * item, attention)
    return {
        "weights": 0,
        "adapters": n * ITEM[s.master] if s.lora else 0,
        "remainder": 0,
        "moments": 0,
        "gradients": 0,
        "activations": rows,
        "loss": logits,
        "teachers": (1 if s.lora else 2) * frozen_bytes(shape, kind, outer, shards),
        "fsdp": gathered,
        "working": max(0, inside + _dequantised_bytes(s) - logits),
        "host": 0,
    }


def frozen_bytes(shape: LlamaConfig, kind: str, outer: str, shards: int = 1) -> int:
    """A model that is not trained: projections as ``kind`` (a dtype, nf4 or int8), the rest in dtype
    ``outer``.

    Quantised projections are buffers, which sharding leaves whole.
    """
    rest = ITEM[outer] * numel(outer_weights(shape), shards)
    if kind in ITEM:
        return rest + ITEM[kind] * numel(projections(shape), shards)
    return rest + sum(w.count * _quantised(w.columns, w.rows, kind) for w in projections(shape))


_quantised = functools.cache(quantised_bytes)


def moments_bytes(weights: Iterable[Weight], memory: MemoryConfig, shards: int = 1) -> int:
    """AdamW's two moments, in the formats of ``whp_kernels.optim``; or bitsandbytes', blocks of 256
    elements."""
    total = 0
    for weight in weights:
        rows = math.ceil(weight.rows / shards)
        n = rows * weight.columns
        if memory.optimizer == "bitsandbytes":
            one = 4 * n if n < 4096 else n + 4 * math.ceil(n / 256)  # small ones stay float32
        else:
            shape = (weight.rows,) if weight.columns == 1 else (weight.rows, weight.columns)
            kept = format_of(memory.moments, shape)
            scales = 4 * math.prod(scale_shape((rows, weight.columns)))
            one = n + scales if kept == "int8" else ITEM[kept] * n
        total += 2 * one * weight.count
    return total


def _loss_bytes(s: Setup) -> int:
    """All that the loss allocates (``whp_kernels.losses.linear_chunks``).

    Chunk buffers (float32 logits of student and teachers, the gradient in the products' dtype), a copy of the
    head in that dtype, hidden states and their gradient (both also without the ignored rows), and the head's
    gradient, accumulated in float32.
    """
    vocabulary, width = s.shape.vocab_size, s.shape.hidden_size
    p, c = s.hidden, ITEM[s.compute_dtype]
    row = vocabulary * (4 * (1 + s.teachers) + c * (c != 4))
    chunk = chunk_rows(s.tokens, row, s.chunk_mib)
    head = vocabulary * width
    casts = c * (head + chunk * width) if p != c else 0
    teachers = s.teachers * s.tokens * width * c
    return chunk * row + casts + 4 * s.tokens * width * p + teachers + (0 if s.lora else 4 * head)


def _loss_backward_bytes(s: Setup) -> int:
    """The loss hands over its gradients: that of the head also in the head's dtype, and in that of the
    sum."""
    head = s.shape.vocab_size * s.shape.hidden_size
    copies = 0
    if s.master == "bfloat16":
        copies = 2 + (4 if s.memory.gradients == "float32" else 0)
    return 2 * s.tokens * s.shape.hidden_size * s.hidden + (0 if s.lora else (4 + copies) * head)


def _block_backward_bytes(s: Setup) -> int:
    """The last block's backward pass: what is recomputed for it, gradients of two of the MLP's activations or
    of one and of a weight, beside the hidden states."""
    shape, c = s.shape, ITEM[s.compute_dtype]
    largest = max(w.rows * w.columns for w in projections(shape))
    weight = 0 if s.lora else largest * (c + (4 if s.autocast else 0))
    wide = s.tokens * shape.intermediate_size * c
    casts = cast_bytes(s) // shape.num_hidden_layers if s.memory.checkpointing != "none" else 0
    _, again = activation_bytes(s)
    hidden = s.tokens * shape.hidden_size * s.hidden
    return hidden + again + wide + max(wide, weight) + casts + _dequantised_bytes(s)


def _forward_bytes(s: Setup) -> int:
    """Autocast keeps its copies of trained weights to the end of a forward pass, recomputed or not."""
    return cast_bytes(s) if s.memory.checkpointing != "none" and not s.lora else 0


def _dequantised_bytes(s: Setup) -> int:
    """The copy of one projection that a quantised layer multiplies by."""
    if not s.quantised:
        return 0
    return max(w.rows * w.columns for w in projections(s.shape)) * ITEM[s.compute_dtype]


def _gathered_bytes(s: Setup) -> int:
    """FSDP: gathered weights, and one block's gradients on their way to their shards (whole, and in float32
    for the reduction)."""
    c = ITEM[s.compute_dtype]
    return _unsharded_bytes(s.shape, c) + (4 + c) * _block(s.shape)


def _unsharded_bytes(shape: LlamaConfig, item: int) -> int:
    """The head stays gathered; beside it the block at work and the next one, or at first the embedding."""
    embedding = shape.vocab_size * shape.hidden_size
    return item * (_outer(shape) + max(2 * _block(shape), _block(shape) + embedding))


def _outer(shape: LlamaConfig) -> int:
    embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return numel(outer_weights(shape)) - embedding


def _block(shape: LlamaConfig) -> int:
    return numel(projections(shape)) // shape.num_hidden_layers
