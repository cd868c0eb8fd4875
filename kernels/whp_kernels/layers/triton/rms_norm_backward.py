"""Backward of RMSNorm and of the residual addition before it, in one pass over the rows.

The weight's gradient is a sum over all rows: each program adds up its own rows in float32, and
``column_sums.py`` adds up the programs in their order. No atomics: the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_backward_kernel(
    p_g_out,
    p_g_sum,
    p_sum,
    p_weight,
    p_scale,
    p_g_x,
    p_g_branch,
    p_parts,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dx = r (g w - n mean(g w n)) + g_sum with n = x r, and in p_parts [programs, width] the sums of g n."""
    i_program = tl.program_id(0)
    o_column = tl.arange(0, BLOCK)
    if WHOLE:
        m_column = o_column < width
        b_weight = tl.load(p_weight + o_column, mask=m_column, other=0.0).to(tl.float32)
        b_part = tl.zeros([ROWS, BLOCK], tl.float32)
        for i_tile in range(i_program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
            o_row = (i_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            m_row = o_row < rows
            o_x = o_row[:, None] * width + o_column[None, :]
            m_x = m_row[:, None] & m_column[None, :]
            b_scale = tl.load(p_scale + o_row, mask=m_row, other=0.0)[:, None]
            b_g = tl.load(p_g_out + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_n = tl.load(p_sum + o_x, mask=m_x, other=0.0).to(tl.float32) * b_scale
            if p_parts is not None:
                b_part += b_g * b_n
            b_g = b_g * b_weight[None, :]
            b_mean = tl.sum(b_g * b_n, axis=1) / width
            _write(p_g_sum, p_g_x, p_g_branch, o_x, m_x, (b_g - b_n * b_mean[:, None]) * b_scale)
        if p_parts is not None:
            p_part = p_parts + i_program.to(tl.int64) * width + o_column
            tl.store(p_part, tl.sum(b_part, axis=0), mask=m_column)
    else:  # p_parts holds zeros at first; ROWS is 1
        for i_row in range(i_program, rows, tl.num_programs(0)):
            o_row = (i_row + tl.zeros([1], tl.int64)) * width
            scale = tl.load(p_scale + i_row)
            b_sum = tl.zeros([BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                o_x = start + o_column
                m_x = o_x < width
                b_g = tl.load(p_g_out + o_row + o_x, mask=m_x, other=0.0).to(tl.float32)
                b_n = tl.load(p_sum + o_row + o_x, mask=m_x, other=0.0).to(tl.float32) * scale
                if p_parts is not None:
                    p_part = p_parts + i_program.to(tl.int64) * width + o_x
                    tl.store(p_part, tl.load(p_part, mask=m_x, other=0.0) + b_g * b_n, mask=m_x)
                b_weight = tl.load(p_weight + o_x, mask=m_x, other=0.0).to(tl.float32)
                b_sum += b_g * b_weight * b_n
            mean = tl.sum(b_sum, axis=0) / width
            for start in range(0, width, BLOCK):
                o_x = start + o_column
                m_x = o_x < width
                b_weight = tl.load(p_weight + o_x, mask=m_x, other=0.0).to(tl.float32)
                b_g = tl.load(p_g_out + o_row + o_x, mask=m_x, other=0.0).to(tl.float32) * b_weight
                b_n = tl.load(p_sum + o_row + o_x, mask=m_x, other=0.0).to(tl.float32) * scale
                _write(p_g_sum, p_g_x, p_g_branch, o_row + o_x, m_x, (b_g - b_n * mean) * scale)
            tl.debug_barrier()  # the next row adds to the same part, perhaps with other lanes


@triton.jit
def _write(p_g_sum, p_g_x, p_g_branch, o_x, m_x, b_g_x):
    if p_g_sum is not None:
        b_g_x += tl.load(p_g_sum + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_g_x + o_x, b_g_x.to(p_g_x.dtype.element_ty), mask=m_x)
    if p_g_branch is not None:
        tl.store(p_g_branch + o_x, b_g_x.to(p_g_branch.dtype.element_ty), mask=m_x)
