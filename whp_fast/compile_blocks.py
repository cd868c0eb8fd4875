"""Blocks by ``torch.compile``, in the place of the fused layers (``model.layers: compile``).

Each block is compiled for itself, as torchtitan does: all blocks share their code, so the compiler works once
however deep the model is, and the first step waits for seconds and not for minutes. Attention stays outside
of the compiled graphs: its backends are finished kernels. The hooks of FSDP2 and of checkpointing lie around
a block and stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from whp_fast.attention import attention
from whp_fast.model import Llama
from whp_fast.packing import Packing


def compile_blocks(model: Llama, backend: str = "inductor") -> None:
    """Compile the blocks of a model; it happens in the first forward pass, and again for a second length.

    Generation with a cache, whose lengths change from token to token, runs as before.

    Args:
        backend: of ``torch.compile``.
    """
    apart = torch.compiler.disable(attention)
    for block in model.model.layers:
        block.self_attn.attention = apart
        block.forward = _Compiled(block.forward, backend)


class _Compiled:
    """A block's forward, compiled for packed sequences."""

    def __init__(self, eager: Any, backend: str) -> None:
        self._eager = eager
        self._compiled = torch.compile(eager, backend=backend)

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: Any) -> torch.Tensor:
        run = self._compiled if isinstance(seen, Packing) else self._eager
        return run(x, cos, sin, seen)
