"""The row losses on the CPU, compiled: AVX-512, AVX2 or any processor, chosen at run time (csrc/cpu).

Inputs are read from memory once and the gradient is written once; beside them a thread holds one to three
rows in float32. ``WHP_KERNELS_ISA`` (``avx512``, ``avx2``, ``portable``) asks for another instruction set
than the best.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from whp_kernels import extension
from whp_kernels.losses.rows import RowLosses, Rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_labels(rows: Rows, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Labels int64 [A, n] for each weight of the combination, and the edited first teacher's own argmax
    int64 [n]; see :func:`whp_kernels.losses.reference.row_labels`.

    Raises:
        ValueError: logits of another dtype than float32, bfloat16 or float16, or not on the CPU; labels or
            rows outside; the extension is missing.
    """
    ops = _operators()
    _check(rows)
    sets = torch.empty((len(weights), rows.count), dtype=torch.int64)
    own = torch.empty(rows.count, dtype=torch.int64)
    ops.row_labels(rows.count, *_target(rows), [float(weight) for weight in weights], sets, own)
    return sets, own


def row_losses(
    rows: Rows, *, statistics: bool = False, row_scale: Tensor | None = None, gradient: Tensor | None = None
) -> RowLosses:
    """The loss of each row and, if ``gradient`` is given, its gradient times ``row_scale`` written there; see
    :func:`whp_kernels.losses.reference.row_losses`. ``gradient`` may be the student itself.

    Raises:
        ValueError: as :func:`row_labels`; a gradient that is written while other rows still read it.
    """
    ops = _operators()
    _check(rows)
    n, rule = rows.count, rows.rule
    if gradient is not None:
        _check_logits(gradient, "gradient")
        _check_overlap(rows, gradient)
        row_scale = row_scale.to(torch.float32).contiguous()
    losses, entropy = torch.empty(n, dtype=torch.float32), torch.empty(n, dtype=torch.float32)
    targets = torch.empty(n, dtype=torch.int64)
    predicted = torch.empty(n, dtype=torch.int64) if statistics else torch.zeros(n, dtype=torch.int64)
    ops.row_losses(
        rows.student.detach(),
        *_target(rows),
        rule.divergence,
        rule.beta,
        rule.temperature,
        statistics,
        None if gradient is None else row_scale,
        gradient,
        losses,
        targets,
        entropy,
        predicted,
    )
    return RowLosses(losses, targets, entropy, predicted)


def isa() -> str:
    """The instruction set that the next call uses."""
    return _operators().cpu_isa()


def isas() -> list[str]:
    """The instruction sets of this machine, the best first."""
    return _operators().cpu_isas().split()


def _operators():
    if extension.load() is None:
        raise ValueError(extension.reason())
    asked = os.environ.get("WHP_KERNELS_ISA", "")
    if asked and asked not in torch.ops.whp_kernels_C.cpu_isas().split():
        found = ", ".join(torch.ops.whp_kernels_C.cpu_isas().split())
        raise ValueError(f"WHP_KERNELS_ISA is {asked!r}; this machine has {found}")
    return torch.ops.whp_kernels_C


def _target(rows: Rows) -> tuple:
    """The arguments that both operators share, in the order of their schemas."""
    rule = rows.rule
    empty = torch.empty(0, dtype=torch.int64)  # stands for: the same row
    indices = [None if index is None else index.contiguous() for index in rows.teacher_rows]
    return (
        [teacher.detach() for teacher in rows.teachers],
        [empty if index is None else index for index in indices] or [empty] * len(rows.teachers),
        None if rows.labels is None else rows.labels.contiguous(),
        None if rows.edit_offsets is None else rows.edit_offsets.contiguous(),
        None if rows.edit_tokens is None else rows.edit_tokens.contiguous(),
        rows.ignore_index,
        rule.combination,
        rule.weight,
        rule.relative_top,
        rule.outside,
        rule.edit,
        rule.edit_value,
        rule.softcap,
    )


def _check(rows: Rows) -> None:
    if rows.student is not None:
        _check_logits(rows.student, "student")
    for k, teacher in enumerate(rows.teachers):
        _check_logits(teacher, f"teacher {k}")
        index = rows.teacher_rows[k] if rows.teacher_rows else None
        if index is not None and len(index) and int(index.max()) >= len(teacher):
            raise ValueError(
                f"teacher_rows[{k}] holds {int(index.max())}, but teacher {k} has {len(teacher)} rows"
            )
    if rows.rule.divergence == "label" and rows.student is not None:
        labels = rows.labels.numpy()
        kept = labels[labels != rows.ignore_index]
        if len(kept) and not 0 <= kept.min() <= kept.max() < rows.first.shape[1]:
            raise ValueError(
                f"labels run from {kept.min()} to {kept.max()}, outside the vocabulary of "
                f"{rows.first.shape[1]}"
            )


def _check_logits(logits: Tensor, name: str) -> None:
    if logits.device.type != "cpu" or logits.dtype not in _DTYPES:
        raise ValueError(
            f"impl='cpp' needs {name} in float32, bfloat16 or float16 on the CPU, got {logits.dtype} on "
            f"{logits.device}; use impl='reference'"
        )
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"{name}: columns must be adjacent, but their stride is {logits.stride(1)}; use .contiguous()"
        )


def _check_overlap(rows: Rows, gradient: Tensor) -> None:
    """Rows are worked on at the same time: one that is written must not be another one's input."""
    if len(gradient) > 1 and gradient.stride(0) < gradient.shape[1]:
        raise ValueError(f"gradient: rows overlap (row stride {gradient.stride(0)}); give memory of its own")
    for k, teacher in enumerate(rows.teachers):
        gathered = bool(rows.teacher_rows) and rows.teacher_rows[k] is not None
        if gathered and teacher.data_ptr() == gradient.data_ptr():
            raise ValueError(
                f"gradient shares its memory with teacher {k}, whose rows are gathered; give it its own"
            )
