"""Backward of silu(gate) * up: reads three numbers and writes two."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_backward_kernel(
    p_g,
    p_gate,
    p_up,
    p_g_gate,
    p_g_up,
    width,
    g_stride,
    gate_stride,
    up_stride,
    g_gate_stride,
    g_up_stride,
    BLOCK: tl.constexpr,
):
    """With s = sigmoid(gate): d_gate = g up s (1 + gate (1 - s)), d_up = g gate s."""
    i_program, blocks = tl.program_id(0), tl.cdiv(width, BLOCK)
    i_row = (i_program // blocks).to(tl.int64)
    o_column = (i_program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < width
    b_g = tl.load(p_g + i_row * g_stride + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + i_row * gate_stride + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_row * up_stride + o_column, mask=m_column, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_gate)
    b_g_gate = b_g * b_up * b_s * (1.0 + b_gate * (1.0 - b_s))
    b_g_up = b_g * b_gate * b_s
    o_g_gate, o_g_up = i_row * g_gate_stride + o_column, i_row * g_up_stride + o_column
    tl.store(p_g_gate + o_g_gate, b_g_gate.to(p_g_gate.dtype.element_ty), mask=m_column)
    tl.store(p_g_up + o_g_up, b_g_up.to(p_g_up.dtype.element_ty), mask=m_column)
