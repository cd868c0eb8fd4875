"""The loss from hidden states, a chunk of rows at a time: matrix products by the library, rows by the row
kernels.

For each chunk: float32 logits of the student and the teachers from the accumulators of their products, the
row kernel (which leaves the gradient in the dtype of the products), then ``d_hidden = d_logits W`` and
``d_weight += d_logits^T hidden``. Five products where there are two teachers and the head is trained; forming
the gradient in the forward pass (the idea of efficient_cross_entropy, github.com/mgmalek) saves their
recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whp_kernels.gemm import product
from whp_kernels.losses.dispatch import backend
from whp_kernels.losses.linear_rows import LinearRows, Projection, float16_scale
from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.statistics import token_set_probability


class LinearGradients(NamedTuple):
    """``hidden`` [n, H] in the hidden states' dtype (float32 for float16), ``weight`` [V, H] and ``bias`` [V]
    in float32 (float64 beside float64); None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def losses_and_gradients(
    rows: LinearRows,
    *,
    statistics: bool,
    row_scale: Tensor | None,
    needs: tuple[bool, bool, bool],
    token_set: Tensor | None,
    compute_dtype: torch.dtype | None,
    chunk_mib: int,
    impl: str,
) -> tuple[RowLosses, Tensor | None, LinearGradients]:
    """Per-row losses [n], the probability [n] of ``token_set``, and the gradients of
    ``sum(row_scale * losses)`` with respect to hidden states, weight and bias as ``needs`` says."""
    n, vocabulary, device = rows.count, rows.vocabulary, rows.device
    compute = compute_dtype or torch.promote_types(rows.hidden.dtype, rows.weight.dtype)
    wide = torch.float64 if compute == torch.float64 else torch.float32
    head = rows.weight.to(compute)
    heads = [_head(teacher, compute_dtype) for teacher in rows.teachers]
    is_self = [teacher.same_as(rows.student) for teacher in rows.teachers]
    shift = None
    if row_scale is not None:
        shift, row_scale = float16_scale(row_scale, compute)
    d_hidden_dtype = torch.float32 if rows.hidden.dtype == torch.float16 else rows.hidden.dtype
    d_hidden = torch.empty(rows.hidden.shape, dtype=d_hidden_dtype, device=device) if needs[0] else None
    make = torch.empty if n else torch.zeros  # the first chunk writes it, the others add to it
    d_weight = make(rows.weight.shape, dtype=wide, device=device) if needs[1] else None
    d_bias = torch.zeros(vocabulary, dtype=wide, device=device) if needs[2] else None

    separate_gradient = any(needs) and compute != wide
    row_bytes = vocabulary * wide.itemsize * (1 + len(heads) - sum(is_self))
    row_bytes += vocabulary * compute.itemsize * separate_gradient
    size = chunk_rows(n, row_bytes, chunk_mib)
    student_buffer = torch.empty((size, vocabulary), dtype=wide, device=device)
    teacher_buffers = [None if own else torch.empty_like(student_buffer) for own in is_self]
    gradient_buffer = (
        torch.empty((size, vocabulary), dtype=compute, device=device) if separate_gradient else None
    )

    parts, probabilities = [], []
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        count = part.stop - part.start
        hidden = rows.hidden[part].to(compute)
        student = logits(hidden, head, rows.bias, student_buffer[:count])
        teachers = tuple(
            student
            if is_self[k]
            else logits(
                teacher.hidden[part].to(heads[k].dtype), heads[k], teacher.bias, teacher_buffers[k][:count]
            )
            for k, teacher in enumerate(rows.teachers)
        )
        chunk = _chunk(rows, part, student, teachers)
        if token_set is not None:
            probabilities.append(token_set_probability(student, token_set, rows.rule.softcap, impl))
        gradient = None
        if any(needs):
            gradient = gradient_buffer[:count] if separate_gradient else student
        parts.append(
            backend(impl, chunk).row_losses(
                chunk,
                statistics=statistics,
                row_scale=None if gradient is None else row_scale[part],
                gradient=gradient,
            )
        )
        if needs[0]:
            product(gradient, head, out_dtype=d_hidden_dtype, out=d_hidden[part])
        if needs[1]:
            product(gradient.t(), hidden, out_dtype=wide, out=d_weight, accumulate=start > 0)
        if needs[2]:
            d_bias += gradient.sum(dim=0, dtype=wide)
    if shift is not None:
        for values in (d_hidden, d_weight, d_bias):
            if values is not None:
                values.mul_(shift)
    return (
        RowLosses(*(torch.cat(values) for values in zip(*parts))) if parts else _no_rows(rows.hidden, wide),
        torch.cat(probabilities) if probabilities else None,
        LinearGradients(d_hidden, d_weight, d_bias),
    )


def row_labels(
    rows: LinearRows,
    weights: Sequence[float],
    *,
    compute_dtype: torch.dtype | None,
    chunk_mib: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Argmax labels int64 [A, n] and the first teacher's own argmax int64 [n]."""
    n, vocabulary, device = rows.count, rows.vocabulary, rows.device
    heads = [_head(teacher, compute_dtype) for teacher in rows.teachers]
    wide = torch.float64 if any(head.dtype == torch.float64 for head in heads) else torch.float32
    size = chunk_rows(n, vocabulary * wide.itemsize * len(heads), chunk_mib)
    buffers = [torch.empty((size, vocabulary), dtype=wide, device=device) for _ in heads]
    labels = torch.empty((len(weights), n), dtype=torch.int64, device=device)
    own = torch.empty(n, dtype=torch.int64, device=device)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        teachers = tuple(
            logits(
                teacher.hidden[part].to(heads[k].dtype),
                heads[k],
                teacher.bias,
                buffers[k][: part.stop - part.start],
            )
            for k, teacher in enumerate(rows.teachers)
        )
        chunk = _chunk(rows, part, None, teachers)
        labels[:, part], own[part] = backend(impl, chunk).row_labels(chunk, weights)
    return labels, own


def logits(hidden: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``hidden @ head.T + bias`` written into ``out``, in its dtype straight from the accumulator."""
    product(hidden, head.t(), out_dtype=out.dtype, out=out)
    return out if bias is None else out.add_(bias)


def chunk_rows(n: int, row_bytes: int, chunk_mib: int) -> int:
    """Rows in a chunk whose buffers fit ``chunk_mib`` MiB: chunks of equal size, a multiple of 64 rows where
    that fits (matrix products like it), at least one row."""
    most = max(1, (chunk_mib << 20) // row_bytes)
    if n <= most:
        return max(1, n)
    even = math.ceil(n / math.ceil(n / most))
    rounded = math.ceil(even / 64) * 64
    return rounded if rounded <= most else even


def _chunk(rows: LinearRows, part: slice, student: Tensor | None, teachers: tuple[Tensor, ...]) -> Rows:
    return Rows(
        student=student,
        teachers=teachers,
        teacher_rows=(None,) * len(teachers),
        labels=None if rows.labels is None else rows.labels[part],
        edit_offsets=None if rows.edit_offsets is None else rows.edit_offsets[part.start : part.stop + 1],
        edit_tokens=rows.edit_tokens,
        rule=rows.rule,
        ignore_index=rows.ignore_index,
    )


def _head(teacher: Projection, compute_dtype: torch.dtype | None) -> Tensor:
    return teacher.weight.to(compute_dtype or torch.promote_types(teacher.hidden.dtype, teacher.weight.dtype))


def _no_rows(like: Tensor, wide: torch.dtype) -> RowLosses:
    floats, integers = like.new_zeros(0, dtype=wide), like.new_zeros(0, dtype=torch.int64)
    return RowLosses(floats, integers, floats.clone(), integers.clone())
