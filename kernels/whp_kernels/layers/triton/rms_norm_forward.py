"""RMSNorm with the residual addition before it: every number is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_forward_kernel(
    p_x,
    p_branch,
    p_weight,
    p_sum,
    p_out,
    p_scale,
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A program takes ROWS rows; a row lies in registers (WHOLE), else it is read a second time."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    if WHOLE:
        o_column = tl.arange(0, BLOCK)
        m_column = o_column < width
        o_x = o_row[:, None] * width + o_column[None, :]
        m_x = m_row[:, None] & m_column[None, :]
        b_x = _stream(p_x, p_branch, p_sum, o_x, m_x)
        if p_branch is not None:
            tl.store(p_sum + o_x, b_x.to(p_sum.dtype.element_ty), mask=m_x)
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / width + eps)
        b_weight = tl.load(p_weight + o_column, mask=m_column, other=0.0).to(tl.float32)
        b_out = b_x * b_scale[:, None] * b_weight[None, :]
        tl.store(p_out + o_x, b_out.to(p_out.dtype.element_ty), mask=m_x)
    else:
        b_squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            o_column = start + tl.arange(0, BLOCK)
            o_x = o_row[:, None] * width + o_column[None, :]
            m_x = m_row[:, None] & (o_column < width)[None, :]
            b_x = _stream(p_x, p_branch, p_sum, o_x, m_x)
            if p_branch is not None:
                tl.store(p_sum + o_x, b_x.to(p_sum.dtype.element_ty), mask=m_x)
            b_squares += b_x * b_x
        b_scale = tl.rsqrt(tl.sum(b_squares, axis=1) / width + eps)
        for start in range(0, width, BLOCK):
            o_column = start + tl.arange(0, BLOCK)
            m_column = o_column < width
            o_x = o_row[:, None] * width + o_column[None, :]
            m_x = m_row[:, None] & m_column[None, :]
            # added up again: other lanes may have written what stands in p_sum
            b_x = _stream(p_x, p_branch, p_sum, o_x, m_x)
            b_weight = tl.load(p_weight + o_column, mask=m_column, other=0.0).to(tl.float32)
            b_out = b_x * b_scale[:, None] * b_weight[None, :]
            tl.store(p_out + o_x, b_out.to(p_out.dtype.element_ty), mask=m_x)
    tl.store(p_scale + o_row, b_scale, mask=m_row)


@triton.jit
def _stream(p_x, p_branch, p_sum, o_x, m_x):
    """x + branch as it is kept, in float32."""
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_branch is not None:
        b_x += tl.load(p_branch + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = b_x.to(p_sum.dtype.element_ty).to(tl.float32)
    return b_x
