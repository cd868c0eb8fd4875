"""Second pass of the Jensen-Shannon divergence from hidden states, whose terms need both normalisers.

One program a block of rows and a part of the vocabulary, as in
:mod:`whp_kernels.losses.triton.linear_losses`; the parts' sums are added up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.linear_tiles import preparations, student_and_target, times, within
from whp_kernels.losses.triton.row_losses import _log_ratios_to_mixture
from whp_kernels.losses.triton.tiles import finite


@triton.jit
def linear_mixture_kernel(
    student,
    first,
    second,
    third,
    p_edit_offsets,
    p_edit_tokens,
    p_numbers,
    p_divergences,
    n,
    V,
    part,
    weight,
    edit_value,
    log_fraction,
    beta,
    inverse_temperature,
    softcap,
    COMBINATION: tl.constexpr,
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
    FIRST_MAX: tl.constexpr,
    FIRST_MEAN: tl.constexpr,
):
    """``p_divergences`` float32 [2, parts, n]: the part's terms of KL(p_s, m) and of KL(p_t, m)."""
    row = tl.program_id(0) * ROWS
    o_row = row + tl.arange(0, ROWS)
    c_row = within(o_row, n)
    begin = tl.program_id(1) * part
    b_edit, b_end, b_value, b_threshold = preparations(
        p_edit_offsets, p_edit_tokens, p_numbers, c_row, n, begin, edit_value, log_fraction,
        EDIT, TOP, FIRST_MAX, FIRST_MEAN,
    )  # fmt: skip
    k = inverse_temperature * 1.4426950408889634
    c_s = finite(tl.load(p_numbers + STUDENT_MAX * n + c_row))
    c_t = finite(tl.load(p_numbers + TARGET_MAX * n + c_row))
    l_s = tl.load(p_numbers + STUDENT_SUM * n + c_row)
    l_t = tl.load(p_numbers + TARGET_SUM * n + c_row)
    b_log_ratio = tl.log(l_s / l_t)
    b_student_part = tl.zeros([ROWS], tl.float32)
    b_target_part = tl.zeros([ROWS], tl.float32)
    for start in range(begin, tl.minimum(begin + part, V), COLUMNS):
        b_s, b_t, _, b_edit = student_and_target(
            student, first, second, third, row, start, n, V, p_edit_tokens, b_edit, b_end, b_value, weight,
            b_threshold, softcap, COMBINATION, EDIT, TOP, SOFTCAP, SELF, SHARED,
            ROWS, COLUMNS, WIDTH, EVEN,
        )  # fmt: skip
        b_xs = b_s - c_s[:, None]
        b_xt = b_t - c_t[:, None]
        b_difference = (b_xt - b_xs) * inverse_temperature + b_log_ratio[:, None]
        b_student_log, b_target_log = _log_ratios_to_mixture(b_difference, beta)
        b_student_part += tl.sum(times(tl.exp2(b_xs * k), b_student_log), axis=1)
        b_target_part += tl.sum(times(tl.exp2(b_xt * k), b_target_log), axis=1)
    p_part = p_divergences + tl.program_id(1).to(tl.int64) * n + o_row
    tl.store(p_part, b_student_part / l_s, mask=o_row < n)
    tl.store(p_part + tl.num_programs(1).to(tl.int64) * n, b_target_part / l_t, mask=o_row < n)
