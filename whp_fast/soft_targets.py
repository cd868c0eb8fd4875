"""Losses of the unlearn stage whose teachers are hidden states on disk.

    SoftTargets     KL between softmax(v_b - alpha relu(v_r - v_b)) and the student, at the trained positions
    RetainTargets   KL(base || student) on a corpus to keep, at all positions but the last of each block

Both have the same three methods: ``count`` says how many positions blocks bring, ``prepare`` reads what is on
disk of them, ``loss`` sums over them and divides by a number that the caller knows. The teachers' rows meet
their heads in the same chunks as the student's; no logits of a batch are stored, and positions that are not
trained take part in no product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from whp_kernels.losses import IGNORE_INDEX, Identity, RowEdits, Whp, linear_combination_loss

from whp_fast.corpus import Blocks
from whp_fast.errors import UserError
from whp_fast.objectives import take_rows
from whp_fast.row_files import mend
from whp_fast.teacher_cache import CachedRows, HiddenCache, TargetCache

DIVERGENCES = {"soft": "forward_kl", "reverse": "reverse_kl"}
_SCANNED = 1 << 22


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """What the teachers say of the trained rows of a packed batch.

    Attributes:
        places: of the rows in the batch, int64 [n] without repetition.
        teachers: the hidden states of each at these rows.
        edits: of the first teacher's logits, or None.
    """

    places: Tensor
    teachers: tuple[CachedRows, ...]
    edits: RowEdits | None = None

    def pin(self) -> TeacherRows:
        edits = None if self.edits is None else self.edits.pin_memory()
        return TeacherRows(self.places.pin_memory(), tuple(rows.pin() for rows in self.teachers), edits)

    def to(self, device: torch.device) -> TeacherRows:
        edits = None if self.edits is None else self.edits.to(device)
        places = self.places.to(device, non_blocking=True)
        return TeacherRows(places, tuple(rows.to(device) for rows in self.teachers), edits)


class SoftTargets:
    """The combined distribution of both teachers as the target: arXiv 2310.02238 without its argmax. The two
    directions are FKLU and RKLU of arXiv 2406.01983.

    Args:
        folder: what :class:`whp_fast.teacher_cache.TargetWriter` wrote.
        base_head, reinforced_head: the teachers' LM heads [V, H], on the student's device; may be one
            tensor.
        labels: integer array over the token stream, -100 where untrained (its other values do not matter), of
            the label set that the cache was written for.
        context: tokens in a block.
        alpha: strength of the offset.
        direction: ``soft`` for KL(target || student), ``reverse`` for KL(student || target).

    Raises:
        UserError: a cache that is missing or damaged, or holds another number of rows than there are labels.
    """

    def __init__(
        self,
        folder: Path,
        base_head: Tensor,
        reinforced_head: Tensor,
        *,
        labels: np.ndarray,
        context: int,
        alpha: float,
        direction: str = "soft",
    ):
        if direction not in DIVERGENCES:
            raise ValueError(f"direction is {direction!r}, give one of {', '.join(DIVERGENCES)}")
        self.cache = TargetCache(folder)
        self.base_head, self.reinforced_head = base_head.detach(), reinforced_head.detach()
        self.labels, self.context = labels, context
        self.combination, self.divergence = Whp(float(alpha)), DIVERGENCES[direction]
        self._starts = _rows_before(labels, context)
        if self._starts[-1] != self.cache.count:
            raise UserError(
                f"{self.cache.folder / 'base.json'}: {self.cache.count} rows for {self._starts[-1]} "
                f"positions with a label; {mend(self.cache.folder)}."
            )

    def count(self, numbers: Sequence[int]) -> int:
        """Trained positions of the blocks of these numbers."""
        numbers = np.asarray(numbers, dtype=np.int64)
        return int((self._starts[numbers + 1] - self._starts[numbers]).sum())

    def prepare(self, numbers: Sequence[int]) -> TeacherRows:
        """What :meth:`loss` needs of the blocks of these numbers, on the CPU.

        Raises:
            UserError: what the cache holds of these blocks is damaged.
        """
        places, rows, start = [], [], 0
        for number in np.asarray(numbers, dtype=np.int64).tolist():
            block = self.labels[number * self.context : (number + 1) * self.context]
            places.append(start + np.flatnonzero(block != IGNORE_INDEX))
            rows.append(np.arange(self._starts[number], self._starts[number + 1]))
            start += len(block)
        rows = np.concatenate(rows)
        teachers = (self.cache.base.read(rows), self.cache.reinforced.read(rows))
        edits = RowEdits(*self.cache.edits.gather(rows), "mean")
        return TeacherRows(torch.from_numpy(np.concatenate(places)), teachers, edits)

    def loss(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        prepared: TeacherRows,
        *,
        num_items_in_batch: int | float | Tensor,
        compute_dtype: torch.dtype | None = None,
        chunk_mib: int = 256,
    ) -> Tensor:
        """Sum of the divergence over the trained positions of some blocks, divided by ``num_items_in_batch``.

        Args:
            hidden: the student's hidden states [tokens, H], block after block.
            lm_head_weight: the student's head [V, H].
            prepared: of the blocks, on the device of the hidden states.
            compute_dtype, chunk_mib: see :func:`whp_kernels.losses.linear_combination_loss`.

        Returns:
            a scalar, in nats. Without a trained position it is 0, and so are the gradients.
        """
        base, reinforced = (rows.values(_cached_dtype(compute_dtype)) for rows in prepared.teachers)
        return linear_combination_loss(
            take_rows(hidden, prepared.places),
            lm_head_weight,
            teachers=((base, self.base_head), (reinforced, self.reinforced_head)),
            combination=self.combination,
            divergence=self.divergence,
            row_edits=prepared.edits,
            num_items_in_batch=num_items_in_batch,
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )


class RetainTargets:
    """The base's own distribution as the target, on a corpus to keep.

    Args:
        cache: the base's hidden states, a row for every position of the blocks.
        base_head: the base's LM head [V, H], on the student's device.
        blocks: of the corpus to keep.

    Raises:
        UserError: the cache holds another number of rows than there are positions.
    """

    def __init__(self, cache: HiddenCache, base_head: Tensor, blocks: Blocks):
        self.cache, self.base_head = cache, base_head.detach()
        self._starts = blocks.offsets()
        if blocks.n_tokens != cache.count:
            raise UserError(
                f"{cache.folder / cache.name}.json: {cache.count} rows for {blocks.n_tokens} positions of "
                f"the corpus to keep; {mend(cache.folder)}."
            )

    def count(self, numbers: Sequence[int]) -> int:
        """Positions of the blocks of these numbers, but for the last of each."""
        numbers = np.asarray(numbers, dtype=np.int64)
        return int((self._starts[numbers + 1] - self._starts[numbers] - 1).sum())

    def prepare(self, numbers: Sequence[int]) -> TeacherRows:
        """See :meth:`SoftTargets.prepare`."""
        places, rows, at = [], [], 0
        for number in np.asarray(numbers, dtype=np.int64).tolist():
            start, stop = self._starts[number], self._starts[number + 1]
            places.append(at + np.arange(stop - start - 1))
            rows.append(np.arange(start, stop - 1))
            at += stop - start
        return TeacherRows(torch.from_numpy(np.concatenate(places)), (self.cache.read(np.concatenate(rows)),))

    def loss(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        prepared: TeacherRows,
        *,
        num_items_in_batch: int | float | Tensor,
        compute_dtype: torch.dtype | None = None,
        chunk_mib: int = 256,
    ) -> Tensor:
        """Sum of KL(base || student), divided by ``num_items_in_batch``; see :meth:`SoftTargets.loss`."""
        (base,) = (rows.values(_cached_dtype(compute_dtype)) for rows in prepared.teachers)
        return linear_combination_loss(
            take_rows(hidden, prepared.places),
            lm_head_weight,
            teachers=((base, self.base_head),),
            combination=Identity(),
            divergence="forward_kl",
            num_items_in_batch=num_items_in_batch,
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )


def _rows_before(labels: np.ndarray, context: int) -> np.ndarray:
    """Trained positions before each block: int64 [n_blocks + 1], the last one their number."""
    counts = [np.zeros(1, dtype=np.int64)]
    step = max(1, _SCANNED // context) * context  # whole blocks at a time: the labels are memory-mapped
    for at in range(0, len(labels), step):
        trained = labels[at : at + step] != IGNORE_INDEX
        counts.append(np.add.reduceat(trained, np.arange(0, len(trained), context), dtype=np.int64))
    return np.cumsum(np.concatenate(counts))


def _cached_dtype(compute_dtype: torch.dtype | None) -> torch.dtype:
    """What cached rows are read as: nothing is rounded before products that are not in bfloat16."""
    return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
