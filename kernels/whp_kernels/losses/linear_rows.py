"""The rows of a loss from hidden states: what :class:`whp_kernels.losses.rows.Rows` is for logits.

An implementation of the mode without stored logits (``store_free``, ``triton.linear_loss``) offers three
functions::

    losses(rows, *, statistics, tile) -> (RowLosses, LinearState)
    gradients(rows, state, row_scale, *, needs_hidden, needs_weight, needs_bias, tile)
        -> (d_hidden, d_weight, d_bias)
    row_labels(rows, weights, *, tile) -> (labels int64 [A, n], own int64 [n])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from whp_kernels.losses.rule import Rule


class Projection(NamedTuple):
    """A model's hidden states and LM head: its logits are ``hidden @ weight.T + bias``.

    Attributes:
        hidden: [n, H], row ``i`` belongs to row ``i`` of the call (gathered by the caller); any strides.
        weight: [V, H]; H may differ from model to model, V may not.
        bias: [V] or None; -inf rules a column out (a padded vocabulary).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def same_as(self, other: Projection) -> bool:
        """Whether the logits are the same because the tensors are: they need be computed only once."""
        return self.same_head(other) and _same(self.hidden, other.hidden)

    def same_head(self, other: Projection) -> bool:
        """Whether both go through one head: a tile of it need be loaded only once for both."""
        return _same(self.weight, other.weight) and _same(self.bias, other.bias)


@dataclass(frozen=True)
class LinearRows:
    """The rows of one call. Rows that are ignored were usually left out before; those that still hold
    ``ignore_index`` are skipped.

    Attributes:
        hidden, weight, bias: the student's, as in :class:`Projection`; None for ``row_labels``.
        teachers: in the combination's order; one may hold the very tensors of the student (``SELF``).
        labels: int64 [n]; required for the divergence ``label``; None means that no row is skipped.
        edit_offsets, edit_tokens: int64 [n + 1] and [M], sorted within rows; None without edits. The tokens
            of row ``i`` are ``edit_tokens[edit_offsets[i]:edit_offsets[i + 1]]``; the first offset may be
            above 0.
        rule: combination, edits, divergence.
        ignore_index: of ``labels``, and the label of rows that cannot be used.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None
    teachers: tuple[Projection, ...] = ()
    labels: Tensor | None = None
    edit_offsets: Tensor | None = None
    edit_tokens: Tensor | None = None
    rule: Rule = field(default_factory=Rule)
    ignore_index: int = -100

    @property
    def student(self) -> Projection | None:
        return None if self.hidden is None else Projection(self.hidden, self.weight, self.bias)

    @property
    def models(self) -> tuple[Projection, ...]:
        """The student (if there is one), then the teachers."""
        return (*(() if self.hidden is None else (self.student,)), *self.teachers)

    @property
    def count(self) -> int:
        """Number of rows ``n``."""
        return self.models[0].hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        """Number of columns ``V``."""
        return self.models[0].weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.models[0].hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """What logits are accumulated and combined in: float64 where any tensor is, else float32."""
        tensors = [t for model in self.models for t in model if t is not None]
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32

    @property
    def kept(self) -> Tensor:
        """bool [n]: the rows whose label is not ``ignore_index``."""
        if self.labels is None:
            return torch.ones(self.count, dtype=torch.bool, device=self.device)
        return self.labels != self.ignore_index


class Row(IntEnum):
    """Which number of a row stands where in :attr:`LinearState.numbers`."""

    STUDENT_MAX = 0  # of what goes into the divergence (with student_offset: the sum)
    STUDENT_SUM = 1  # of exp((logit - STUDENT_MAX) / temperature)
    TARGET_MAX = 2  # soft divergences only, as the next
    TARGET_SUM = 3
    PART = 4  # reverse_kl: the loss; jsd: KL(p_s, m)
    FIRST_MAX = 5  # of the edited first teacher, for relative_top
    FIRST_MEAN = 6  # of the first teacher before its edits, for the edit "mean"
    USED = 7  # 1, or 0 for rows that are ignored or unusable


class LinearState(NamedTuple):
    """What the gradients need from the forward pass: a few numbers a row.

    Attributes:
        numbers: float32 (float64) [len(Row), n], see :class:`Row`.
        targets: int64 [n], the label taught (``label``, ``hard``), else 0.
    """

    numbers: Tensor
    targets: Tensor


def float16_scale(row_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """For products in float16, where a gradient of 1 / (V * tokens) is 0: ``row_scale`` [n] raised by a power
    of two, and before it what undoes that in the results; None and ``row_scale`` itself for other dtypes."""
    if dtype != torch.float16 or not row_scale.numel():
        return None, row_scale
    exponent = torch.floor(torch.log2(row_scale.abs().amax().clamp(min=1e-30)))
    return torch.exp2(exponent), row_scale * torch.exp2(-exponent)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (
        a.device.type != "meta"  # no storage to compare
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )
