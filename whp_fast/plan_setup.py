"""What planned bytes depend on: the shapes of a model's weights, and how a training keeps them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from whp_fast.config import MemoryConfig
from whp_fast.model_config import LlamaConfig

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element."""


@dataclass(frozen=True)
class Weight:
    """A kind of parameter: ``count`` tensors of [rows, columns] (vectors [rows]: one column)."""

    name: str
    rows: int
    columns: int
    count: int = 1

    @property
    def numel(self) -> int:
        return self.rows * self.columns * self.count

    def local(self, shards: int) -> int:
        """Elements on the fullest of so many processes."""
        return math.ceil(self.rows / shards) * self.columns * self.count


@dataclass(frozen=True)
class Setup:
    """Everything the bytes of a training depend on; the properties are the rules of ``whp_fast.trainee``.

    Attributes:
        shape: of the model.
        memory: the settings ``memory.*``.
        compute_dtype: of matrix products.
        blocks: in a micro-batch of one process.
        context: tokens in a block.
        chunk_mib: for the logits of the loss.
        teachers: models whose LM heads and hidden states the loss reads (2 for soft targets, else 0).
        gpus: processes in all.
        cpu: the attention of a CPU is counted.
        fp8: the projections keep their inputs in 8 bits.
    """

    shape: LlamaConfig
    memory: MemoryConfig
    compute_dtype: str
    blocks: int
    context: int
    chunk_mib: int = 256
    teachers: int = 0
    gpus: int = 1
    cpu: bool = False
    fp8: bool = False

    @property
    def lora(self) -> bool:
        """Adapters are trained, and every process holds the whole frozen base."""
        return self.memory.lora_rank > 0

    @property
    def shards(self) -> int:
        """Processes that the trained model is divided among."""
        return 1 if self.lora else self.gpus // self.memory.replicas

    @property
    def sharded(self) -> bool:
        return self.gpus > 1 and not self.lora

    @property
    def tokens(self) -> int:
        """In a micro-batch."""
        return self.blocks * self.context

    @property
    def master(self) -> str:
        """dtype of the trained parameters; adapters are float32."""
        return "float32" if self.lora else self.memory.weights_dtype(self.compute_dtype)

    @property
    def frozen(self) -> str:
        """How the projections of the base under adapters are kept."""
        return self.compute_dtype if self.memory.frozen == "auto" else self.memory.frozen

    @property
    def quantised(self) -> bool:
        return self.lora and self.frozen not in ITEM

    @property
    def outer(self) -> str:
        """dtype of embedding, norms and head, which are never quantised."""
        if not self.lora:
            return self.master
        return self.compute_dtype if self.quantised else self.frozen

    @property
    def autocast(self) -> bool:
        """float32 parameters are cast by autocast (sharded ones when they are gathered)."""
        return self.outer == "float32" != self.compute_dtype and not self.sharded

    @property
    def hidden(self) -> int:
        """Bytes of an element of the states that the head reads."""
        return 4 if self.autocast else ITEM[self.compute_dtype]


RESIDUAL = 4
"""Bytes of an element of the residual stream of a training: float32 whatever the weights are."""


def projections(shape: LlamaConfig) -> list[Weight]:
    """The matrices of the blocks; each ``count`` is the number of layers."""
    layers, width, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sizes = {
        "q_proj": (q, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "o_proj": (width, q),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    return [Weight(name, rows, columns, layers) for name, (rows, columns) in sizes.items()]


def outer_weights(shape: LlamaConfig) -> list[Weight]:
    """Embedding, head (none when tied), norms and biases."""
    layers, width = shape.num_hidden_layers, shape.hidden_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    found = [Weight("embed_tokens", shape.vocab_size, width), Weight("norms", width, 1, 2 * layers + 1)]
    if not shape.tie_word_embeddings:
        found.append(Weight("lm_head", shape.vocab_size, width))
    if shape.qkv_bias:
        found += [Weight("q bias", q, 1, layers), Weight("k and v bias", kv, 1, 2 * layers)]
    if shape.o_bias:
        found.append(Weight("o bias", width, 1, layers))
    if shape.qk_norm:
        found.append(Weight("q_norm and k_norm", shape.head_dim, 1, 2 * layers))
    return found


def adapter_weights(shape: LlamaConfig, memory: MemoryConfig) -> list[Weight]:
    """A [rank, in] and B [out, rank] of every target; none without adapters."""
    rank = memory.lora_rank
    targets = [w for w in projections(shape) if rank and w.name in memory.lora_targets]
    return [
        part
        for w in targets
        for part in (
            Weight(f"{w.name} A", rank, w.columns, w.count),
            Weight(f"{w.name} B", w.rows, rank, w.count),
        )
    ]


def numel(weights: Iterable[Weight], shards: int = 1) -> int:
    """Elements on the fullest of ``shards`` processes."""
    return sum(weight.local(shards) for weight in weights)


def parameter_count(shape: LlamaConfig) -> int:
    """Parameters of the model."""
    return numel([*projections(shape), *outer_weights(shape)])
