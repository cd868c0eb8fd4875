"""What a training compares the model with: the text's next tokens, labels, or teachers' distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from whp_kernels.losses import IGNORE_INDEX, linear_combination_loss

from whp_fast.corpus import Blocks


class Prepared(Protocol):
    """What the loss needs of some blocks, beside the model."""

    def pin(self) -> Prepared:
        """The same in page-locked memory."""

    def to(self, device: torch.device) -> Prepared:
        """The same on a device; from page-locked memory the copy is not waited for."""


class Targets(Protocol):
    """The targets of the positions of some blocks."""

    def count(self, numbers: np.ndarray) -> int:
        """Trained positions of these blocks."""

    def prepare(self, numbers: np.ndarray) -> Prepared:
        """What :meth:`loss` needs of these blocks, on the CPU. Another thread may call it, ahead of time."""

    def loss(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        prepared: Any,
        *,
        num_items_in_batch: int,
        compute_dtype: torch.dtype,
        chunk_mib: int,
    ) -> Tensor:
        """The losses of the trained positions, added up and divided by ``num_items_in_batch``.

        Nothing is read from the device.

        Args:
            hidden: [tokens, H], the blocks one after the other, in the order they were prepared in.
            lm_head_weight: [V, H].
            prepared: what :meth:`prepare` gave, on the device of the hidden states.
        """


@dataclass(frozen=True)
class Objective:
    """Blocks to read, targets to compare with, and how much the comparison counts."""

    blocks: Blocks
    targets: Targets
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """The trained rows of a packed batch: their places, int64 [n] without repetition, and their labels,
    int64 [n]."""

    places: Tensor
    labels: Tensor

    def pin(self) -> LabelledRows:
        return LabelledRows(self.places.pin_memory(), self.labels.pin_memory())

    def to(self, device: torch.device) -> LabelledRows:
        return LabelledRows(
            self.places.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        )


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

    def prepare(self, numbers: np.ndarray) -> LabelledRows:
        places, labels, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for number in numbers:
            of_block = self._of(int(number))
            trained = np.flatnonzero(of_block != IGNORE_INDEX)
            places.append(start + trained)
            labels.append(of_block[trained].astype(np.int64))
            start += len(self.blocks[int(number)])
        return LabelledRows(*(torch.from_numpy(np.concatenate(parts)) for parts in (places, labels)))

    def loss(self, hidden, lm_head_weight, prepared, *, num_items_in_batch, compute_dtype, chunk_mib):
        return linear_combination_loss(
            take_rows(hidden, prepared.places),
            lm_head_weight,
            prepared.labels,
            num_items_in_batch=num_items_in_batch,
            ignore_index=None,
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )

    def _of(self, number: int) -> np.ndarray:
        block = self.blocks[number]
        if self.labels is None:
            return block[1:].astype(np.int64)
        start = number * self.blocks.context
        return self.labels[start : start + len(block)]


def take_rows(hidden: Tensor, places: Tensor) -> Tensor:
    """Rows [n, H] of [tokens, H] at places that hold none twice; the others get gradients of zero."""
    return _TakenRows.apply(hidden, places)


class _TakenRows(torch.autograd.Function):
    """Unlike that of ``index_select`` its backward adds nothing up, so it copies."""

    @staticmethod
    def forward(ctx, hidden, places):
        ctx.save_for_backward(places)
        ctx.rows = len(hidden)
        return hidden.index_select(0, places)

    @staticmethod
    def backward(ctx, g):
        (places,) = ctx.saved_tensors
        return g.new_zeros((ctx.rows, *g.shape[1:])).index_copy_(0, places, g), None
