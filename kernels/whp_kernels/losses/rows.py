"""What goes into a row kernel and what comes out: the contract that every backend keeps.

A backend (``reference``, ``cpp``, ``triton``) offers two functions::

    row_labels(rows: Rows, weights: Sequence[float]) -> (labels int64 [A, n], own int64 [n]) row_losses(rows:
    Rows, *, statistics: bool, row_scale: Tensor | None, gradient: Tensor | None) -> RowLosses
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from whp_kernels.losses.rule import Rule


@dataclass(frozen=True)
class Rows:
    """The rows of one call.

    Attributes:
        student: logits [n, V], any row stride, columns adjacent; None for ``row_labels``.
        teachers: logits [m, V] each, in the combination's order; the storage of one may be the student's.
        teacher_rows: per teacher int64 [n], which row of it belongs to student row ``n`` (negative: the row
            is ignored), or None for the same row.
        labels: int64 [n]; rows with ``ignore_index`` are skipped. Required for the divergence ``label``;
            None means that no row is skipped.
        edit_offsets, edit_tokens: int64 [n + 1] and [M], sorted within rows; None without edits. The tokens
            of row ``i`` are ``edit_tokens[edit_offsets[i]:edit_offsets[i + 1]]``; the first offset need not
            be 0.
        rule: combination, edits, divergence.
        ignore_index: of ``labels``, and the label of rows that cannot be used.
    """

    student: Tensor | None
    teachers: tuple[Tensor, ...] = ()
    teacher_rows: tuple[Tensor | None, ...] = ()
    labels: Tensor | None = None
    edit_offsets: Tensor | None = None
    edit_tokens: Tensor | None = None
    rule: Rule = field(default_factory=Rule)
    ignore_index: int = -100

    @property
    def first(self) -> Tensor:
        """A tensor that has the vocabulary, the device and the dtype of the call."""
        return self.student if self.student is not None else self.teachers[0]

    @property
    def count(self) -> int:
        """Number of rows ``n``."""
        if self.student is not None:
            return self.student.shape[0]
        index = self.teacher_rows[0] if self.teacher_rows else None
        return self.teachers[0].shape[0] if index is None else index.shape[0]


class RowLosses(NamedTuple):
    """Per row, before any weight or denominator.

    Attributes:
        losses: float32 [n] (float64 where any logits are); 0 for rows that are ignored or unusable.
        targets: int64 [n]: the label taught (``label``, ``hard``); for soft divergences the target's argmax
            with statistics, 0 without. ``ignore_index`` for rows that are ignored or unusable.
        entropy: float32 [n], entropy of the target (soft divergences; else 0), 0 for rows not used.
        predicted: int64 [n], argmax of the student (``student_offset``: of the sum) with statistics, else 0;
            lowest index on ties.
    """

    losses: Tensor
    targets: Tensor
    entropy: Tensor
    predicted: Tensor
