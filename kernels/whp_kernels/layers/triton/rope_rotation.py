"""Rotary embedding of queries and keys in one launch, forward and inverse."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rope_kernel(
    q,
    k,
    v,
    p_cos,
    p_sin,
    places,
    table_stride,
    INVERSE: tl.constexpr,
    DEPTH: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program takes HEADS heads of one token, of the queries, of the keys, or of the values (copied).

    q, k and v (which may be None) are (from, to, heads, three strides of from, three of to), the strides
    those of batch, place and head. The second half of a head is exchanged with the first: y = x cos +
    swap(x) sin; transposed: x = y cos + swap(y sin).
    """
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_batch, i_place = i_row // places, i_row % places
    o_half = tl.arange(0, HALF)
    m_half = o_half < DEPTH // 2
    p_left = i_batch * table_stride + i_place * DEPTH + o_half
    p_right = p_left + DEPTH // 2
    b_cos_left = tl.load(p_cos + p_left, mask=m_half, other=0.0)[None, :]
    b_cos_right = tl.load(p_cos + p_right, mask=m_half, other=0.0)[None, :]
    b_sin_left = tl.load(p_sin + p_left, mask=m_half, other=0.0)[None, :]
    b_sin_right = tl.load(p_sin + p_right, mask=m_half, other=0.0)[None, :]
    if INVERSE:
        b_sin_left, b_sin_right = b_sin_right, b_sin_left
    table = (b_cos_left, b_cos_right, b_sin_left, b_sin_right)
    q_blocks, k_blocks = tl.cdiv(q[2], HEADS), tl.cdiv(k[2], HEADS)
    if i_block < q_blocks:
        _part(q, table, i_batch, i_place, i_block, m_half, DEPTH, HEADS, HALF, True)
    elif i_block < q_blocks + k_blocks:
        _part(k, table, i_batch, i_place, i_block - q_blocks, m_half, DEPTH, HEADS, HALF, True)
    else:
        if v is not None:
            i_block -= q_blocks + k_blocks
            _part(v, table, i_batch, i_place, i_block, m_half, DEPTH, HEADS, HALF, False)


@triton.jit
def _part(
    x,
    table,
    i_batch,
    i_place,
    i_block,
    m_half,
    DEPTH: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
):
    o_head = i_block * HEADS + tl.arange(0, HEADS)
    o_half = tl.arange(0, HALF)
    m_x = (o_head < x[2])[:, None] & m_half[None, :]
    p_from = x[0] + i_batch * x[3] + i_place * x[4]
    p_to = x[1] + i_batch * x[6] + i_place * x[7]
    o_from = o_head.to(tl.int64)[:, None] * x[5] + o_half[None, :]
    o_to = o_head.to(tl.int64)[:, None] * x[8] + o_half[None, :]
    b_left = tl.load(p_from + o_from, mask=m_x, other=0.0).to(tl.float32)
    b_right = tl.load(p_from + o_from + DEPTH // 2, mask=m_x, other=0.0).to(tl.float32)
    if ROTATED:
        b_to_left = b_left * table[0] + b_right * table[2]
        b_right = b_right * table[1] + b_left * table[3]
        b_left = b_to_left
    tl.store(p_to + o_to, b_left.to(x[1].dtype.element_ty), mask=m_x)
    tl.store(p_to + o_to + DEPTH // 2, b_right.to(x[1].dtype.element_ty), mask=m_x)
