"""How teachers' logits become one row of target logits: the first of the two axes of the family.

    combination      teachers    target
    Identity()       v           v
    Whp(alpha)       v_b, v_r    v_b - alpha * relu(v_r - v_b)                     arXiv 2310.02238, section 2
    Offset(weight)   v_b, v_1    v_b + weight * v_1                                ULD, arXiv 2406.08607
                     v_b, v_1, v_2    v_b + weight * (v_1 - v_2)
    StudentOffset(weight)   v_b, v_0    no target: the loss goes through v_b + weight * (student - v_0)
                                                                            delta-unlearning, arXiv 2404.11045

The first teacher may be edited before (:class:`RowEdits`) and filter what follows (:class:`RelativeTop`).
A column that the first teacher rules out (-inf) stays ruled out, whatever the others say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


class _Self:
    def __repr__(self) -> str:
        return "SELF"


SELF = _Self()
"""The student's own logits, without gradient, as the only teacher (CE-U)."""


@dataclass(frozen=True)
class RelativeTop:
    """The columns whose probability under the (edited) first teacher is at least ``fraction`` of its highest.

    Attributes:
        fraction: in (0, 1].
        outside: what becomes of the other columns. ``"keep"``: the first teacher's logit, without the
            combination (ULD: the assistant is zero there). ``"mask"``: -inf (contrastive decoding).
    """

    fraction: float = 0.1
    outside: Literal["keep", "mask"] = "keep"

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RelativeTop: fraction is {self.fraction}, give a number above 0 and up to 1")
        if self.outside not in ("keep", "mask"):
            raise ValueError(f"RelativeTop: outside is {self.outside!r}, give 'keep' or 'mask'")


@dataclass(frozen=True)
class Identity:
    """The teacher as it is. ``relative_top`` can only mask here: there is nothing else to keep."""

    relative_top: RelativeTop | None = None

    def __post_init__(self):
        if self.relative_top is not None and self.relative_top.outside == "keep":
            raise ValueError("Identity: relative_top would change nothing; give RelativeTop(..., 'mask')")


@dataclass(frozen=True)
class Whp:
    """``v_b - alpha * relu(v_r - v_b)`` of the base's and the reinforced model's logits, in this order."""

    alpha: float = 5.0
    relative_top: RelativeTop | None = None


@dataclass(frozen=True)
class Offset:
    """``v_b + weight * (v_1 - v_2)``; with two teachers ``v_b + weight * v_1``."""

    weight: float
    relative_top: RelativeTop | None = None


@dataclass(frozen=True)
class StudentOffset:
    """The loss is that of ``v_b + weight * (student - v_0)``: its gradient reaches the student through the
    sum. Goes with ``divergence="label"`` and the teachers ``(v_b, v_0)``."""

    weight: float = 1.0


Combination = Identity | Whp | Offset | StudentOffset


class RowEdits:
    """Changes of single columns of the first teacher's rows, made before anything else.

    Args:
        offsets: int64 [N + 1]; the tokens of row ``n`` are ``tokens[offsets[n]:offsets[n + 1]]``.
        tokens: int64 [M], vocabulary indices in any order (they are sorted within their rows here).
        kind: ``"add"`` (``value`` is added), ``"ban"`` (-inf), or ``"mean"`` (the row's mean over the whole
            vocabulary, padded columns of -inf included, taken before any edit; behaviour j of the WHP
            reference code).
        value: for ``"add"``. A token listed twice in a row is added to twice.

    Rows are the student's: with gathered teachers (``teacher_rows``), row ``n`` of the edits is applied to
    what was gathered for row ``n``.

    Raises:
        ValueError: offsets that do not span the tokens; on the CPU also negative tokens. (On a GPU looking
            at values would wait for it; tokens outside the vocabulary match no column.)
    """

    def __init__(
        self, offsets: Tensor, tokens: Tensor, kind: Literal["add", "ban", "mean"], value: float = 0.0
    ):
        if kind not in ("add", "ban", "mean"):
            raise ValueError(f"RowEdits: kind is {kind!r}, give 'add', 'ban' or 'mean'")
        if offsets.ndim != 1 or tokens.ndim != 1 or len(offsets) == 0:
            raise ValueError(
                f"RowEdits: expected offsets [N + 1] and tokens [M], got {tuple(offsets.shape)} and "
                f"{tuple(tokens.shape)}"
            )
        if tokens.is_floating_point() or offsets.is_floating_point():
            raise ValueError(
                f"RowEdits: offsets are {offsets.dtype} and tokens {tokens.dtype}, expected integers"
            )
        offsets, tokens = offsets.long(), tokens.long()
        if tokens.device.type == "cpu" and offsets.device.type == "cpu":
            if offsets[0] != 0 or offsets[-1] != len(tokens) or bool((offsets.diff() < 0).any()):
                raise ValueError(
                    f"RowEdits: offsets must rise from 0 to the number of tokens ({len(tokens)}), got "
                    f"{int(offsets[0])} ... {int(offsets[-1])}"
                )
            if len(tokens) and int(tokens.min()) < 0:
                raise ValueError(f"RowEdits: token {int(tokens.min())} is negative")
        self.kind, self.value = kind, float(value)
        self.offsets = offsets.contiguous()
        self.tokens = _sorted_within_rows(self.offsets, tokens)

    @classmethod
    def at_labels(
        cls,
        labels: Tensor,
        kind: Literal["add", "ban", "mean"],
        value: float = 0.0,
        *,
        ignore_index: int = -100,
        shift_labels: bool = False,
    ) -> RowEdits:
        """One edit a row, at the row's label (UNDIAL: ``"add", -beta``; CE-U: ``"ban"``).

        Rows whose label is ``ignore_index`` have none (the port of UNDIAL in OpenUnlearning edits column
        V - 100 there). ``shift_labels`` as in the loss it is made for.
        """
        from whp_kernels.losses.arguments import shifted

        flat = (shifted(labels, ignore_index) if shift_labels else labels).reshape(-1)
        kept = flat != ignore_index
        offsets = torch.zeros(len(flat) + 1, dtype=torch.int64, device=flat.device)
        offsets[1:] = kept.cumsum(0)
        return cls(offsets, flat[kept], kind, value)

    def to(self, device: torch.device | str) -> RowEdits:
        """The same edits on another device; from page-locked memory the copy is not waited for."""
        to_device = torch.device(device).type != "cpu"  # one that comes from there has to be waited for
        return self._like(lambda tensor: tensor.to(device, non_blocking=to_device))

    def pin_memory(self) -> RowEdits:
        """The same edits in page-locked memory."""
        return self._like(Tensor.pin_memory)

    def _like(self, change: Callable[[Tensor], Tensor]) -> RowEdits:
        made = object.__new__(RowEdits)
        made.kind, made.value = self.kind, self.value
        made.offsets, made.tokens = change(self.offsets), change(self.tokens)
        return made

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1


def _sorted_within_rows(offsets: Tensor, tokens: Tensor) -> Tensor:
    if len(tokens) < 2:
        return tokens.contiguous()
    rows = torch.repeat_interleave(offsets.diff(), output_size=len(tokens))
    by_token = torch.argsort(tokens, stable=True)
    return tokens[by_token[torch.argsort(rows[by_token], stable=True)]].contiguous()
