"""The losses from hidden states as torch operators; what :mod:`whp_kernels.losses.ops` is for logits.

    whp_kernels::linear_losses   a loss for each row; its backward computes the logits again
    whp_kernels::linear_sum      sum of row_scale * loss, with the gradients formed in the same pass
    whp_kernels::linear_labels   argmax labels

Rows that are ignored are left out before any product: that needs their number, so one value is read from the
device. With ``ignore_index`` None the caller has done so already, and none is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.losses import linear_chunks, linear_free, ops
from whp_kernels.losses.arguments import IGNORE_INDEX, check_label_range
from whp_kernels.losses.linear_rows import LinearRows, Projection
from whp_kernels.losses.rows import RowLosses
from whp_kernels.losses.rule import decode, once_labelled

_STUDENT = "Tensor hidden, Tensor weight, Tensor? bias"
_TARGET = (
    "Tensor[] teacher_hidden, Tensor[] teacher_weights, Tensor?[] teacher_biases, Tensor?[] teacher_rows, "
    "Tensor? labels, Tensor? edit_offsets, Tensor? edit_tokens, str rule, int? ignore_index"
)
_HOW = "bool statistics, Tensor? token_set, ScalarType? compute_dtype, int chunk_mib, bool free, str impl"


def _rows(
    hidden,
    weight,
    bias,
    teacher_hidden,
    teacher_weights,
    teacher_biases,
    teacher_rows,
    labels,
    edit_offsets,
    edit_tokens,
    rule,
    ignore_index,
) -> tuple[LinearRows, Tensor | None]:
    """The rows that are not ignored, and which they are (None: all)."""
    rule = decode(rule)
    vocabulary = (teacher_weights[0] if weight is None else weight).shape[0]
    check_label_range(labels, vocabulary, ignore_index)
    kept = None if labels is None or ignore_index is None else labels != ignore_index
    for index in teacher_rows:
        if index is not None:
            kept = index >= 0 if kept is None else kept & (index >= 0)
    index = None if kept is None else kept.nonzero(as_tuple=True)[0]
    if index is not None and len(index) == len(kept):
        index = None
    if edit_offsets is not None and index is not None:
        edit_offsets, edit_tokens = _taken(edit_offsets, edit_tokens, index)
    student_hidden = None if hidden is None else _gathered(hidden, None, index)
    if rule.combination != "none" and not teacher_hidden:  # SELF
        teachers = (Projection(student_hidden, weight, bias),)
    else:
        teachers = tuple(
            Projection(_gathered(teacher, where, index), head, teacher_bias)
            for teacher, head, teacher_bias, where in zip(
                teacher_hidden, teacher_weights, teacher_biases, teacher_rows
            )
        )
    return LinearRows(
        hidden=student_hidden,
        weight=weight,
        bias=bias,
        teachers=teachers,
        labels=labels if labels is None or index is None else labels[index],
        edit_offsets=edit_offsets,
        edit_tokens=edit_tokens,
        rule=rule,
        ignore_index=_unusable(ignore_index),
    ), index


def _unusable(ignore_index: int | None) -> int:
    """The label of a row that cannot be used."""
    return IGNORE_INDEX if ignore_index is None else ignore_index


def _gathered(values: Tensor, rows: Tensor | None, index: Tensor | None) -> Tensor:
    if rows is not None:
        return values.index_select(0, rows if index is None else rows[index])
    return values if index is None else values.index_select(0, index)


def _taken(offsets: Tensor, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The edits of some rows only."""
    counts = offsets.diff()[rows]
    taken = torch.zeros(len(rows) + 1, dtype=torch.int64, device=offsets.device)
    taken[1:] = counts.cumsum(0)
    within = torch.arange(int(taken[-1]), device=offsets.device) - torch.repeat_interleave(taken[:-1], counts)
    return taken, tokens[torch.repeat_interleave(offsets[rows], counts) + within]


def _scattered(per_row: RowLosses, index: Tensor | None, n: int, ignore_index: int) -> RowLosses:
    if index is None:
        return per_row
    fills = (0, ignore_index, 0, 0)
    return RowLosses(
        *(
            torch.full((n,), fill, dtype=values.dtype, device=values.device).index_copy_(0, index, values)
            for values, fill in zip(per_row, fills)
        )
    )


def _run(rows, index, n, row_scale, needs, statistics, token_set, compute_dtype, chunk_mib, free, impl):
    """Per-row losses [N], probability [N] and gradients, with what was left out filled in."""
    if row_scale is not None and index is not None:
        row_scale = row_scale[index]
    module = linear_free if free else linear_chunks
    per_row, probability, gradients = module.losses_and_gradients(
        rows,
        statistics=statistics,
        row_scale=row_scale,
        needs=needs,
        token_set=token_set,
        compute_dtype=compute_dtype,
        chunk_mib=chunk_mib,
        impl=impl,
    )
    d_hidden = gradients.hidden
    if d_hidden is not None and index is not None:
        full = torch.zeros((n, d_hidden.shape[1]), dtype=d_hidden.dtype, device=d_hidden.device)
        d_hidden = full.index_copy_(0, index, d_hidden)
    probability = (
        rows.hidden.new_zeros(0, dtype=torch.float32) if probability is None else probability.float()
    )
    if token_set is not None and index is not None:
        full = torch.zeros(n, dtype=torch.float32, device=probability.device)
        probability = full.index_copy_(0, index, probability)
    return _scattered(per_row, index, n, rows.ignore_index), probability, d_hidden, gradients


def _floats(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _fake_losses(hidden, weight, teacher_hidden, token_set, compute_dtype):
    n = hidden.shape[0]
    floats = _floats(hidden, weight) if compute_dtype is None else _wide(compute_dtype)
    return (
        hidden.new_empty(n, dtype=floats),
        hidden.new_empty(n, dtype=torch.int64),
        hidden.new_empty(n, dtype=floats),
        hidden.new_empty(n, dtype=torch.int64),
        hidden.new_empty(0 if token_set is None else n, dtype=torch.float32),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------- a loss for each row


@torch.library.custom_op(
    "whp_kernels::linear_losses",
    mutates_args=(),
    schema=f"({_STUDENT}, {_TARGET}, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_losses(
    hidden,
    weight,
    bias,
    teacher_hidden,
    teacher_weights,
    teacher_biases,
    teacher_rows,
    labels,
    edit_offsets,
    edit_tokens,
    rule,
    ignore_index,
    statistics,
    token_set,
    compute_dtype,
    chunk_mib,
    free,
    impl,
):
    rows, index = _rows(
        hidden,
        weight,
        bias,
        teacher_hidden,
        teacher_weights,
        teacher_biases,
        teacher_rows,
        labels,
        edit_offsets,
        edit_tokens,
        rule,
        ignore_index,
    )
    how = (statistics, token_set, compute_dtype, chunk_mib, free, impl)
    per_row, probability, _, _ = _run(rows, index, hidden.shape[0], None, (False, False, False), *how)
    return (*per_row, probability)


@linear_losses.register_fake
def _(hidden, weight, bias, teacher_hidden, *rest):
    return _fake_losses(hidden, weight, teacher_hidden, rest[9], rest[10])


def _save_for_losses(ctx, inputs, output):
    student, target, how = inputs[:3], list(inputs[3:12]), list(inputs[12:])
    ctx.lists = ops.no_gradients(target[:4])
    label_rule = once_labelled(target[7])
    if label_rule is not None:  # the targets are known now: no teacher is kept for the backward
        target = [[], [], [], [], output[1], None, None, label_rule, _unusable(target[8])]
    ctx.n_teachers = len(target[0])
    ctx.save_for_backward(*student, *target[0], *target[1], *target[2], *target[3], *target[4:7])
    ctx.rule, ctx.ignore_index, ctx.how = target[7], target[8], how
    ctx.needs = [ctx.needs_input_grad[k] for k in range(3)]
    ctx.mark_non_differentiable(*output[1:])


@ops.once
def _backward_of_losses(ctx, d_losses, *_):
    saved, n = list(ctx.saved_tensors), ctx.n_teachers
    student, rest = saved[:3], saved[3:]
    lists = [rest[k * n : (k + 1) * n] for k in range(4)]
    _, _, compute_dtype, chunk_mib, free, impl = ctx.how
    outputs = linear_sum(
        *student,
        *lists,
        *rest[4 * n :],
        ctx.rule,
        ctx.ignore_index,
        False,
        None,
        compute_dtype,
        chunk_mib,
        free,
        impl,
        d_losses.contiguous(),
        *ctx.needs,
    )
    gradients = (
        grad.to(of.dtype) if needed else None for grad, of, needed in zip(outputs[6:], student, ctx.needs)
    )
    return (*gradients, *ctx.lists, *[None] * 11)


linear_losses.register_autograd(_backward_of_losses, setup_context=_save_for_losses)


# -------------------------------------------------------------------------------- the sum, with its gradients


@torch.library.custom_op(
    "whp_kernels::linear_sum",
    mutates_args=(),
    schema=(
        f"({_STUDENT}, {_TARGET}, {_HOW}, Tensor row_scale, "
        "bool needs_hidden, bool needs_weight, bool needs_bias) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def linear_sum(
    hidden,
    weight,
    bias,
    teacher_hidden,
    teacher_weights,
    teacher_biases,
    teacher_rows,
    labels,
    edit_offsets,
    edit_tokens,
    rule,
    ignore_index,
    statistics,
    token_set,
    compute_dtype,
    chunk_mib,
    free,
    impl,
    row_scale,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    rows, index = _rows(
        hidden,
        weight,
        bias,
        teacher_hidden,
        teacher_weights,
        teacher_biases,
        teacher_rows,
        labels,
        edit_offsets,
        edit_tokens,
        rule,
        ignore_index,
    )
    how = (statistics, token_set, compute_dtype, chunk_mib, free, impl)
    needs = (needs_hidden, needs_weight, needs_bias)
    per_row, probability, d_hidden, gradients = _run(rows, index, hidden.shape[0], row_scale, needs, *how)
    none = row_scale.new_empty(0)
    return (
        ops.weighted_sum(per_row.losses, row_scale),
        *per_row,
        probability,
        none if d_hidden is None else d_hidden,
        none.clone() if gradients.weight is None else gradients.weight,
        none.clone() if gradients.bias is None else gradients.bias,
    )


@linear_sum.register_fake
def _(hidden, weight, bias, teacher_hidden, *rest):
    token_set, compute_dtype, needs = rest[9], rest[10], rest[-3:]
    per_row = _fake_losses(hidden, weight, teacher_hidden, token_set, compute_dtype)
    wide = _wide(torch.promote_types(hidden.dtype, weight.dtype) if compute_dtype is None else compute_dtype)
    d_hidden_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    none = rest[-4].new_empty
    return (
        per_row[0].new_empty(()),
        *per_row,
        hidden.new_empty(hidden.shape, dtype=d_hidden_dtype) if needs[0] else none(0),
        weight.new_empty(weight.shape, dtype=wide) if needs[1] else none(0),
        weight.new_empty(weight.shape[0], dtype=wide) if needs[2] else none(0),
    )


def _save_for_sum(ctx, inputs, output):
    ctx.save_for_backward(*output[6:])
    ctx.lists = ops.no_gradients(inputs[3:7])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.needs = inputs[-3:]
    ctx.set_materialize_grads(False)  # else zeros as large as the saved gradients come with every backward
    ctx.mark_non_differentiable(*output[1:])


@ops.once
def _backward_of_sum(ctx, d_total, *_):
    if d_total is None:  # nothing came from the loss
        return (None, None, None, *ctx.lists, *[None] * 15)
    gradients = (
        ops.scaled(gradient, d_total).to(dtype) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)
    )
    return (*gradients, *ctx.lists, *[None] * 15)


linear_sum.register_autograd(_backward_of_sum, setup_context=_save_for_sum)


# ----------------------------------------------------------------------------------------------------- labels


@torch.library.custom_op(
    "whp_kernels::linear_labels",
    mutates_args=(),
    schema=(
        f"({_TARGET}, float[] weights, ScalarType? compute_dtype, int chunk_mib, bool free, str impl) -> "
        "(Tensor, Tensor)"
    ),
)
def linear_labels(
    teacher_hidden,
    teacher_weights,
    teacher_biases,
    teacher_rows,
    labels,
    edit_offsets,
    edit_tokens,
    rule,
    ignore_index,
    weights,
    compute_dtype,
    chunk_mib,
    free,
    impl,
):
    rows, index = _rows(
        None,
        None,
        None,
        teacher_hidden,
        teacher_weights,
        teacher_biases,
        teacher_rows,
        labels,
        edit_offsets,
        edit_tokens,
        rule,
        ignore_index,
    )
    module = linear_free if free else linear_chunks
    found, own = module.row_labels(rows, weights, compute_dtype=compute_dtype, chunk_mib=chunk_mib, impl=impl)
    if index is None:
        return found, own.clone()  # outputs of an operator may not share memory
    n = _label_rows(teacher_hidden, teacher_rows)
    labels_out = torch.full((len(weights), n), ignore_index, dtype=torch.int64, device=own.device)
    own_out = torch.full((n,), ignore_index, dtype=torch.int64, device=own.device)
    return labels_out.index_copy_(1, index, found), own_out.index_copy_(0, index, own)


def _label_rows(teacher_hidden, teacher_rows) -> int:
    index = teacher_rows[0] if teacher_rows else None
    return teacher_hidden[0].shape[0] if index is None else index.shape[0]


@linear_labels.register_fake
def _(teacher_hidden, teacher_weights, teacher_biases, teacher_rows, *rest):
    weights, n, like = rest[5], _label_rows(teacher_hidden, teacher_rows), teacher_hidden[0]
    return (
        like.new_empty((len(weights), n), dtype=torch.int64),
        like.new_empty(n, dtype=torch.int64),
    )
