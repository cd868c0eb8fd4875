"""Sums of the columns of a float32 matrix, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(p_x, p_out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < width
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        o_row = start + tl.arange(0, ROWS)
        o_x = o_row.to(tl.int64)[:, None] * width + o_column[None, :]
        b_sum += tl.load(p_x + o_x, mask=(o_row < rows)[:, None] & m_column[None, :], other=0.0)
    tl.store(p_out + o_column, tl.sum(b_sum, axis=0), mask=m_column)
