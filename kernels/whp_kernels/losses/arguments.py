"""Checks and shapes shared by the public functions: leading dimensions, shifted labels, weights,
denominators."""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.losses.combination import SELF, Combination, Identity, Offset, StudentOffset, Whp

IGNORE_INDEX = -100
REDUCTIONS = ("none", "mean", "sum")
TEACHER_COUNTS = {Identity: (1,), Whp: (2,), Offset: (2, 3), StudentOffset: (2,)}


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels aligned with ``input_ids`` [..., T] moved so that position ``t`` holds what its output is
    taught, ``labels[..., t + 1]``; the last position is ignored."""
    end = torch.full_like(labels[..., :1], ignore_index)
    return torch.cat([labels[..., 1:], end], dim=-1)


def flat_rows(name: str, values: Tensor, *, in_place: bool = False) -> Tensor:
    """[..., V] as [N, V] with adjacent columns, without a copy where strides allow.

    Raises:
        ValueError: a DTensor, less than two dimensions, or a copy that ``in_place`` forbids.
    """
    refuse_dtensor(name, values)
    if values.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected at least two dimensions [..., V]")
    if not values.is_floating_point():
        raise ValueError(f"{name} is {values.dtype}, expected floating point numbers")
    if values.stride(-1) == 1 or values.shape[-1] == 1:
        try:
            return values.view(-1, values.shape[-1]) if values.ndim > 2 else values
        except RuntimeError:  # e.g. logits[:, :-1] of a batch: rows are not evenly spaced
            pass
    if in_place:
        raise ValueError(
            f"inplace=True needs {name} whose rows are evenly spaced, but strides are {values.stride()} "
            f"for shape {tuple(values.shape)}; pass all positions with shift_labels=True instead of "
            "logits[:, :-1]"
        )
    return values.reshape(-1, values.shape[-1]).contiguous()


def refuse_dtensor(name: str, values: Tensor) -> None:
    """Raise ValueError for a DTensor: a shard is not the matrix the formula speaks of."""
    if hasattr(values, "placements") and hasattr(values, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor ({tuple(values.placements)}); pass {name}.full_tensor(), or call the loss "
            "inside the forward of the module that owns it, where fully_shard has gathered it"
        )


def flat_labels(
    labels: Tensor | None, lead: torch.Size, *, shift_labels: bool, ignore_index: int, required: bool
) -> Tensor | None:
    """Labels [...] as int64 [N], shifted if they are aligned with the input.

    Raises:
        ValueError: missing labels, another shape than the rows', or no integers.
    """
    if labels is None:
        if required or shift_labels:
            what = "shift_labels" if shift_labels else "divergence='label'"
            raise ValueError(f"{what} needs labels, but labels is None")
        return None
    if labels.shape != lead:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, but there are rows {tuple(lead)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, expected integers")
    labels = labels.long()
    return (shifted(labels, ignore_index) if shift_labels else labels).reshape(-1)


def check_label_range(labels: Tensor | None, vocabulary: int, ignore_index: int | None) -> None:
    """Raise ValueError for labels outside the vocabulary. On the CPU only: elsewhere it would wait for the
    device (there such a label makes the loss NaN or infinite)."""
    if labels is None or labels.device.type != "cpu" or not len(labels):
        return
    values = labels.detach().numpy()
    wrong = (values < 0) | (values >= vocabulary)
    if ignore_index is not None:
        wrong &= values != ignore_index
    if wrong.any():
        raise ValueError(
            f"labels hold {values[wrong][0]}, but the vocabulary has {vocabulary} entries and ignore_index "
            f"is {ignore_index}"
        )


def check_combination(combination: Combination | None, teachers) -> Combination | None:
    """The combination, ``Identity()`` where one teacher is given without; its number of teachers fits.

    Raises:
        ValueError: teachers without a combination, or another number than it takes.
    """
    if isinstance(teachers, Tensor):
        raise ValueError("teachers is one tensor; give a tuple, for one teacher (teacher,)")
    count = 1 if teachers is SELF else len(teachers)
    if combination is None:
        if count == 0:
            return None
        if count > 1:
            raise ValueError(f"{count} teachers are given, but no combination; e.g. combination=Whp(5.0)")
        return Identity()
    if teachers is SELF and not isinstance(combination, Identity):
        raise ValueError(f"teachers=SELF goes with Identity(), not with {combination!r}")
    takes = TEACHER_COUNTS.get(type(combination))
    if takes is None:
        raise ValueError(f"combination is {combination!r}, expected Identity, Whp, Offset or StudentOffset")
    if count not in takes:
        raise ValueError(
            f"{type(combination).__name__} takes {' or '.join(map(str, takes))} teachers, got {count}"
        )
    return combination


def check_teacher_rows(teacher_rows, count: int, rows: int, devices) -> list[Tensor | None]:
    """One index or None for each teacher, int64 [N].

    Raises:
        ValueError: another number of them or of rows.
    """
    if teacher_rows is None:
        return [None] * count
    if isinstance(teacher_rows, Tensor):
        teacher_rows = (teacher_rows,)
    if len(teacher_rows) != count:
        raise ValueError(f"teacher_rows has {len(teacher_rows)} entries for {count} teachers")
    flat = [None if index is None else index.reshape(-1).long().to(devices) for index in teacher_rows]
    for index in flat:
        if index is not None and len(index) != rows:
            raise ValueError(f"teacher_rows has {len(index)} entries, but the student has {rows} rows")
    return flat


def check_teacher(k: int, rows: int, vocabulary: int, teacher_vocabulary: int, index, n: int) -> None:
    """Raise ValueError where a teacher's rows or vocabulary do not fit the student's."""
    if teacher_vocabulary != vocabulary:
        raise ValueError(
            f"teacher {k} has a vocabulary of {teacher_vocabulary}, the student one of {vocabulary}; "
            "they must share it"
        )
    if index is None and rows != n:
        raise ValueError(f"teacher {k} has {rows} rows, the student {n}; give teacher_rows to gather them")


def check_edits(row_edits, rows: int) -> None:
    if row_edits is not None and len(row_edits) != rows:
        raise ValueError(f"row_edits speak of {len(row_edits)} rows, but there are {rows}")


def row_scales(
    labels: Tensor | None,
    teacher_rows: list[Tensor | None],
    weights: Tensor | None,
    *,
    lead: torch.Size,
    like: Tensor,
    reduction: str,
    num_items_in_batch: int | float | Tensor | None,
    ignore_index: int | None,
) -> Tensor:
    """What the loss of each row is multiplied with before the sum: float32 [N] (float64 beside float64).

    ``mean`` divides by ``num_items_in_batch``, or by the number of rows that are not ignored (whatever their
    weights). No value is read back from the device.

    Raises:
        ValueError: an unknown reduction, weights of another shape, a denominator without ``mean``.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, give one of {', '.join(REDUCTIONS)}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch is the denominator of reduction='mean', not of {reduction!r}")
    if isinstance(num_items_in_batch, (int, float)) and not num_items_in_batch > 0:
        raise ValueError(f"num_items_in_batch is {num_items_in_batch}, give a number above 0")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    count = lead.numel()
    kept = torch.ones(count, dtype=torch.bool, device=like.device)
    if labels is not None and ignore_index is not None:
        kept = kept & (labels != ignore_index)
    for index in teacher_rows:
        if index is not None:
            kept = kept & (index >= 0)
    scale = kept.to(dtype)
    if weights is not None:
        if weights.shape != lead:
            raise ValueError(f"weights have shape {tuple(weights.shape)}, but there are rows {tuple(lead)}")
        scale = scale * weights.detach().reshape(-1).to(scale)
    if reduction == "mean":
        items = num_items_in_batch
        if items is None:
            items = kept.sum().clamp(min=1)
        scale = scale / (items.to(scale) if isinstance(items, Tensor) else float(items))
    return scale
