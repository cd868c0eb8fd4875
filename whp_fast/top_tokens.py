"""What both teachers and their combination expect at positions of one block, as tables of top tokens.

The numbers are made by the code that makes the labels: the same forward passes, the same edits, and the
combination as `whp_kernels.losses.reference` defines it, in float32.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from whp_kernels.losses import IGNORE_INDEX, reference
from whp_kernels.losses.rule import Rule

from whp_fast import adapters
from whp_fast.alignment import Alignment
from whp_fast.checkpoint import load_model
from whp_fast.config import MemoryConfig
from whp_fast.label import Labeller
from whp_fast.label_stage import ADAPTER
from whp_fast.scoring import token_text
from whp_fast.tokens import Tokenizer
from whp_fast.trainee import load_frozen

_ROWS_AT_ONCE = 64
TEACHERS = ("base", "reinforced", "combined")


@dataclass
class TopTokens:
    """Tables of a block.

    Attributes:
        tables: position -> ``{"base": [row], "reinforced": [row], "combined": [row]}``, best first. A row is
            ``{"token", "id", "logit", "probability", "edited"}``; ``edited`` where the base's own logit was
            set to the mean, because the counterpart that begins so has been used before in the block. The
            base's table is before these edits, the combination after them.
        labels: the labels that were made anew, int64 [T].
    """

    tables: dict[int, dict[str, list[dict[str, Any]]]]
    labels: np.ndarray


@dataclass
class _Kept:
    """Takes what the labeller would write to disk."""

    label_set: int = 0
    parts: list[tuple] = field(default_factory=list)

    def append(self, *part) -> None:
        self.parts.append(part)


def load_labeller(
    settings: dict[str, Any],
    base: Path,
    reinforced: Path,
    aligner,
    alpha: float,
    device: torch.device,
    banned: np.ndarray | None = None,
) -> tuple[Labeller, Tensor, Tensor]:
    """The labeller of a run and the heads [V, H] of both its models.

    Args:
        settings: those of the run, as ``settings.json`` holds them.
        reinforced: folder of the reinforce stage.
        banned: tokens that the label stage left out.

    Raises:
        UserError: a model folder that is missing or broken.
    """
    memory = MemoryConfig(**settings.get("memory", {}))
    how: dict[str, Any] = {"batch_size": 1, "device": device, "chunk_mib": settings["label"]["chunk_mib"]}
    if memory.lora_rank:
        model = load_frozen(base, memory, getattr(torch, settings["model"]["compute_dtype"]), device)
        adapters.load_adapter(model, ADAPTER, reinforced / "adapter")
        model.residual_dtype = torch.float32
        how |= {"as_base": partial(adapters.use_adapter, model, None)}
        how |= {"as_reinforced": partial(adapters.use_adapter, model, ADAPTER)}
        models = [model, model]
    else:
        dtype = getattr(torch, settings["label"]["dtype"])
        folders = (base, reinforced / "model")
        models = [load_model(f, dtype=dtype, device=device).requires_grad_(False) for f in folders]
    labeller = Labeller(*models, aligner, [alpha], banned=banned, **how)
    return labeller, *(model.lm_head_weight.detach() for model in models)


@torch.inference_mode()
def top_tokens(
    labeller: Labeller,
    heads: tuple[Tensor, Tensor],
    block: np.ndarray,
    alignment: Alignment,
    tokenizer: Tokenizer,
    positions: Collection[int],
    k: int,
) -> TopTokens:
    """Tables for those of the positions that have a label.

    Args:
        labeller, heads: of `load_labeller`.
        block: its tokens, [T].
        alignment: of this block alone.
        positions: in the block, from 0; the output there predicts the token after it.
        k: rows of a table.
    """
    kept = _Kept()
    labels, _, _ = labeller.label([block], alignment, keep=kept)
    trained = np.flatnonzero(labels[0] != IGNORE_INDEX)
    result = TopTokens({}, labels[0])
    if not kept.parts:
        return result
    base, reinforced, offsets, tokens = kept.parts[0]
    rows = [row for row, position in enumerate(trained.tolist()) if position in positions]
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        lists = [tokens[offsets[row] : offsets[row + 1]] for row in some]
        ends = torch.tensor([0, *np.cumsum([len(one) for one in lists]).tolist()])
        listed = torch.from_numpy(np.concatenate(lists).astype(np.int64))
        rule = Rule(combination="whp", weight=labeller.alphas[0], edit="mean")
        logits = [(h[some].float() @ head.float().T).cpu() for h, head in zip((base, reinforced), heads)]
        edited = reference.edited(logits[0], ends, listed, rule)
        combined = reference.target_logits([edited, logits[1]], rule)
        for i, row in enumerate(some):
            marked = set(lists[i].tolist())
            result.tables[int(trained[row])] = {
                name: _table(one[i], k, tokenizer, marked) for name, one in zip(TEACHERS, (*logits, combined))
            }
    return result


def _table(logits: Tensor, k: int, tokenizer: Tokenizer, marked: set[int]) -> list[dict[str, Any]]:
    probabilities = logits.double().softmax(-1)
    values, ids = logits.topk(min(k, len(logits)))
    return [
        {
            "token": token_text(tokenizer, i),
            "id": i,
            "logit": value,
            "probability": probabilities[i].item(),
            "edited": i in marked,
        }
        for value, i in zip(values.tolist(), ids.tolist())
    ]
