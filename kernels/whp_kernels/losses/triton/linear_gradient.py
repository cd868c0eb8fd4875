"""Gradient of a slice of the logits from hidden states: one program a tile, computed anew and rounded once.

The slice [rows, columns] is what the products ``d_hidden += slice W`` and ``d_weight = slice^T hidden`` of
the matrix library read next; it is the only place where anything of a tile is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.linear_tiles import preparations, student_and_target, times, within
from whp_kernels.losses.triton.row_losses import _log_ratios_to_mixture
from whp_kernels.losses.triton.tiles import finite


@triton.jit
def linear_gradient_kernel(
    student,
    first,
    second,
    third,
    p_edit_offsets,
    p_edit_tokens,
    p_numbers,
    p_targets,
    p_row_scale,
    p_gradient,
    stride_gradient,
    n,
    V,
    first_row,
    last_row,
    first_column,
    last_column,
    weight,
    edit_value,
    log_fraction,
    beta,
    inverse_temperature,
    softcap,
    COMBINATION: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    EDIT: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SELF: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STUDENT_MAX: tl.constexpr,
    STUDENT_SUM: tl.constexpr,
    TARGET_MAX: tl.constexpr,
    TARGET_SUM: tl.constexpr,
    PART: tl.constexpr,
    FIRST_MAX: tl.constexpr,
    FIRST_MEAN: tl.constexpr,
    USED: tl.constexpr,
):
    """The rows from ``first_row`` to ``last_row`` and columns from ``first_column`` to ``last_column`` (those
    excluded), into ``p_gradient`` from its beginning."""
    SOFT: tl.constexpr = DIVERGENCE != "label" and DIVERGENCE != "hard"

    row = first_row + tl.program_id(0) * ROWS
    o_row = row + tl.arange(0, ROWS)
    c_row = within(o_row, n)
    start = first_column + tl.program_id(1) * COLUMNS
    b_edit, b_end, b_value, b_threshold = preparations(
        p_edit_offsets, p_edit_tokens, p_numbers, c_row, n, start, edit_value, log_fraction,
        EDIT, TOP, FIRST_MAX, FIRST_MEAN,
    )  # fmt: skip
    b_s, b_t, b_student, _ = student_and_target(
        student, first, second, third, row, start, n, V, p_edit_tokens, b_edit, b_end, b_value, weight,
        b_threshold, softcap, COMBINATION, EDIT, TOP, SOFTCAP, SELF, SHARED,
        ROWS, COLUMNS, WIDTH, EVEN,
    )  # fmt: skip

    k = inverse_temperature * 1.4426950408889634
    b_scale = tl.load(p_row_scale + c_row).to(tl.float32)
    if COMBINATION == "student_offset":
        b_scale *= weight
    l_s = tl.load(p_numbers + STUDENT_SUM * n + c_row)
    b_xs = b_s - finite(tl.load(p_numbers + STUDENT_MAX * n + c_row))[:, None]
    b_es = tl.exp2(b_xs * k)
    b_scale_s = b_scale * inverse_temperature / l_s
    if SOFT:
        l_t = tl.load(p_numbers + TARGET_SUM * n + c_row)
        b_xt = b_t - finite(tl.load(p_numbers + TARGET_MAX * n + c_row))[:, None]
    if DIVERGENCE == "reverse_kl":
        b_shift = tl.log(l_s / l_t) + tl.load(p_numbers + PART * n + c_row)
        b_g = times(b_es, (b_xs - b_xt) * inverse_temperature - b_shift[:, None]) * b_scale_s[:, None]
    elif DIVERGENCE == "jsd":
        b_difference = (b_xt - b_xs) * inverse_temperature + tl.log(l_s / l_t)[:, None]
        b_log, _ = _log_ratios_to_mixture(b_difference, beta)
        b_scale_s *= 1.0 - beta
        b_g = times(b_es, b_log - tl.load(p_numbers + PART * n + c_row)[:, None]) * b_scale_s[:, None]
    elif SOFT:
        b_scale_t = b_scale * inverse_temperature / l_t
        b_g = b_es * b_scale_s[:, None] - tl.exp2(b_xt * k) * b_scale_t[:, None]
    else:
        b_target = tl.load(p_targets + c_row)
        m_target = (start + tl.arange(0, COLUMNS))[None, :] == b_target[:, None]
        b_g = b_es * b_scale_s[:, None] - tl.where(m_target, b_scale[:, None], 0.0)
    if SOFTCAP:
        b_capped = b_student / softcap
        b_g *= 1.0 - b_capped * b_capped
    b_used = tl.load(p_numbers + USED * n + c_row)
    b_g = tl.where((b_used == 0.0)[:, None], 0.0, b_g)

    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    p_g = p_gradient + (o_row - first_row).to(tl.int64)[:, None] * stride_gradient + o_column[None, :]
    m_g = (o_row < last_row)[:, None] & (first_column + o_column < last_column)[None, :]
    tl.store(p_g, b_g.to(p_gradient.dtype.element_ty), mask=m_g)
