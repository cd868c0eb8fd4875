"""Labels from hidden states: the argmax of the target for several weights of the combination, in one pass.

One program a block of rows and a part of the vocabulary; a tile of the teachers' logits serves every weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.linear_tiles import (
    edited,
    logits_of,
    logits_of_all,
    others,
    preparations,
    target_of,
    within,
)


@triton.jit
def linear_labels_kernel(
    first,
    second,
    third,
    p_edit_offsets,
    p_edit_tokens,
    p_numbers,
    p_best,
    p_columns,
    n,
    V,
    part,
    weights,
    edit_value,
    log_fraction,
    softcap,
    COMBINATION: tl.constexpr,
    EDIT: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr,
    SETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    FIRST_MAX: tl.constexpr,
    FIRST_MEAN: tl.constexpr,
):
    """``p_best`` float32 and ``p_columns`` int32 [len(weights) + 1, parts, n]: the part's highest target
    logit (NaN where one of them is) and the lowest column that holds it; first the edited first teacher's
    own, then one set for each weight. ``SETS`` is the next power of two."""
    row = tl.program_id(0) * ROWS
    o_row = row + tl.arange(0, ROWS)
    c_row = within(o_row, n)
    begin = tl.program_id(1) * part
    b_edit, b_end, b_value, b_threshold = preparations(
        p_edit_offsets, p_edit_tokens, p_numbers, c_row, n, begin, edit_value, log_fraction,
        EDIT, TOP, FIRST_MAX, FIRST_MEAN,
    )  # fmt: skip
    o_set = tl.arange(0, SETS)[None, :]
    b_best = tl.full([ROWS, SETS], float("-inf"), tl.float32)
    i_best = tl.zeros([ROWS, SETS], tl.int32)
    for start in range(begin, tl.minimum(begin + part, V), COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        m_column = (o_column < V)[None, :]
        if SHARED:
            _, b_1, b_2, b_3 = logits_of_all(
                (), first, second, third, row, start, n, V, softcap,
                SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN,
            )  # fmt: skip
        else:
            b_1 = logits_of(first, row, start, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
        if EDIT != "none":
            limit = tl.minimum(V, start + COLUMNS)
            b_1, b_edit = edited(b_1, start, p_edit_tokens, b_edit, b_end, limit, b_value, EDIT, COLUMNS)
        if not SHARED:
            b_2, b_3 = others(
                second, third, b_1, row, start, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN
            )
        for i_set in tl.static_range(len(weights) + 1):
            b_t = b_1
            if i_set > 0:
                b_t = target_of(
                    b_1, b_2, b_3, weights[i_set - 1], b_threshold, COMBINATION, len(third) > 0, TOP
                )
            b_t = tl.where(m_column, b_t, float("-inf"))
            b_max = tl.max(b_t, axis=1)
            b_column = tl.min(tl.where(b_t == b_max[:, None], o_column[None, :], 0x7FFFFFFF), axis=1)
            m_better = (o_set == i_set) & (b_max[:, None] > b_best)
            b_best = tl.where(m_better, b_max[:, None], b_best)
            i_best = tl.where(m_better, b_column[:, None], i_best)
            # a NaN stays: nothing is higher
            b_nan = tl.sum(tl.where(b_t == b_t, 0.0, b_t), axis=1)
            b_best = tl.where(o_set == i_set, b_best + b_nan[:, None], b_best)
    stride = tl.num_programs(1).to(tl.int64) * n
    o_part = o_set * stride + tl.program_id(1).to(tl.int64) * n + o_row[:, None]
    m_part = (o_set <= len(weights)) & (o_row < n)[:, None]
    tl.store(p_best + o_part, b_best, mask=m_part)
    tl.store(p_columns + o_part, i_best, mask=m_part)
