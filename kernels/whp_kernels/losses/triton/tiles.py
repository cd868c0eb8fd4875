"""What row kernels share: a tile of a row of target logits or student logits, and running sums over tiles.

A tile is ``[BLOCK // GROUP, GROUP]``: the ``GROUP`` adjacent columns of a group (16 bytes) belong to one
thread, and each group keeps its own running maximum and sums from tile to tile. So no thread waits for
another inside the loops; the groups are merged once, at the end of the row.

Names: ``b_`` block, ``o_`` offset, ``m_`` mask, ``p_`` pointer, ``i_`` index. Capitals are fixed when
compiling.
"""

from __future__ import annotations

import triton
import triton.language as tl

# tanh(y) = y + y^3 P(y^2) for |y| < 0.625: minimax fit of relative error (4e-9 before rounding)
_TANH_0 = tl.constexpr(-0.333332819)
_TANH_1 = tl.constexpr(0.133314422)
_TANH_2 = tl.constexpr(-0.0537397122)
_TANH_3 = tl.constexpr(0.0206390787)
_TANH_4 = tl.constexpr(-0.00570497837)
_NO_TOKEN = tl.constexpr(1 << 40)  # behind every column


@triton.jit
def tanh(y):
    """Within 2 units in the last place; libdevice's is not known to the interpreter."""
    size = tl.abs(y)
    z = y * y
    near = _TANH_3 + _TANH_4 * z
    near = _TANH_2 + near * z
    near = _TANH_1 + near * z
    near = _TANH_0 + near * z
    far = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * size) + 1.0)
    return tl.where(size < 0.625, y + y * z * near, tl.where(y < 0.0, -far, far))


@triton.jit
def columns_of_tile(i_tile, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Column indices int32 [BLOCK // GROUP, GROUP] of a tile."""
    o_group = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
    return i_tile * BLOCK + o_group + tl.arange(0, GROUP)[None, :]


@triton.jit
def row_of(p_logits, stride, p_rows, row, kept):
    """Where a teacher's row begins, and whether there is one. ``row`` is int64: offsets pass 2^31."""
    if p_rows is not None:
        row = tl.load(p_rows + row)
        kept = kept & (row >= 0)
        row = tl.maximum(row, 0)
    return p_logits + row * stride, kept


@triton.jit
def logits_tile(p_row, o_column, m_column, softcap, SOFTCAP: tl.constexpr):
    """One model's logits in float32, soft-capped, -inf outside the row."""
    b_x = tl.load(p_row + o_column, mask=m_column, other=float("-inf")).to(tl.float32)
    if SOFTCAP:
        b_x = tl.where(m_column, softcap * tanh(b_x * (1.0 / softcap)), float("-inf"))
    return b_x


@triton.jit
def edits_of_row(p_offsets, p_tokens, row):
    """Where a row's tokens begin, and how many there are, int32."""
    begin = tl.load(p_offsets + row)
    return p_tokens + begin, (tl.load(p_offsets + row + 1) - begin).to(tl.int32)


@triton.jit
def edited_forward(b_base, o_column, p_tokens, i_edit, count, limit, value, EDIT: tl.constexpr):
    """The edits of the columns below ``limit``; ``i_edit`` is the first of the row that is not done.

    One after the other, so a token listed twice is added to twice. Tokens rise within a row, and the limits
    are at most V: tokens outside the vocabulary stay undone.
    """
    token = tl.load(p_tokens + i_edit, mask=i_edit < count, other=_NO_TOKEN)
    while token < limit:
        b_base = _edited(b_base, o_column == tl.maximum(token, -1).to(tl.int32), value, EDIT)
        i_edit += 1
        token = tl.load(p_tokens + i_edit, mask=i_edit < count, other=_NO_TOKEN)
    return b_base, i_edit


@triton.jit
def edited_backward(b_base, o_column, p_tokens, i_edit, start, value, EDIT: tl.constexpr):
    """The edits of the columns from ``start`` on; those from ``i_edit`` on are done or have no column."""
    token = tl.load(p_tokens + i_edit - 1, mask=i_edit > 0, other=-1)
    while token >= start:
        b_base = _edited(b_base, o_column == token.to(tl.int32), value, EDIT)
        i_edit -= 1
        token = tl.load(p_tokens + i_edit - 1, mask=i_edit > 0, other=-1)
    return b_base, i_edit


@triton.jit
def _edited(b_base, m_token, value, EDIT: tl.constexpr):
    if EDIT == "add":
        return tl.where(m_token, b_base + value, b_base)
    elif EDIT == "mean":
        return tl.where(m_token, value, b_base)
    else:
        return tl.where(m_token, float("-inf"), b_base)


@triton.jit
def target_tile(
    b_base,
    p_second,
    p_third,
    o_column,
    m_column,
    weight,
    threshold,
    softcap,
    COMBINATION: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Target logits of a tile. A NaN of any teacher shows in it, also where the combination would hide it.

    ``b_base`` is -inf outside the row, and so is the target. ``student_offset`` has no target: the first
    teacher is returned, for the check of its row.
    """
    b_target = b_base
    if COMBINATION != "identity":
        b_second = logits_tile(p_second, o_column, m_column, softcap, SOFTCAP)
    if COMBINATION == "whp":
        b_target = b_base - weight * tl.maximum(b_second - b_base, 0.0)
    elif COMBINATION == "offset":
        if p_third is None:
            b_target = b_base + weight * b_second
        else:
            b_third = logits_tile(p_third, o_column, m_column, softcap, SOFTCAP)
            b_target = b_base + weight * (b_second - b_third)
    if TOP == "keep":
        b_target = tl.where(b_base < threshold, b_base, b_target)
    elif TOP == "mask":
        b_target = tl.where(b_base < threshold, float("-inf"), b_target)
    if COMBINATION != "identity":
        b_target = tl.where(b_base == float("-inf"), b_base, b_target)
        b_target = tl.where(b_second != b_second, b_second, b_target)
        if p_third is not None:
            b_target = tl.where(b_third != b_third, b_third, b_target)
    return b_target


@triton.jit
def finite(maximum):
    """The number that is subtracted before exp: the maximum, or 0 as long as there was nothing but -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def higher_column(b_x, b_maximum, o_column, best, i_best):
    """The lowest column of each group that holds ``b_maximum``, the maximum of its columns in this tile,
    where it is higher than the ``best`` so far; else ``i_best``. Strictly higher: the lowest column stays on
    ties."""
    i_tile = tl.min(tl.where(b_x == b_maximum[:, None], o_column, 0x7FFFFFFF), axis=1)
    return tl.where(b_maximum > best, i_tile, i_best)


@triton.jit
def lowest_column(best, i_best):
    """The lowest of the groups' columns that hold the row's maximum, int64."""
    return tl.min(tl.where(best == tl.max(best, axis=0), i_best, 0x7FFFFFFF), axis=0).to(tl.int64)


@triton.jit
def first_teacher_mean(p_row, V, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Mean of the row before any edit."""
    b_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    for i_tile in range(tl.cdiv(V, BLOCK)):
        o_column = columns_of_tile(i_tile, BLOCK, GROUP)
        b_x = logits_tile(p_row, o_column, o_column < V, softcap, SOFTCAP)
        b_sum += tl.sum(tl.where(o_column < V, b_x, 0.0), axis=1)
    return tl.sum(b_sum, axis=0) / V


@triton.jit
def first_teacher_maximum(
    p_row,
    p_tokens,
    count,
    value,
    V,
    softcap,
    EDIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Maximum of the row after its edits."""
    best = tl.full([BLOCK // GROUP], float("-inf"), tl.float32)
    i_edit = 0
    for i_tile in range(tl.cdiv(V, BLOCK)):
        o_column = columns_of_tile(i_tile, BLOCK, GROUP)
        b_x = logits_tile(p_row, o_column, o_column < V, softcap, SOFTCAP)
        if EDIT != "none":
            limit = tl.minimum(V, (i_tile + 1) * BLOCK)
            b_x, i_edit = edited_forward(b_x, o_column, p_tokens, i_edit, count, limit, value, EDIT)
        best = tl.maximum(best, tl.max(b_x, axis=1))
    return tl.max(best, axis=0)
