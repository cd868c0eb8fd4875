"""What has to be known of the first teacher before anything else, from its hidden states: its maximum or its
mean.

One program a block of rows and a part of the vocabulary. The products are those of the passes that follow,
step by step, so that the highest logit is at least the maximum there, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.linear_tiles import edited, logits_of, preparations, within


@triton.jit
def linear_first_kernel(
    first,
    p_edit_offsets,
    p_edit_tokens,
    p_numbers,
    p_results,
    n,
    V,
    part,
    edit_value,
    softcap,
    MEAN: tl.constexpr,
    EDIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    FIRST_MAX: tl.constexpr,
    FIRST_MEAN: tl.constexpr,
):
    """``p_results`` float32 [parts, n]: the part's sum over V if ``MEAN``, else its maximum after the
    edits."""
    row = tl.program_id(0) * ROWS
    o_row = row + tl.arange(0, ROWS)
    c_row = within(o_row, n)
    begin = tl.program_id(1) * part
    b_edit, b_end, b_value, _ = preparations(
        p_edit_offsets,
        p_edit_tokens,
        p_numbers,
        c_row,
        n,
        begin,
        edit_value,
        0.0,
        EDIT,
        "none",
        FIRST_MAX,
        FIRST_MEAN,
    )
    b_result = tl.full([ROWS], 0.0 if MEAN else float("-inf"), tl.float32)
    for start in range(begin, tl.minimum(begin + part, V), COLUMNS):
        m_column = (start + tl.arange(0, COLUMNS) < V)[None, :]
        b_x = logits_of(first, row, start, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
        if EDIT != "none":
            limit = tl.minimum(V, start + COLUMNS)
            b_x, b_edit = edited(b_x, start, p_edit_tokens, b_edit, b_end, limit, b_value, EDIT, COLUMNS)
        if MEAN:
            b_result += tl.sum(tl.where(m_column, b_x, 0.0), axis=1) / V
        else:
            b_result = tl.maximum(b_result, tl.max(tl.where(m_column, b_x, float("-inf")), axis=1))
    tl.store(p_results + tl.program_id(1).to(tl.int64) * n + o_row, b_result, mask=o_row < n)
