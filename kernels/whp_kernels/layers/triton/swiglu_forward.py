"""silu(gate) * up of rows that may lie apart, such as the two halves of one tensor."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_forward_kernel(
    p_gate, p_up, p_out, width, gate_stride, up_stride, out_stride, BLOCK: tl.constexpr
):
    """A program takes BLOCK columns of a row."""
    i_program, blocks = tl.program_id(0), tl.cdiv(width, BLOCK)
    i_row = (i_program // blocks).to(tl.int64)
    o_column = (i_program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < width
    b_gate = tl.load(p_gate + i_row * gate_stride + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * up_stride + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_out + i_row * out_stride + o_column, b_out.to(p_out.dtype.element_ty), mask=m_column)
