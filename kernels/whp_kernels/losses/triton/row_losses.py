"""Loss and gradient of logits: one program a row, the columns walked in tiles.

    pass   direction   what                                                           when
    0      forward     mean, maximum of the first teacher                             edit "mean", RelativeTop
    1      forward     running maxima, sums of exponentials, divergence, argmax       always
    1b     backward    Jensen-Shannon divergence, whose terms need both normalisers   jsd
    2      backward    row_scale * gradient, rounded once                             gradient
                       (forward after 1b)

Neighbouring passes walk in opposite directions: a pass begins with the columns that the one before has just
read, while they are in the cache.

Pass 1 in one sweep. With ``c_s``, ``c_t`` the running maxima of a group of columns, ``k = 1 / (T ln 2)``:

    l_s = sum 2^(k (s - c_s))     l_t = sum 2^(k (t - c_t))     a = sum 2^(k (t - c_t)) (t - c_t)

    cross_entropy  d = -sum 2^(k (t - c_t)) (s - c_s)                  loss = d / (T l_t) + log l_s
    forward_kl     d = sum 2^(k (t - c_t)) ((t - c_t) - (s - c_s))     loss = d / (T l_t) + log(l_s / l_t)
    reverse_kl     d = sum 2^(k (s - c_s)) ((s - c_s) - (t - c_t))     loss = d / (T l_s) + log(l_t / l_s)

When a maximum rises by ``r``, a sum's weights shrink and its terms shift: ``d' = 2^(-k r) (d + l * shift)``.
Everything is relative to the maxima, so an offset of the logits costs no digits. Terms of weight 0 are 0
(``0 * inf`` is no NaN).
"""

from __future__ import annotations

import triton
import triton.language as tl

from whp_kernels.losses.triton.tiles import (
    columns_of_tile,
    edited_backward,
    edited_forward,
    edits_of_row,
    finite,
    first_teacher_maximum,
    first_teacher_mean,
    higher_column,
    logits_tile,
    lowest_column,
    row_of,
    tanh,
    target_tile,
)

_LOWEST = tl.constexpr(-1e30)  # stands for -inf where the weight is 0


@triton.jit
def row_losses_kernel(
    p_student,
    stride_student,
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
    p_row_scale,
    p_gradient,
    stride_gradient,
    p_losses,
    p_targets,
    p_entropy,
    p_predicted,
    V,
    ignore_index,
    weight,
    edit_value,
    log_fraction,
    beta,
    inverse_temperature,
    softcap,
    COMBINATION: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    EDIT: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    TARGET: tl.constexpr = COMBINATION != "none"
    SOFT: tl.constexpr = DIVERGENCE != "label" and DIVERGENCE != "hard"
    ARGMAX: tl.constexpr = DIVERGENCE == "hard" or (SOFT and STATISTICS)
    GROUPS: tl.constexpr = BLOCK // GROUP
    JSD: tl.constexpr = DIVERGENCE == "jsd"
    # the gradient of an index target needs no teacher, except those that the student is mixed with
    AGAIN: tl.constexpr = COMBINATION if SOFT or COMBINATION == "student_offset" else "none"

    row = tl.program_id(0).to(tl.int64)
    kept = row >= 0
    if p_labels is not None:
        kept = tl.load(p_labels + row) != ignore_index
    p_s = p_student + row * stride_student
    p_a = p_s
    p_b = p_s
    p_c = None
    if TARGET:
        p_a, kept = row_of(p_first, stride_first, p_first_rows, row, kept)
    if p_second is not None:
        p_b, kept = row_of(p_second, stride_second, p_second_rows, row, kept)
    if p_third is not None:
        p_c, kept = row_of(p_third, stride_third, p_third_rows, row, kept)
    if p_gradient is not None:
        p_g = p_gradient + row * stride_gradient

    if not STATISTICS:  # statistics tell the student's argmax of rows without a loss, too
        if kept == 0:
            tl.store(p_losses + row, 0.0)
            tl.store(p_targets + row, row * 0 + ignore_index)
            tl.store(p_entropy + row, 0.0)
            tl.store(p_predicted + row, 0)
            if p_gradient is not None:
                _zero_row(p_g, V, BLOCK, GROUP)
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
    if TOP != "none":
        threshold = log_fraction + first_teacher_maximum(
            p_a, p_tokens, count, value, V, softcap, EDIT, SOFTCAP, BLOCK, GROUP
        )

    # ---- pass 1
    k = inverse_temperature * 1.4426950408889634
    m_s = tl.full([GROUPS], float("-inf"), tl.float32)
    m_t = m_s
    l_s = tl.zeros([GROUPS], tl.float32)
    l_t = l_s  # without SOFT the plain sum: NaN where any of the row is
    a = l_s
    d = l_s
    i_s = tl.zeros([GROUPS], tl.int32)
    i_t = i_s
    i_edit = 0
    n_tiles = tl.cdiv(V, BLOCK)
    for i_tile in range(n_tiles):
        o_column = columns_of_tile(i_tile, BLOCK, GROUP)
        b_s, _, b_t, i_edit = _tile(
            p_s, p_a, p_b, p_c, p_tokens, i_edit, count, i_tile, o_column, V, value, weight, threshold,
            softcap, True, COMBINATION, EDIT, TOP, SOFTCAP, BLOCK,
        )  # fmt: skip
        b_max = tl.max(b_s, axis=1)
        if STATISTICS:
            i_s = higher_column(b_s, b_max, o_column, m_s, i_s)
        m_old, m_s = m_s, tl.maximum(m_s, b_max)
        c_s = finite(m_s)
        r_s = tl.exp2((m_old - c_s) * k)
        rise_s = c_s - finite(m_old)
        b_xs = b_s - c_s[:, None]
        b_es = tl.exp2(b_xs * k)

        if TARGET:
            b_max = tl.max(b_t, axis=1)
            if ARGMAX:
                i_t = higher_column(b_t, b_max, o_column, m_t, i_t)
            m_old, m_t = m_t, tl.maximum(m_t, b_max)
            if not SOFT:
                l_t += tl.sum(b_t, axis=1)
        if SOFT:
            c_t = finite(m_t)
            r_t = tl.exp2((m_old - c_t) * k)
            rise_t = c_t - finite(m_old)
            b_xt = b_t - c_t[:, None]
            b_et = tl.exp2(b_xt * k)
            a = r_t * (a - l_t * rise_t) + tl.sum(b_et * tl.maximum(b_xt, _LOWEST), axis=1)
            if DIVERGENCE == "cross_entropy":
                d = _times(r_t, d + l_t * rise_s) - tl.sum(_times(b_et, b_xs), axis=1)
            elif DIVERGENCE == "forward_kl":
                d = _times(r_t, d + l_t * (rise_s - rise_t)) + tl.sum(_times(b_et, b_xt - b_xs), axis=1)
            elif DIVERGENCE == "reverse_kl":
                d = _times(r_s, d + l_s * (rise_t - rise_s)) + tl.sum(_times(b_es, b_xs - b_xt), axis=1)
            l_t = r_t * l_t + tl.sum(b_et, axis=1)
        l_s = r_s * l_s + tl.sum(b_es, axis=1)

    # ---- the groups become a row
    top_s = tl.max(m_s, axis=0)
    center_s = finite(top_s)
    f_s = tl.exp2((m_s - center_s) * k)
    sum_s = tl.sum(f_s * l_s, axis=0)  # 0 of a row that is wholly -inf: all that follows is NaN
    predicted = row * 0
    if STATISTICS:  # of a row with NaN: 0
        predicted = tl.where((sum_s == sum_s) | (top_s == float("inf")), lowest_column(m_s, i_s), 0)
    tl.store(p_predicted + row, predicted)
    top_t = top_s
    center_t = center_s
    sum_t = sum_s
    if TARGET:
        top_t = tl.max(m_t, axis=0)
        center_t = finite(top_t)
        if SOFT:
            f_t = tl.exp2((m_t - center_t) * k)
            sum_t = tl.sum(f_t * l_t, axis=0)
        else:
            sum_t = tl.sum(l_t, axis=0)
        kept = kept & (sum_t == sum_t) & (top_t > float("-inf")) & (top_t < float("inf"))

    entropy = 0.0
    target = row * 0
    if ARGMAX:
        target = lowest_column(m_t, i_t)
    elif DIVERGENCE == "label":
        target = tl.load(p_labels + row)
    if SOFT:
        rise_s = center_s - finite(m_s)
        rise_t = center_t - finite(m_t)
        entropy = tl.log(sum_t) - inverse_temperature * tl.sum(f_t * (a - l_t * rise_t), axis=0) / sum_t
        log_ratio = tl.log(sum_s / sum_t)
        loss = 0.0
        if DIVERGENCE == "cross_entropy":
            d = tl.sum(_times(f_t, d + l_t * rise_s), axis=0)
            loss = inverse_temperature * d / sum_t + tl.log(sum_s)
        elif DIVERGENCE == "forward_kl":
            d = tl.sum(_times(f_t, d + l_t * (rise_s - rise_t)), axis=0)
            loss = inverse_temperature * d / sum_t + log_ratio
        elif DIVERGENCE == "reverse_kl":
            d = tl.sum(_times(f_s, d + l_s * (rise_t - rise_s)), axis=0)
            loss = inverse_temperature * d / sum_s - log_ratio
    else:
        target = tl.where(kept, target, 0)
        m_label = (target >= 0) & (target < V)  # a label outside the vocabulary: the loss is NaN
        at_label = tl.load(p_s + target, mask=m_label, other=float("nan")).to(tl.float32)
        at_label = _cap(at_label, softcap, SOFTCAP)
        if COMBINATION == "student_offset":
            first = _cap(tl.load(p_a + target, mask=m_label, other=0.0).to(tl.float32), softcap, SOFTCAP)
            second = _cap(tl.load(p_b + target, mask=m_label, other=0.0).to(tl.float32), softcap, SOFTCAP)
            at_label = tl.where(first == float("-inf"), first, first + weight * (at_label - second))
        loss = tl.log(sum_s) - (at_label - top_s)

    # ---- pass 1b
    if JSD:
        part_s = tl.zeros([GROUPS], tl.float32)
        part_t = part_s
        for i_back in range(n_tiles):
            i_tile = n_tiles - 1 - i_back
            o_column = columns_of_tile(i_tile, BLOCK, GROUP)
            b_s, _, b_t, i_edit = _tile(
                p_s, p_a, p_b, p_c, p_tokens, i_edit, count, i_tile, o_column, V, value, weight,
                threshold, softcap, False, COMBINATION, EDIT, TOP, SOFTCAP, BLOCK,
            )  # fmt: skip
            b_xs = b_s - center_s
            b_xt = b_t - center_t
            b_ls, b_lt = _log_ratios_to_mixture((b_xt - b_xs) * inverse_temperature + log_ratio, beta)
            part_s += tl.sum(_times(tl.exp2(b_xs * k), b_ls), axis=1)
            part_t += tl.sum(_times(tl.exp2(b_xt * k), b_lt), axis=1)
        student_part = tl.sum(part_s, axis=0) / sum_s
        loss = beta * (tl.sum(part_t, axis=0) / sum_t) + (1.0 - beta) * student_part

    tl.store(p_losses + row, tl.where(kept, loss, 0.0))
    tl.store(p_targets + row, tl.where(kept, target, ignore_index))
    tl.store(p_entropy + row, tl.where(kept, entropy, 0.0))

    # ---- pass 2
    if p_gradient is not None:
        tl.debug_barrier()  # in place: the logit at the label has been read by all warps before one writes
        if kept == 0:
            _zero_row(p_g, V, BLOCK, GROUP)
            return
        scale = tl.load(p_row_scale + row).to(tl.float32)
        scale_t = scale * inverse_temperature / sum_t
        scale_s = scale * inverse_temperature / sum_s
        if JSD:
            scale_s *= 1.0 - beta
        if COMBINATION == "student_offset":
            scale *= weight
            scale_s *= weight
        nothing = 0.0 * loss  # an infinite loss has no gradient
        i_label = target.to(tl.int32)
        for i_step in range(n_tiles):
            i_tile = i_step if JSD else n_tiles - 1 - i_step
            o_column = columns_of_tile(i_tile, BLOCK, GROUP)
            b_s, b_own, b_t, i_edit = _tile(
                p_s, p_a, p_b, p_c, p_tokens, i_edit, count, i_tile, o_column, V, value, weight,
                threshold, softcap, JSD, AGAIN, EDIT, TOP, SOFTCAP, BLOCK,
            )  # fmt: skip
            b_xs = b_s - center_s
            b_es = tl.exp2(b_xs * k)
            if SOFT:
                b_xt = b_t - center_t
            if DIVERGENCE == "reverse_kl":
                b_g = b_es * ((b_xs - b_xt) * inverse_temperature - log_ratio - loss)
                b_g = tl.where(b_es == 0.0, nothing, b_g) * scale_s
            elif JSD:
                b_ls, _ = _log_ratios_to_mixture((b_xt - b_xs) * inverse_temperature + log_ratio, beta)
                b_g = _times(b_es, b_ls - student_part) * scale_s
            elif SOFT:
                b_g = b_es * scale_s - tl.exp2(b_xt * k) * scale_t
            else:
                b_g = b_es * scale_s - tl.where(o_column == i_label, scale, 0.0)
            if SOFTCAP:
                b_own *= 1.0 / softcap
                b_g *= 1.0 - b_own * b_own
            tl.store(p_g + o_column, b_g.to(p_gradient.dtype.element_ty), mask=o_column < V)


@triton.jit
def _tile(
    p_s, p_a, p_b, p_c, p_tokens, i_edit, count, i_tile, o_column, V, value, weight, threshold, softcap,
    FORWARD: tl.constexpr, COMBINATION: tl.constexpr, EDIT: tl.constexpr, TOP: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a tile: what the loss is of, the student's own logits, and the target; -inf outside the row."""
    m_column = o_column < V
    b_own = logits_tile(p_s, o_column, m_column, softcap, SOFTCAP)
    b_s = b_own
    b_t = b_own
    if COMBINATION != "none":
        b_base = logits_tile(p_a, o_column, m_column, softcap, SOFTCAP)
        if EDIT != "none":
            if FORWARD:
                limit = tl.minimum(V, (i_tile + 1) * BLOCK)
                b_base, i_edit = edited_forward(b_base, o_column, p_tokens, i_edit, count, limit, value, EDIT)
            else:
                start = i_tile * BLOCK
                b_base, i_edit = edited_backward(b_base, o_column, p_tokens, i_edit, start, value, EDIT)
        b_t = target_tile(
            b_base, p_b, p_c, o_column, m_column, weight, threshold, softcap, COMBINATION, TOP, SOFTCAP
        )
        if COMBINATION == "student_offset":
            b_second = logits_tile(p_b, o_column, m_column, softcap, SOFTCAP)
            ruled_out = b_base == float("-inf")  # a padded column, also where the others are -inf
            b_s = tl.where(ruled_out, float("-inf"), b_base + weight * (b_s - b_second))
    return b_s, b_own, b_t, i_edit


@triton.jit
def _log_ratios_to_mixture(difference, beta):
    """``log p_s - log m`` and ``log p_t - log m`` with ``m = beta p_t + (1 - beta) p_s``.

    ``difference`` is ``log p_t - log p_s``. The larger of the two probabilities is divided out, so that
    nothing overflows and equal ones give exactly 0.
    """
    m_student = difference <= 0
    share = tl.where(m_student, beta, 1.0 - beta)  # of the smaller one
    near = -tl.log(1.0 + share * (tl.exp(-tl.abs(difference)) - 1.0))
    return tl.where(m_student, near, near - difference), tl.where(m_student, near + difference, near)


@triton.jit
def _times(weights, values):
    return tl.where(weights == 0.0, 0.0, weights * values)


@triton.jit
def _cap(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * tanh(x * (1.0 / softcap))
    return x


@triton.jit
def _zero_row(p_row, V, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    for i_tile in range(tl.cdiv(V, BLOCK)):
        o_column = columns_of_tile(i_tile, BLOCK, GROUP)
        b_zero = tl.zeros([BLOCK // GROUP, GROUP], p_row.dtype.element_ty)
        tl.store(p_row + o_column, b_zero, mask=o_column < V)
