"""What :mod:`whp_kernels.losses.triton.linear_loss` launches: tiles, parts of the vocabulary, arguments,
results."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from whp_kernels.losses.linear_rows import LinearRows, LinearState, Projection, Row
from whp_kernels.losses.online import Sum
from whp_kernels.losses.rule import Rule
from whp_kernels.losses.triton.launch import Launch
from whp_kernels.losses.triton.linear_first import linear_first_kernel
from whp_kernels.losses.triton.linear_gradient import linear_gradient_kernel
from whp_kernels.losses.triton.linear_labels import linear_labels_kernel
from whp_kernels.losses.triton.linear_losses import linear_losses_kernel
from whp_kernels.losses.triton.linear_mixture import linear_mixture_kernel


class GemmTile(NamedTuple):
    """What a program multiplies at a time.

    Attributes:
        rows: of hidden states.
        columns: of the vocabulary.
        width: of the slices of both.
        stages: of the pipeline of loads.
        warps: of 32 lanes.
        registers: at most so many a lane; None: the compiler weighs them against occupancy.
    """

    rows: int
    columns: int
    width: int
    stages: int
    warps: int
    registers: int | None = None


class Hardware(NamedTuple):
    """A GPU as far as tiles depend on it.

    Attributes:
        processors: multiprocessors (NVIDIA), compute units (AMD).
        capability: NVIDIA's compute capability, 90 for 9.0; None for AMD.
    """

    processors: int
    capability: int | None


def hardware(device: torch.device) -> Hardware:
    if device.type != "cuda":  # the interpreter
        return Hardware(1, 90)
    properties = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else 10 * properties.major + properties.minor
    return Hardware(properties.multi_processor_count, capability)


def gemm_tile(rows: LinearRows, gpu: Hardware) -> GemmTile:
    """The largest tile that spills no registers and fits the shared memory (``benchmarks/compile_report.py``
    shows both). One tile for all passes of a loss, so that they compute the same logits bit for bit."""
    if any(t.element_size() > 2 for model in rows.models for t in (model.hidden, model.weight)):
        # left alone, the compiler spills some registers for the sake of occupancy
        return GemmTile(32, 32, 32, 2, 8, 255)
    stages = 2 if gpu.capability is None else 3  # AMD has 64 KiB of shared memory
    if rows.hidden is None or _costly(rows):  # labels keep a best logit for each weight
        return GemmTile(64, 64, 64, stages, 8)
    if len(rows.models) == 1 and gpu.capability is not None and gpu.capability < 100:
        return GemmTile(128, 128, 64, stages, 8)
    return GemmTile(64, 128, 64, stages, 8)


def _costly(rows: LinearRows) -> bool:
    """Whether what is done with a tile of logits needs many registers."""
    rule = rows.rule
    return (
        rows.edit_offsets is not None
        or rule.softcap > 0
        or rule.relative_top > 0
        or rule.combination == "student_offset"
    )


def losses(
    rows: LinearRows, state: LinearState, statistics: bool, gpu: Hardware
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The forward pass, and its results: sums [len(Sum), parts, n], logits at the target [parts, n], columns
    [2, parts, n] of the best logits of student and target."""
    tile, n, device = gemm_tile(rows, gpu), rows.count, rows.device
    parts, part = _parts(rows, tile, gpu)
    sums = torch.empty((len(Sum), parts, n), dtype=torch.float32, device=device)
    at_target = torch.empty((parts, n), dtype=torch.float32, device=device)
    columns = torch.empty((2, parts, n), dtype=torch.int32, device=device)
    arguments = (
        _student(rows, gpu)
        | _common(rows, state, tile)
        | {
            "p_labels": rows.labels,
            "p_sums": sums,
            "p_at_target": at_target,
            "p_columns": columns,
            "part": part,
            "weight": rows.rule.weight,
            "log_fraction": _log_fraction(rows),
            "inverse_temperature": 1.0 / rows.rule.temperature,
            "COMBINATION": rows.rule.combination,
            "DIVERGENCE": rows.rule.divergence,
            "TOP": _top(rows),
            "STATISTICS": statistics,
        }
    )
    launch = _launch(linear_losses_kernel, (_blocks(n, tile), parts), arguments, tile, rows.rule.soft)
    return launch, sums, at_target, columns


def mixture(rows: LinearRows, state: LinearState, gpu: Hardware) -> tuple[Launch, Tensor]:
    """The second pass of jsd, and its result [2, parts, n]."""
    tile, n = gemm_tile(rows, gpu), rows.count
    parts, part = _parts(rows, tile, gpu)
    divergences = torch.empty((2, parts, n), dtype=torch.float32, device=rows.device)
    arguments = (
        _student(rows, gpu)
        | _common(rows, state, tile)
        | {
            "p_divergences": divergences,
            "part": part,
            "weight": rows.rule.weight,
            "log_fraction": _log_fraction(rows),
            "beta": rows.rule.beta,
            "inverse_temperature": 1.0 / rows.rule.temperature,
            "COMBINATION": rows.rule.combination,
            "TOP": _top(rows),
        }
    )
    arguments |= {
        f"{name}": int(Row[name]) for name in ("STUDENT_MAX", "STUDENT_SUM", "TARGET_MAX", "TARGET_SUM")
    }
    return _launch(linear_mixture_kernel, (_blocks(n, tile), parts), arguments, tile, True), divergences


def gradient(
    rows: LinearRows,
    state: LinearState,
    row_scale: Tensor,
    d_logits: Tensor,
    block: slice,
    columns: slice,
    gpu: Hardware,
) -> Launch:
    """The gradient of the logits of some rows and columns, into ``d_logits``."""
    if rows.rule.divergence == "hard":  # the labels are known by now, the teachers have said all they had to
        rule = Rule(divergence="label", softcap=rows.rule.softcap)
        rows = dataclasses.replace(rows, teachers=(), edit_offsets=None, edit_tokens=None, rule=rule)
    tile = gemm_tile(rows, gpu)
    arguments = (
        _student(rows, gpu)
        | _common(rows, state, tile)
        | {
            "p_targets": state.targets,
            "p_row_scale": row_scale,
            "p_gradient": d_logits,
            "stride_gradient": d_logits.stride(0),
            "first_row": block.start,
            "last_row": block.stop,
            "first_column": columns.start,
            "last_column": columns.stop,
            "weight": rows.rule.weight,
            "log_fraction": _log_fraction(rows),
            "beta": rows.rule.beta,
            "inverse_temperature": 1.0 / rows.rule.temperature,
            "COMBINATION": rows.rule.combination,
            "DIVERGENCE": rows.rule.divergence,
            "TOP": _top(rows),
        }
    )
    arguments |= {row.name: int(row) for row in Row}
    grid = (_blocks(d_logits.shape[0], tile), triton.cdiv(d_logits.shape[1], tile.columns))
    return _launch(linear_gradient_kernel, grid, arguments, tile, rows.rule.soft)


def first(
    rows: LinearRows, state: LinearState, gpu: Hardware, *, mean: bool, fp_fusion: bool
) -> tuple[Launch, Tensor]:
    """Maxima after the edits, or means before them, of the first teacher's logits, by parts [parts, n]."""
    tile, n = gemm_tile(rows, gpu), rows.count
    parts, part = _parts(rows, tile, gpu)
    results = torch.empty((parts, n), dtype=torch.float32, device=rows.device)
    arguments = _common(rows, state, tile) | {
        "first": _model(rows.teachers[0]),
        "p_results": results,
        "part": part,
        "MEAN": mean,
    }
    if mean:
        arguments |= {"EDIT": "none", "p_edit_offsets": None, "p_edit_tokens": None}
    return _launch(linear_first_kernel, (_blocks(n, tile), parts), arguments, tile, fp_fusion), results


def labels(
    rows: LinearRows, state: LinearState, weights: tuple[float, ...], gpu: Hardware
) -> tuple[Launch, Tensor, Tensor]:
    """The highest target logits [1 + len(weights), parts, n] and their columns, for the first teacher itself
    and for each weight."""
    tile, n = gemm_tile(rows, gpu), rows.count
    parts, part = _parts(rows, tile, gpu)
    shape = (1 + len(weights), parts, n)
    best = torch.empty(shape, dtype=torch.float32, device=rows.device)
    columns = torch.empty(shape, dtype=torch.int32, device=rows.device)
    arguments = _common(rows, state, tile) | {
        **_teachers(rows),
        "p_best": best,
        "p_columns": columns,
        "part": part,
        "weights": tuple(float(weight) for weight in weights),
        "log_fraction": _log_fraction(rows),
        "COMBINATION": rows.rule.combination,
        "TOP": _top(rows),
        "SHARED": _shared(rows, gpu),
        "SETS": triton.next_power_of_2(1 + len(weights)),
    }
    # a * b + c rounded twice, as everywhere else: ties are ties
    return _launch(linear_labels_kernel, (_blocks(n, tile), parts), arguments, tile, False), best, columns


def columns_of_part(rows: LinearRows, gpu: Hardware) -> int:
    """Columns of the vocabulary that a program of a forward pass walks over."""
    return _parts(rows, gemm_tile(rows, gpu), gpu)[1]


def _parts(rows: LinearRows, tile: GemmTile, gpu: Hardware) -> tuple[int, int]:
    """How many parts the vocabulary is walked in, and columns of each: about four programs for each
    multiprocessor, so that the last ones to run leave few of them idle."""
    tiles = triton.cdiv(rows.vocabulary, tile.columns)
    wanted = triton.cdiv(4 * gpu.processors, max(1, _blocks(rows.count, tile)))
    each = triton.cdiv(tiles, min(wanted, tiles))
    return triton.cdiv(tiles, each), each * tile.columns


def _blocks(n: int, tile: GemmTile) -> int:
    return triton.cdiv(n, tile.rows)


def _common(rows: LinearRows, state: LinearState, tile: GemmTile) -> dict:
    widths = {model.hidden.shape[1] for model in rows.models}
    return {
        "p_edit_offsets": rows.edit_offsets,
        "p_edit_tokens": rows.edit_tokens,
        "p_numbers": state.numbers,
        "n": rows.count,
        "V": rows.vocabulary,
        "edit_value": rows.rule.edit_value,
        "softcap": rows.rule.softcap,
        "EDIT": "none" if rows.edit_offsets is None else rows.rule.edit,
        "SOFTCAP": rows.rule.softcap > 0,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "WIDTH": tile.width,
        "EVEN": all(width % tile.width == 0 for width in widths),
        "FIRST_MAX": int(Row.FIRST_MAX),
        "FIRST_MEAN": int(Row.FIRST_MEAN),
    }


def _student(rows: LinearRows, gpu: Hardware) -> dict:
    """The models of a loss; a first teacher that is the student itself is left out."""
    own = bool(rows.teachers) and rows.teachers[0].same_as(rows.student)
    first = {"first": ()} if own else {}
    return {
        "student": _model(rows.student),
        **_teachers(rows),
        **first,
        "SELF": own,
        "SHARED": not own and _shared(rows, gpu),
    }


def _teachers(rows: LinearRows) -> dict:
    teachers = [_model(teacher) for teacher in rows.teachers] + [()] * 3
    return dict(zip(("first", "second", "third"), teachers))


def _model(model: Projection) -> tuple:
    hidden, weight = _rows_of(model.hidden), _rows_of(model.weight)
    bias = () if model.bias is None else (model.bias.contiguous(),)
    return hidden, hidden.stride(0), weight, weight.stride(0), hidden.shape[1], *bias


def _rows_of(values: Tensor) -> Tensor:
    return values if values.stride(1) == 1 or values.shape[1] == 1 else values.contiguous()


def _shared(rows: LinearRows, gpu: Hardware) -> bool:
    """Whether a tile of the head serves all models: their products side by side need more registers and
    shared memory than one after the other."""
    if not _one_head(rows) or gpu.capability is None or rows.models[0].weight.element_size() > 2:
        return False
    if gpu.capability // 10 in (9, 10):
        return True
    return gpu.capability // 10 == 8 and len(rows.models) <= 3 and not _costly(rows)


def _one_head(rows: LinearRows) -> bool:
    """Whether there are several models, and all go through one head."""
    first, *others = rows.models
    return bool(others) and all(m.same_head(first) and m.hidden.dtype == first.hidden.dtype for m in others)


def _top(rows: LinearRows) -> str:
    return rows.rule.outside if rows.rule.relative_top else "none"


def _log_fraction(rows: LinearRows) -> float:
    return math.log(rows.rule.relative_top) if rows.rule.relative_top else 0.0


def _launch(kernel, grid: tuple[int, ...], arguments: dict, tile: GemmTile, fp_fusion: bool) -> Launch:
    return Launch(kernel, grid, arguments, tile.warps, tile.stages, fp_fusion, tile.registers)
