"""The row functions on NVIDIA and AMD GPUs; the contract is in :mod:`whp_kernels.losses.rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.triton.launch import Launch
from whp_kernels.losses.triton.row_labels import row_labels_kernel
from whp_kernels.losses.triton.row_losses import row_losses_kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowTile(NamedTuple):
    """Columns that a program reads at once, its warps of 32 lanes, and a limit of registers a lane."""

    block: int
    warps: int
    registers: int | None = None


# 8 columns a lane: one load of 16 bytes for each 16-bit tensor, two for float32. No kernel spills then
# (benchmarks/compile_report.py); with 16 columns a lane it takes twice the registers.
#
# Losses read a row twice, and the second time it should still be in the L2 cache. Programs of 16 warps with
# 40 to 60 registers a lane let 2 or 3 of them onto a multiprocessor: at V = 32000 three bfloat16 rows are 192
# KB, so two on each of 132 multiprocessors are 50 MB, an H100's L2 (A100: 41 of 40 MB). Rows of float32 are
# twice that, so one program a multiprocessor is enough, and it may have all of the registers (512 lanes x
# 128). Labels read a row once: smaller programs, of which more run at a time and end at different moments.
LOSS_TILE = RowTile(4096, 16)
LOSS_TILE_FLOAT32 = RowTile(4096, 16, 128)
LABEL_TILE = RowTile(2048, 8)
NARROW_TILE = RowTile(1024, 4)  # rows of up to 2048 columns would leave half of the lanes without work


def loss_tile(tensors: Sequence[Tensor]) -> RowTile:
    """The tile of :func:`row_losses` for these logits [n, V] and gradient."""
    if tensors[0].shape[1] <= 2048:
        return NARROW_TILE
    return LOSS_TILE if _group(tensors) == 8 else LOSS_TILE_FLOAT32


def label_tile(tensors: Sequence[Tensor]) -> RowTile:
    """The tile of :func:`row_labels` for these logits [n, V]."""
    return NARROW_TILE if tensors[0].shape[1] <= 2048 else LABEL_TILE


def row_labels(rows: Rows, weights: Sequence[float], *, tile: RowTile | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`whp_kernels.losses.reference.row_labels`. ``tile`` is for benchmarks.

    Raises:
        ValueError: a dtype or layout that the kernel does not take.
    """
    first = rows.teachers[0]
    chosen = torch.empty((len(weights), rows.count), dtype=torch.int64, device=first.device)
    own = torch.empty(rows.count, dtype=torch.int64, device=first.device)
    row_labels_launch(rows, weights, chosen, own, tile).run(first.device)
    return chosen, own


def row_losses(
    rows: Rows,
    *,
    statistics: bool = False,
    row_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    tile: RowTile | None = None,
) -> RowLosses:
    """See :func:`whp_kernels.losses.reference.row_losses`. ``tile`` is for benchmarks.

    Raises:
        ValueError: a dtype or layout that the kernel does not take, or a gradient over what is still read.
    """
    n, device = rows.count, rows.student.device
    results = RowLosses(
        torch.empty(n, dtype=torch.float32, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.float32, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
    )
    row_losses_launch(rows, results, statistics, row_scale, gradient, tile).run(device)
    return results


def row_labels_launch(
    rows: Rows, weights: Sequence[float], chosen: Tensor, own: Tensor, tile: RowTile | None = None
) -> Launch:
    """What :func:`row_labels` runs."""
    _check(rows.teachers)
    _check_rows(rows)
    tile = tile or label_tile(rows.teachers)
    arguments = _common_arguments(rows) | {
        "p_chosen": chosen,
        "stride_chosen": chosen.stride(0),
        "p_own": own,
        "weights": tuple(float(weight) for weight in weights) or (0.0,),
        "TARGET": len(weights) > 0,
        "BLOCK": tile.block,
        "GROUP": _group(rows.teachers),
    }
    programs = rows.count * max(len(weights), 1)
    # a * b + c rounded twice, as everywhere else: the labels are bit for bit those of the other backends
    return Launch(
        row_labels_kernel, (programs,), arguments, tile.warps, fp_fusion=False, registers=tile.registers
    )


def row_losses_launch(
    rows: Rows,
    results: RowLosses,
    statistics: bool = False,
    row_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    tile: RowTile | None = None,
) -> Launch:
    """What :func:`row_losses` runs."""
    rule = rows.rule
    tensors = [rows.student, *rows.teachers, *([] if gradient is None else [gradient])]
    _check(tensors)
    _check_rows(rows)
    if gradient is not None:
        _check_gradient(rows, row_scale, gradient)
    tile = tile or loss_tile(tensors)
    arguments = _common_arguments(rows) | {
        "p_student": rows.student,
        "stride_student": rows.student.stride(0),
        "p_row_scale": None if gradient is None else row_scale.contiguous(),
        "p_gradient": gradient,
        "stride_gradient": 0 if gradient is None else gradient.stride(0),
        "p_losses": results.losses,
        "p_targets": results.targets,
        "p_entropy": results.entropy,
        "p_predicted": results.predicted,
        "weight": rule.weight,
        "beta": rule.beta,
        "inverse_temperature": 1.0 / rule.temperature,
        "DIVERGENCE": rule.divergence,
        "STATISTICS": statistics,
        "BLOCK": tile.block,
        "GROUP": _group(tensors),
    }
    # index targets are those of row_labels, bit for bit
    return Launch(
        row_losses_kernel, (rows.count,), arguments, tile.warps, fp_fusion=rule.soft, registers=tile.registers
    )


def _common_arguments(rows: Rows) -> dict:
    rule = rows.rule
    arguments = {
        "p_labels": None if rows.labels is None else rows.labels.contiguous(),
        "p_edit_offsets": rows.edit_offsets,
        "p_edit_tokens": rows.edit_tokens,
        "V": rows.first.shape[1],
        "ignore_index": rows.ignore_index,
        "edit_value": rule.edit_value,
        "log_fraction": math.log(rule.relative_top) if rule.relative_top else 0.0,
        "softcap": rule.softcap,
        "COMBINATION": rule.combination,
        "EDIT": "none" if rows.edit_offsets is None else rule.edit,
        "TOP": rule.outside if rule.relative_top else "none",
        "SOFTCAP": rule.softcap > 0,
    }
    for k, name in enumerate(("first", "second", "third")):
        teacher = rows.teachers[k] if k < len(rows.teachers) else None
        index = rows.teacher_rows[k] if k < len(rows.teacher_rows) else None
        arguments[f"p_{name}"] = teacher
        arguments[f"stride_{name}"] = 0 if teacher is None else teacher.stride(0)
        arguments[f"p_{name}_rows"] = None if index is None else index.contiguous()
    return arguments


def _group(tensors: Sequence[Tensor]) -> int:
    """Adjacent columns of a thread: 16 bytes of the widest dtype, so that all tensors are laid out alike."""
    return 16 // max(tensor.element_size() for tensor in tensors)


def _check(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"the Triton backend takes float32, bfloat16 or float16 logits, got {tensor.dtype}"
            )
        if tensor.ndim != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1) or tensor.stride(0) < 0:
            raise ValueError(
                f"logits must be [n, V] with adjacent columns, got shape {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}"
            )


def _check_rows(rows: Rows) -> None:
    if rows.first.shape[1] == 0:
        raise ValueError("the logits have no columns")
    if rows.rule.divergence == "label" and rows.student is not None and rows.labels is None:
        raise ValueError("divergence='label' needs labels, int64 [n]")
    for k, teacher in enumerate(rows.teachers):
        if rows.count > 0 and teacher.shape[0] == 0:
            raise ValueError(f"teacher {k} has no rows, but {rows.count} are asked for")


def _check_gradient(rows: Rows, row_scale: Tensor | None, gradient: Tensor) -> None:
    if row_scale is None:
        raise ValueError("a gradient needs row_scale, float32 [n]")
    for k, tensor in enumerate((rows.student, *rows.teachers)):
        if tensor.data_ptr() != gradient.data_ptr() or gradient.device.type == "meta":
            continue
        if (tensor.dtype, tensor.stride(0)) != (gradient.dtype, gradient.stride(0)):
            raise ValueError(
                f"the gradient ({gradient.dtype}, row stride {gradient.stride(0)}) is written over logits of "
                f"another layout ({tensor.dtype}, row stride {tensor.stride(0)}); give it memory of its own"
            )
        if k > 0 and k <= len(rows.teacher_rows) and rows.teacher_rows[k - 1] is not None:
            raise ValueError(
                f"the gradient is written over teacher {k - 1}, whose rows are gathered; give it memory of "
                "its own"
            )
