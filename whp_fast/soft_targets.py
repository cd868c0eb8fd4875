"""Losses of the unlearn stage whose teachers are hidden states on disk.

    SoftTargets     KL between softmax(v_b - alpha relu(v_r - v_b)) and the student, at the trained positions
    RetainTargets   KL(base || student) on a corpus to keep, at all positions but the last of each block

Both have the same two methods: ``count`` says how many positions blocks bring, ``loss`` sums over them and
divides by a number that the caller knows. The teachers' rows meet their heads in the same chunks as the
student's; no logits of a batch are stored, and positions that are not trained take part in no product.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from whp_kernels.losses import IGNORE_INDEX, Identity, RowEdits, Whp, linear_combination_loss

from whp_fast.corpus import Blocks
from whp_fast.errors import UserError
from whp_fast.row_files import mend
from whp_fast.teacher_cache import HiddenCache, TargetCache

DIVERGENCES = {"soft": "forward_kl", "reverse": "reverse_kl"}
_SCANNED = 1 << 22


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

    def loss(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        numbers: Sequence[int],
        *,
        num_items_in_batch: int | float | Tensor,
        compute_dtype: torch.dtype | None = None,
        chunk_mib: int = 256,
    ) -> Tensor:
        """Sum of the divergence over the trained positions of some blocks, divided by ``num_items_in_batch``.

        Args:
            hidden: the student's hidden states [b, T, H], a row a block, padded on the right.
            lm_head_weight: the student's head [V, H].
            numbers: of the blocks, [b].
            compute_dtype, chunk_mib: see :func:`whp_kernels.losses.linear_combination_loss`.

        Returns:
            a scalar, in nats. Without a trained position it is 0, and so are the gradients.

        Raises:
            UserError: what the cache holds of these blocks is damaged.
        """
        places, rows = [], []
        for k, number in enumerate(np.asarray(numbers, dtype=np.int64).tolist()):
            block = self.labels[number * self.context : (number + 1) * self.context]
            places.append(k * hidden.shape[1] + np.flatnonzero(block != IGNORE_INDEX))
            rows.append(np.arange(self._starts[number], self._starts[number + 1]))
        rows = np.concatenate(rows)
        how = {"dtype": _cached_dtype(compute_dtype), "device": hidden.device}
        edits = RowEdits(*self.cache.edits.gather(rows), "mean")
        return linear_combination_loss(
            _taken(hidden, places),
            lm_head_weight,
            teachers=(
                (self.cache.base.gather(rows, **how), self.base_head),
                (self.cache.reinforced.gather(rows, **how), self.reinforced_head),
            ),
            combination=self.combination,
            divergence=self.divergence,
            row_edits=edits.to(hidden.device),
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

    def loss(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        numbers: Sequence[int],
        *,
        num_items_in_batch: int | float | Tensor,
        compute_dtype: torch.dtype | None = None,
        chunk_mib: int = 256,
    ) -> Tensor:
        """Sum of KL(base || student), divided by ``num_items_in_batch``; see :meth:`SoftTargets.loss`."""
        places, rows = [], []
        for k, number in enumerate(np.asarray(numbers, dtype=np.int64).tolist()):
            start, stop = self._starts[number], self._starts[number + 1] - 1
            places.append(k * hidden.shape[1] + np.arange(stop - start))
            rows.append(np.arange(start, stop))
        base = self.cache.gather(
            np.concatenate(rows), dtype=_cached_dtype(compute_dtype), device=hidden.device
        )
        return linear_combination_loss(
            _taken(hidden, places),
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


def _taken(hidden: Tensor, places: list[np.ndarray]) -> Tensor:
    """Rows of [b, T, H] at flat places, [n, H]; the others get gradients of zero."""
    index = torch.from_numpy(np.concatenate(places)).to(hidden.device)
    return hidden.flatten(0, 1).index_select(0, index)


def _cached_dtype(compute_dtype: torch.dtype | None) -> torch.dtype:
    """What cached rows are read as: nothing is rounded before products that are not in bfloat16."""
    return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
