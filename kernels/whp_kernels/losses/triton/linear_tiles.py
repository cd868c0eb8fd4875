"""What the kernels from hidden states share: a tile of logits straight from the accumulators of a product.

A tile is ``[ROWS, COLUMNS]``, a block of rows times a tile of the vocabulary; numbers of a row are
``[ROWS]``. A model comes as a tuple ``(p_hidden, stride_hidden, p_weight, stride_weight, H, p_bias)``,
without the last where there is no bias; one that is not there as an empty tuple. (In Triton 3.6 a tuple that
holds a None cannot be compared with None.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.tiles import tanh

_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def within(o_x, length):
    """Indices to read: those past the end read the last one again, so that no load needs a mask; what comes
    of them is not used."""
    return tl.minimum(o_x, length - 1)


@triton.jit
def logits_of(
    model,
    row,
    column,
    n,
    V,
    softcap,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One model's soft-capped logits of the tile from ``row`` and ``column`` on, float32."""
    o_width = tl.arange(0, WIDTH)
    p_h, o_h = _hidden(model, row, n, ROWS, WIDTH)
    p_w, o_w = _head(model, column, V, COLUMNS, WIDTH)
    b_x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, model[4], WIDTH):
        m_width = o_width < model[4] - start
        b_h = _slice(p_h + o_h, m_width[None, :], EVEN)
        b_w = _slice(p_w + o_w, m_width[:, None], EVEN)
        b_x = _dot(b_h, b_w, b_x)
        p_h += WIDTH
        p_w += WIDTH
    return _finished(b_x, model, column, V, softcap, SOFTCAP, COLUMNS)


@triton.jit
def logits_of_all(
    student,
    first,
    second,
    third,
    row,
    column,
    n,
    V,
    softcap,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Logits of the student and of three teachers (zeros for those that are not there) that
    all go through one head: a tile of it is read once for all of them."""
    b_s = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_1 = b_s
    b_2 = b_s
    b_3 = b_s
    o_width = tl.arange(0, WIDTH)
    p_w, o_w = _head(first, column, V, COLUMNS, WIDTH)
    p_1, o_1 = _hidden(first, row, n, ROWS, WIDTH)
    if len(student) > 0:
        p_s, o_s = _hidden(student, row, n, ROWS, WIDTH)
    if len(second) > 0:
        p_2, o_2 = _hidden(second, row, n, ROWS, WIDTH)
    if len(third) > 0:
        p_3, o_3 = _hidden(third, row, n, ROWS, WIDTH)
    for start in range(0, first[4], WIDTH):
        m_width = o_width < first[4] - start
        b_w = _slice(p_w + o_w, m_width[:, None], EVEN)
        p_w += WIDTH
        if len(student) > 0:
            b_s = _dot(_slice(p_s + o_s, m_width[None, :], EVEN), b_w, b_s)
            p_s += WIDTH
        b_1 = _dot(_slice(p_1 + o_1, m_width[None, :], EVEN), b_w, b_1)
        p_1 += WIDTH
        if len(second) > 0:
            b_2 = _dot(_slice(p_2 + o_2, m_width[None, :], EVEN), b_w, b_2)
            p_2 += WIDTH
        if len(third) > 0:
            b_3 = _dot(_slice(p_3 + o_3, m_width[None, :], EVEN), b_w, b_3)
            p_3 += WIDTH
    if len(student) > 0:
        b_s = _finished(b_s, student, column, V, softcap, SOFTCAP, COLUMNS)
    b_1 = _finished(b_1, first, column, V, softcap, SOFTCAP, COLUMNS)
    if len(second) > 0:
        b_2 = _finished(b_2, second, column, V, softcap, SOFTCAP, COLUMNS)
    if len(third) > 0:
        b_3 = _finished(b_3, third, column, V, softcap, SOFTCAP, COLUMNS)
    return b_s, b_1, b_2, b_3


@triton.jit
def _hidden(model, row, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Where the block of rows begins (64 bits: offsets pass 2^31), and offsets within it [ROWS, WIDTH] (32
    bits)."""
    o_row = within(tl.arange(0, ROWS), n - row)
    return model[0] + _long(row) * model[1], o_row[:, None] * model[1] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _head(model, column, V, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The same of a tile of the head, [WIDTH, COLUMNS]."""
    o_column = within(tl.arange(0, COLUMNS), V - column)
    return model[2] + _long(column) * model[3], o_column[None, :] * model[3] + tl.arange(0, WIDTH)[:, None]


@triton.jit
def _long(x):
    return tl.zeros([], tl.int64) + x


@triton.jit
def _slice(p_x, m_width, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p_x)
    else:
        return tl.load(p_x, mask=m_width, other=0.0)


@triton.jit
def _dot(b_h, b_w, b_x):
    if b_h.dtype != b_w.dtype:
        b_h = b_h.to(tl.float32)
        b_w = b_w.to(tl.float32)
    return tl.dot(b_h, b_w, b_x, input_precision="ieee")


@triton.jit
def _finished(b_x, model, column, V, softcap, SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr):
    if len(model) == 6:
        o_column = within(column + tl.arange(0, COLUMNS), V)
        b_x += tl.load(model[5] + o_column).to(tl.float32)[None, :]
    if SOFTCAP:
        b_x = softcap * tanh(b_x / softcap)
    return b_x


@triton.jit
def target_of(
    b_base,
    b_second,
    b_third,
    weight,
    b_threshold,
    COMBINATION: tl.constexpr,
    THIRD: tl.constexpr,
    TOP: tl.constexpr,
):
    """Target logits of a tile of the teachers'; those of the first teacher for ``student_offset``. A NaN of
    any teacher shows in it, also where the combination would hide it. ``b_threshold`` is that of relative_top
    [ROWS]."""
    b_target = b_base
    if COMBINATION == "whp":
        b_target = b_base - weight * tl.maximum(b_second - b_base, 0.0)
    elif COMBINATION == "offset":
        if THIRD:
            b_target = b_base + weight * (b_second - b_third)
        else:
            b_target = b_base + weight * b_second
    if TOP == "keep":
        b_target = tl.where(b_base < b_threshold[:, None], b_base, b_target)
    elif TOP == "mask":
        b_target = tl.where(b_base < b_threshold[:, None], float("-inf"), b_target)
    if COMBINATION != "identity":
        b_target = tl.where(b_base == float("-inf"), b_base, b_target)
        b_target = tl.where(b_second != b_second, b_second, b_target)
        if THIRD:
            b_target = tl.where(b_third != b_third, b_third, b_target)
    return b_target


@triton.jit
def edits_of_rows(p_offsets, p_tokens, c_row, start):
    """For each row the first of its edits whose token is at least ``start``, and where its edits end."""
    b_low = tl.load(p_offsets + c_row)
    b_end = tl.load(p_offsets + c_row + 1)
    b_high = b_end
    while tl.max(b_high - b_low, axis=0) > 0:
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        below = tl.load(p_tokens + b_middle, mask=m_open, other=0) < start
        b_low = tl.where(m_open & below, b_middle + 1, b_low)
        b_high = tl.where(m_open & (below == 0), b_middle, b_high)
    return b_low, b_end


@triton.jit
def edited(b_base, column, p_tokens, b_edit, b_end, limit, value, EDIT: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile from ``column`` on with the edits of the columns before ``limit`` made; ``b_edit`` [ROWS] is
    each row's first edit that is not done. One after the other, so a token listed twice is added to twice.
    ``value`` is a number, or [ROWS] for ``mean``. Tokens outside the vocabulary match no column that
    counts."""
    o_column = column + tl.arange(0, COLUMNS)
    b_token = _token(p_tokens, b_edit, b_end)
    while tl.min(b_token, axis=0) < limit:
        m_row = b_token < limit
        m_token = o_column[None, :] == tl.where(m_row, b_token, -1)[:, None]
        if EDIT == "add":
            b_base = tl.where(m_token, b_base + value, b_base)
        elif EDIT == "mean":
            b_base = tl.where(m_token, value[:, None], b_base)
        else:
            b_base = tl.where(m_token, float("-inf"), b_base)
        b_edit = tl.where(m_row, b_edit + 1, b_edit)
        b_token = _token(p_tokens, b_edit, b_end)
    return b_base, b_edit


@triton.jit
def _token(p_tokens, b_edit, b_end):
    b_token = tl.load(p_tokens + b_edit, mask=b_edit < b_end, other=_NO_TOKEN)
    return tl.minimum(b_token, _NO_TOKEN).to(tl.int32)


@triton.jit
def student_and_target(
    student,
    first,
    second,
    third,
    row,
    start,
    n,
    V,
    p_edit_tokens,
    b_edit,
    b_end,
    b_value,
    weight,
    b_threshold,
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
):
    """What goes into the divergence, the target (the same again where there is none), both -inf from column
    ``V`` on, the student's own logits (not masked), and the first edits that are not done."""
    m_column = (start + tl.arange(0, COLUMNS) < V)[None, :]
    if SHARED:
        b_student, b_1, b_2, b_3 = logits_of_all(
            student, first, second, third, row, start, n, V, softcap,
            SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN,
        )  # fmt: skip
    elif COMBINATION == "none" or SELF:
        b_student = logits_of(student, row, start, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
        b_1 = b_student
        b_2 = b_student
        b_3 = b_student
    else:
        b_1 = logits_of(first, row, start, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
    if EDIT != "none":
        limit = tl.minimum(V, start + COLUMNS)
        b_1, b_edit = edited(b_1, start, p_edit_tokens, b_edit, b_end, limit, b_value, EDIT, COLUMNS)
    if not SHARED and COMBINATION != "none":
        # one product after the other, the student's last: fewer numbers are alive at a time
        b_2, b_3 = others(second, third, b_1, row, start, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
    if COMBINATION == "none":
        b_t = b_student
    else:
        b_t = target_of(b_1, b_2, b_3, weight, b_threshold, COMBINATION, len(third) > 0, TOP)
        b_t = tl.where(m_column, b_t, float("-inf"))
        if not (SHARED or SELF):
            b_student = logits_of(student, row, start, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
    b_s = b_student
    if COMBINATION == "student_offset":
        b_s = tl.where(b_1 == float("-inf"), float("-inf"), b_1 + weight * (b_student - b_2))
    b_s = tl.where(m_column, b_s, float("-inf"))
    return b_s, b_t, b_student, b_edit


@triton.jit
def others(
    second,
    third,
    b_1,
    row,
    column,
    n,
    V,
    softcap,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Logits of the second and the third teacher with heads of their own; the first's in the place of one
    that is not there."""
    b_2 = b_1
    b_3 = b_1
    if len(second) > 0:
        b_2 = logits_of(second, row, column, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
    if len(third) > 0:
        b_3 = logits_of(third, row, column, n, V, softcap, SOFTCAP, ROWS, COLUMNS, WIDTH, EVEN)
    return b_2, b_3


@triton.jit
def preparations(
    p_edit_offsets,
    p_edit_tokens,
    p_numbers,
    c_row,
    n,
    begin,
    edit_value,
    log_fraction,
    EDIT: tl.constexpr,
    TOP: tl.constexpr,
    FIRST_MAX: tl.constexpr,
    FIRST_MEAN: tl.constexpr,
):
    """What a walk from column ``begin`` on needs of the rows: their first edit there, where their edits end,
    the edits' value, and the threshold of relative_top."""
    b_edit = c_row
    b_end = c_row
    b_value = edit_value
    b_threshold = c_row.to(tl.float32)
    if EDIT != "none":
        b_edit, b_end = edits_of_rows(p_edit_offsets, p_edit_tokens, c_row, begin)
        if EDIT == "mean":
            b_value = tl.load(p_numbers + FIRST_MEAN * n + c_row)
    if TOP != "none":
        b_threshold = log_fraction + tl.load(p_numbers + FIRST_MAX * n + c_row)
    return b_edit, b_end, b_value, b_threshold


@triton.jit
def times(weights, values):
    """Their product; 0 where the weight is, whatever the value."""
    return tl.where(weights == 0.0, 0.0, weights * values)
