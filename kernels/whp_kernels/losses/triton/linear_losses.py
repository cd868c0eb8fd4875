"""Forward pass from hidden states: one program a block of rows and a part of the vocabulary, walked in tiles.

The running numbers are those of :mod:`whp_kernels.losses.triton.row_losses`, a row's instead of a group's;
each program leaves those of its part, and :func:`whp_kernels.losses.online.merged` makes the whole of them. A
tile of logits exists in registers only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.linear_tiles import preparations, student_and_target, times, within
from whp_kernels.losses.triton.tiles import finite, higher_column

_LOWEST = tl.constexpr(-1e30)  # stands for -inf where the weight is 0


@triton.jit
def linear_losses_kernel(
    student,
    first,
    second,
    third,
    p_labels,
    p_edit_offsets,
    p_edit_tokens,
    p_numbers,
    p_sums,
    p_at_target,
    p_columns,
    n,
    V,
    part,
    weight,
    edit_value,
    log_fraction,
    inverse_temperature,
    softcap,
    COMBINATION: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    EDIT: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    SELF: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    FIRST_MAX: tl.constexpr,
    FIRST_MEAN: tl.constexpr,
):
    """``p_sums`` float32 [6, parts, n] in the order of :class:`whp_kernels.losses.online.Sum` (without a soft
    divergence the target's sum is 0, or NaN where any of its logits is), ``p_at_target`` float32 [parts, n]
    the student's logit at the label taught (NaN where the part does not hold it), ``p_columns`` int32 [2,
    parts, n] the best columns of student and target. ``part`` columns belong to a program, a multiple of
    ``COLUMNS``."""
    TARGET: tl.constexpr = COMBINATION != "none"
    SOFT: tl.constexpr = DIVERGENCE != "label" and DIVERGENCE != "hard"
    HARD: tl.constexpr = DIVERGENCE == "hard"

    row = tl.program_id(0) * ROWS
    o_row = row + tl.arange(0, ROWS)
    m_row = o_row < n
    c_row = within(o_row, n)
    begin = tl.program_id(1) * part
    if DIVERGENCE == "label":
        b_label = tl.load(p_labels + c_row)
    b_edit, b_end, b_value, b_threshold = preparations(
        p_edit_offsets, p_edit_tokens, p_numbers, c_row, n, begin, edit_value, log_fraction,
        EDIT, TOP, FIRST_MAX, FIRST_MEAN,
    )  # fmt: skip

    k = inverse_temperature * 1.4426950408889634
    m_s = tl.full([ROWS], float("-inf"), tl.float32)
    m_t = m_s
    l_s = tl.zeros([ROWS], tl.float32)
    l_t = l_s
    a = l_s
    d = l_s
    b_at = tl.full([ROWS], float("nan"), tl.float32)
    i_s = tl.zeros([ROWS], tl.int32)
    i_t = i_s
    for start in range(begin, tl.minimum(begin + part, V), COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        b_s, b_t, _, b_edit = student_and_target(
            student, first, second, third, row, start, n, V, p_edit_tokens, b_edit, b_end, b_value, weight,
            b_threshold, softcap, COMBINATION, EDIT, TOP, SOFTCAP, SELF, SHARED,
            ROWS, COLUMNS, WIDTH, EVEN,
        )  # fmt: skip
        b_max = tl.max(b_s, axis=1)
        if STATISTICS:
            i_s = higher_column(b_s, b_max, o_column[None, :], m_s, i_s)
        m_old, m_s = m_s, tl.maximum(m_s, b_max)
        c_s = finite(m_s)
        r_s = tl.exp2((m_old - c_s) * k)
        rise_s = c_s - finite(m_old)
        b_xs = b_s - c_s[:, None]
        b_es = tl.exp2(b_xs * k)
        if TARGET:
            b_max = tl.max(b_t, axis=1)
            if HARD or STATISTICS:
                i_t = higher_column(b_t, b_max, o_column[None, :], m_t, i_t)
            if HARD:
                b_found = tl.sum(tl.where(o_column[None, :] == i_t[:, None], b_s, 0.0), axis=1)
                b_at = tl.where(b_max > m_t, b_found, b_at)
            m_old, m_t = m_t, tl.maximum(m_t, b_max)
            if not SOFT:
                l_t += tl.sum(tl.where(b_t == b_t, 0.0, b_t), axis=1)
        if DIVERGENCE == "label":
            b_found = tl.sum(tl.where(o_column[None, :] == b_label[:, None], b_s, 0.0), axis=1)
            inside = (b_label >= start) & (b_label < tl.minimum(V, start + COLUMNS))
            b_at = tl.where(inside, b_found, b_at)
        if SOFT:
            c_t = finite(m_t)
            r_t = tl.exp2((m_old - c_t) * k)
            rise_t = c_t - finite(m_old)
            b_xt = b_t - c_t[:, None]
            b_et = tl.exp2(b_xt * k)
            a = r_t * (a - l_t * rise_t) + tl.sum(b_et * tl.maximum(b_xt, _LOWEST), axis=1)
            if DIVERGENCE == "cross_entropy":
                d = times(r_t, d + l_t * rise_s) - tl.sum(times(b_et, b_xs), axis=1)
            elif DIVERGENCE == "forward_kl":
                d = times(r_t, d + l_t * (rise_s - rise_t)) + tl.sum(times(b_et, b_xt - b_xs), axis=1)
            elif DIVERGENCE == "reverse_kl":
                d = times(r_s, d + l_s * (rise_t - rise_s)) + tl.sum(times(b_es, b_xs - b_xt), axis=1)
            l_t = r_t * l_t + tl.sum(b_et, axis=1)
        l_s = r_s * l_s + tl.sum(b_es, axis=1)

    stride = tl.num_programs(1).to(tl.int64) * n
    p_part = p_sums + tl.program_id(1).to(tl.int64) * n + o_row
    tl.store(p_part, m_s, mask=m_row)
    tl.store(p_part + stride, l_s, mask=m_row)
    tl.store(p_part + 2 * stride, m_t, mask=m_row)
    tl.store(p_part + 3 * stride, l_t, mask=m_row)
    tl.store(p_part + 4 * stride, a * inverse_temperature, mask=m_row)
    tl.store(p_part + 5 * stride, d * inverse_temperature, mask=m_row)
    p_part = p_columns + tl.program_id(1).to(tl.int64) * n + o_row
    tl.store(p_part, i_s, mask=m_row)
    tl.store(p_part + stride, i_t, mask=m_row)
    if not SOFT:
        tl.store(p_at_target + tl.program_id(1).to(tl.int64) * n + o_row, b_at, mask=m_row)
