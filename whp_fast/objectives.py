"""What a training compares the model with: the text's next tokens, labels, or teachers' distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from whp_kernels.losses import IGNORE_INDEX, linear_combination_loss

from whp_fast.corpus import Blocks


class Targets(Protocol):
    """The targets of the positions of some blocks."""

    def count(self, numbers: np.ndarray) -> int:
        """Trained positions of these blocks."""

    def loss(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        numbers: np.ndarray,
        *,
        num_items_in_batch: int,
        compute_dtype: torch.dtype,
        chunk_mib: int,
    ) -> Tensor:
        """The losses of these blocks' positions, added up and divided by ``num_items_in_batch``.

        Args:
            hidden: [b, T, H], the blocks in order, padded on the right.
            lm_head_weight: [V, H].
        """


@dataclass(frozen=True)
class Objective:
    """Blocks to read, targets to compare with, and how much the comparison counts."""

    blocks: Blocks
    targets: Targets
    weight: float = 1.0


class LabelTargets:
    """Cross-entropy with one token for each position.

    Args:
        blocks: the original blocks.
        labels: integer array over the token stream, -100 where untrained; None for the text's next tokens.
    """

    def __init__(self, blocks: Blocks, labels: np.ndarray | None):
        self.blocks, self.labels = blocks, labels

    def count(self, numbers: np.ndarray) -> int:
        if self.labels is None:
            return sum(len(self.blocks[int(number)]) - 1 for number in numbers)
        return sum(int((self._of(int(number)) != IGNORE_INDEX).sum()) for number in numbers)

    def loss(self, hidden, lm_head_weight, numbers, *, num_items_in_batch, compute_dtype, chunk_mib):
        targets = np.full(hidden.shape[:2], IGNORE_INDEX, dtype=np.int64)
        for k, number in enumerate(numbers):
            of_block = self._of(int(number))
            targets[k, : len(of_block)] = of_block
        return linear_combination_loss(
            hidden,
            lm_head_weight,
            torch.from_numpy(targets).to(hidden.device, non_blocking=True),
            num_items_in_batch=num_items_in_batch,
            ignore_index=IGNORE_INDEX,
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )

    def _of(self, number: int) -> np.ndarray:
        block = self.blocks[number]
        if self.labels is None:
            return block[1:]
        start = number * self.blocks.context
        return self.labels[start : start + len(block)]
