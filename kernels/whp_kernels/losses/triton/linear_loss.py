"""The family from hidden states in the least memory, on GPUs: GEMM tiles with the loss in their epilogue.

The functions are those of :mod:`whp_kernels.losses.store_free` (the definition of this mode), with as many
passes. The forward pass leaves a few numbers a row; the backward pass computes a slice of the vocabulary
anew, rounds its gradient once into a buffer [rows, tile] and multiplies that by head and hidden states in the
matrix library (the default strategy of verl, github.com/volcengine/verl). No atomics: the same inputs give
the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from whp_kernels.gemm import product
from whp_kernels.losses.linear_rows import LinearRows, LinearState, Row, float16_scale
from whp_kernels.losses.online import Sum, loss_and_entropy, merged
from whp_kernels.losses.reference import first_argmax
from whp_kernels.losses.rows import RowLosses
from whp_kernels.losses.store_free import _mean_logit
from whp_kernels.losses.triton import linear_launch as launches

ROW_BLOCK = 8192
"""Rows of the buffer that holds a slice of the logits' gradient."""

WEIGHTS_AT_ONCE = 3
"""Weights of the combination that one pass takes labels for, beside the first teacher's own."""


def losses(rows: LinearRows, *, statistics: bool, tile: int = 2048) -> tuple[RowLosses, LinearState]:
    """See :func:`whp_kernels.losses.store_free.losses`; ``tile`` matters for the gradients only.

    Raises:
        ValueError: float64, which only eager torch computes with.
    """
    rule, device, gpu = rows.rule, rows.device, launches.hardware(rows.device)
    state = _new_state(rows, fp_fusion=rule.soft)
    usable = rows.kept
    launch, sums, at_target, columns = launches.losses(rows, state, statistics, gpu)
    launch.run(device)
    whole = merged(sums, rule)
    state.numbers[:4] = whole[:4]
    at_student, at_teacher = first_argmax(sums[Sum.STUDENT_MAX].t()), first_argmax(sums[Sum.TARGET_MAX].t())
    predicted = _at(columns[0], at_student).long() if statistics else torch.zeros_like(state.targets)
    best = _at(columns[1], at_teacher).long()
    if rule.combination != "none":
        usable &= torch.isfinite(whole[Sum.TARGET_MAX]) & ~whole[Sum.TARGET_SUM].isnan()
    state.numbers[Row.USED].copy_(usable)
    if not rule.soft:
        part = at_teacher
        if rule.divergence == "label":
            best = rows.labels
            part = best.div(launches.columns_of_part(rows, gpu), rounding_mode="floor").clamp(
                0, sums.shape[1] - 1
            )
        values = whole[Sum.STUDENT_SUM].log() - (_at(at_target, part) - whole[Sum.STUDENT_MAX])
        entropy, targets = torch.zeros_like(values), best
        state.targets.copy_(torch.where(usable, targets, 0))
    else:
        values, entropy = loss_and_entropy(whole, rule)
        targets = best if statistics else torch.zeros_like(best)
        if rule.divergence == "jsd":
            launch, divergences = launches.mixture(rows, state, gpu)
            launch.run(device)
            student_part, target_part = divergences.sum(1)
            values = rule.beta * target_part + (1 - rule.beta) * student_part
            state.numbers[Row.PART].copy_(student_part)
        else:
            state.numbers[Row.PART].copy_(values)
    if statistics:
        predicted = torch.where(torch.isnan(whole[Sum.STUDENT_SUM]), 0, predicted)
    return RowLosses(
        torch.where(usable, values, 0.0),
        torch.where(usable, targets, rows.ignore_index),
        torch.where(usable, entropy, 0.0),
        predicted,
    ), state


def gradients(
    rows: LinearRows,
    state: LinearState,
    row_scale: Tensor,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    tile: int = 2048,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See :func:`whp_kernels.losses.store_free.gradients`; ``tile`` is the number of columns of the buffer,
    rounded up to whole tiles."""
    n, vocabulary, device = rows.count, rows.vocabulary, rows.device
    gpu = launches.hardware(device)
    # tiles that lie where those of the forward pass lay: their logits are the same, bit for bit
    columns_of_tile = launches.gemm_tile(rows, gpu).columns
    tile = -(-tile // columns_of_tile) * columns_of_tile
    dtype = rows.hidden.dtype if rows.hidden.dtype == rows.weight.dtype else torch.float32
    floats = {"dtype": torch.float32, "device": device}
    d_hidden = torch.zeros(rows.hidden.shape, **floats) if needs_hidden else None
    d_weight = torch.zeros(rows.weight.shape, **floats) if needs_weight else None
    d_bias = torch.zeros(vocabulary, **floats) if needs_bias else None
    shift, row_scale = float16_scale(row_scale.float(), dtype)
    buffer = torch.empty(min(n, ROW_BLOCK) * min(tile, vocabulary), dtype=dtype, device=device)
    for start in range(0, vocabulary, tile):
        columns = slice(start, min(start + tile, vocabulary))
        head = rows.weight[columns].to(dtype)
        for first in range(0, n, ROW_BLOCK):
            block = slice(first, min(first + ROW_BLOCK, n))
            hidden, width = rows.hidden[block].to(dtype), len(head)
            d_logits = buffer[: len(hidden) * width].view(len(hidden), width)
            launches.gradient(rows, state, row_scale, d_logits, block, columns, gpu).run(device)
            if needs_hidden:
                product(d_logits, head, out_dtype=torch.float32, out=d_hidden[block], accumulate=True)
            if needs_weight:
                product(d_logits.t(), hidden, out_dtype=torch.float32, out=d_weight[columns], accumulate=True)
            if needs_bias:
                d_bias[columns] += d_logits.sum(0, dtype=torch.float32)
    if shift is not None:
        for values in (d_hidden, d_weight, d_bias):
            if values is not None:
                values.mul_(shift)
    if d_hidden is not None and rows.hidden.dtype != torch.float16:
        d_hidden = d_hidden.to(rows.hidden.dtype)
    return d_hidden, d_weight, d_bias


def row_labels(rows: LinearRows, weights: Sequence[float], *, tile: int = 2048) -> tuple[Tensor, Tensor]:
    """See :func:`whp_kernels.losses.store_free.row_labels`; ``tile`` has no meaning here."""
    rows = dataclasses.replace(rows, hidden=None, weight=None, bias=None)
    state = _new_state(rows, fp_fusion=False)
    labels = torch.empty((len(weights), rows.count), dtype=torch.int64, device=rows.device)
    for start in range(0, max(1, len(weights)), WEIGHTS_AT_ONCE):
        group = slice(start, start + WEIGHTS_AT_ONCE)
        launch, best, columns = launches.labels(
            rows, state, tuple(weights[group]), launches.hardware(rows.device)
        )
        launch.run(rows.device)
        # NaN where a part holds one
        usable = rows.kept & ~best.isnan().any(1) & torch.isfinite(best.amax(1))
        part = first_argmax(best.transpose(1, 2))
        chosen = columns.gather(1, part.unsqueeze(1)).squeeze(1)
        chosen = torch.where(usable, chosen.long(), rows.ignore_index)
        labels[group], own = chosen[1:], chosen[0]
    return labels, own


def _new_state(rows: LinearRows, *, fp_fusion: bool) -> LinearState:
    """An empty state, but for what the first pass over the vocabulary has to know of the first teacher."""
    if rows.dtype == torch.float64:
        raise ValueError(
            "the Triton kernels compute in float32, but float64 tensors are given; use impl='reference'"
        )
    gpu = launches.hardware(rows.device)
    numbers = torch.zeros(len(Row), rows.count, dtype=torch.float32, device=rows.device)
    state = LinearState(numbers, torch.zeros(rows.count, dtype=torch.int64, device=rows.device))
    if rows.rule.edit == "mean" and rows.edit_offsets is not None:
        if rows.rule.softcap:
            launch, sums = launches.first(rows, state, gpu, mean=True, fp_fusion=fp_fusion)
            launch.run(rows.device)
            torch.sum(sums, 0, out=numbers[Row.FIRST_MEAN])
        else:
            numbers[Row.FIRST_MEAN] = _mean_logit(rows.teachers[0], rows.dtype, 4096)
    if rows.rule.relative_top:
        launch, maxima = launches.first(rows, state, gpu, mean=False, fp_fusion=fp_fusion)
        launch.run(rows.device)
        numbers[Row.FIRST_MAX] = maxima.amax(0)
    return state


def _at(values: Tensor, part: Tensor) -> Tensor:
    """``values[part[i], i]``."""
    return values.gather(0, part.unsqueeze(0)).squeeze(0)
