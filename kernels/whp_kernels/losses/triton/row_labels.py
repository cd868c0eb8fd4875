"""Labels from teachers' logits: the argmax of the target, for one or more weights of the combination.

Programs of one row stand next to each other, one for each weight: they read the row at about the same time,
so the memory is read once and the cache answers the others. Each also finds the edited first teacher's own
argmax, which needs nothing more to be read; the first of them stores it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.tiles import (
    columns_of_tile,
    edited_forward,
    edits_of_row,
    first_teacher_maximum,
    first_teacher_mean,
    higher_column,
    logits_tile,
    lowest_column,
    row_of,
    target_tile,
)


@triton.jit
def row_labels_kernel(
    p_first,
    stride_first,
    p_first_rows,
    p_second,
    stride_second,
    p_second_rows,
    p_third,
    stride_third,
    p_third_rows,
    p_labels,
    p_edit_offsets,
    p_edit_tokens,
    p_chosen,
    stride_chosen,
    p_own,
    V,
    ignore_index,
    weights,
    edit_value,
    log_fraction,
    softcap,
    COMBINATION: tl.constexpr,
    EDIT: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    SETS: tl.constexpr = len(weights)
    GROUPS: tl.constexpr = BLOCK // GROUP

    i_set = tl.program_id(0) % SETS
    row = (tl.program_id(0) // SETS).to(tl.int64)
    weight = 0.0
    for i in tl.static_range(SETS):
        weight = tl.where(i_set == i, weights[i], weight)
    kept = row >= 0
    if p_labels is not None:
        kept = tl.load(p_labels + row) != ignore_index
    p_a, kept = row_of(p_first, stride_first, p_first_rows, row, kept)
    p_b = p_a
    p_c = None
    if p_second is not None:
        p_b, kept = row_of(p_second, stride_second, p_second_rows, row, kept)
    if p_third is not None:
        p_c, kept = row_of(p_third, stride_third, p_third_rows, row, kept)
    p_chosen += i_set.to(tl.int64) * stride_chosen + row
    if kept == 0:
        if TARGET:
            tl.store(p_chosen, row * 0 + ignore_index)
        tl.store(p_own + row, row * 0 + ignore_index, mask=i_set == 0)
        return

    value = edit_value
    threshold = float("-inf")
    p_tokens = p_edit_tokens
    count = 0
    if EDIT != "none":
        p_tokens, count = edits_of_row(p_edit_offsets, p_edit_tokens, row)
    if EDIT == "mean":
        value = 0.0
        if count > 0:
            value = first_teacher_mean(p_a, V, softcap, SOFTCAP, BLOCK, GROUP)
    if TOP != "none" and TARGET:
        threshold = log_fraction + first_teacher_maximum(
            p_a, p_tokens, count, value, V, softcap, EDIT, SOFTCAP, BLOCK, GROUP
        )

    best_own = tl.full([GROUPS], float("-inf"), tl.float32)
    best = best_own
    sum_own = tl.zeros([GROUPS], tl.float32)  # NaN if any of the row is
    sum_target = sum_own
    i_own = tl.zeros([GROUPS], tl.int32)
    i_best = i_own
    i_edit = 0
    for i_tile in range(tl.cdiv(V, BLOCK)):
        o_column = columns_of_tile(i_tile, BLOCK, GROUP)
        m_column = o_column < V
        b_base = logits_tile(p_a, o_column, m_column, softcap, SOFTCAP)
        if EDIT != "none":
            limit = tl.minimum(V, (i_tile + 1) * BLOCK)
            b_base, i_edit = edited_forward(b_base, o_column, p_tokens, i_edit, count, limit, value, EDIT)
        b_max = tl.max(b_base, axis=1)
        i_own = higher_column(b_base, b_max, o_column, best_own, i_own)
        best_own = tl.maximum(best_own, b_max)
        sum_own += tl.sum(b_base, axis=1)
        if TARGET:
            b_target = target_tile(
                b_base, p_b, p_c, o_column, m_column, weight, threshold, softcap, COMBINATION, TOP, SOFTCAP
            )
            b_max = tl.max(b_target, axis=1)
            i_best = higher_column(b_target, b_max, o_column, best, i_best)
            best = tl.maximum(best, b_max)
            sum_target += tl.sum(b_target, axis=1)

    own = _usable_column(best_own, i_own, sum_own, ignore_index)
    tl.store(p_own + row, own, mask=i_set == 0)
    if TARGET:
        tl.store(p_chosen, _usable_column(best, i_best, sum_target, ignore_index))


@triton.jit
def _usable_column(best, i_best, sums, ignore_index):
    top = tl.max(best, axis=0)
    total = tl.sum(sums, axis=0)
    usable = (total == total) & (top > float("-inf")) & (top < float("inf"))
    return tl.where(usable, lowest_column(best, i_best), ignore_index)
