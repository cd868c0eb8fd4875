"""The losses from logits as torch operators: schema, fake implementation, autograd.

    whp_kernels::row_losses   a loss for each row; its backward runs the kernel again
    whp_kernels::row_sum      sum of row_scale * loss, with the gradient formed in the same pass
    whp_kernels::row_sum_     the same, the gradient written over the student's logits
    whp_kernels::row_labels   argmax labels

``rule`` is an encoded :class:`whp_kernels.losses.rule.Rule`. An empty list of teachers beside a rule that
combines some stands for the student itself (SELF).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from whp_kernels.losses import dispatch
from whp_kernels.losses.arguments import check_label_range
from whp_kernels.losses.dispatch import backend
from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.rule import decode, once_labelled

_TARGET = (
    "Tensor[] teachers, Tensor?[] teacher_rows, Tensor? labels, Tensor? edit_offsets, Tensor? edit_tokens, "
    "str rule, int ignore_index"
)


def _rows(student, teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index) -> Rows:
    rule = decode(rule)
    if rule.combination != "none" and not teachers:
        teachers, teacher_rows = [student], [None]
    check_label_range(labels, (teachers[0] if student is None else student).shape[1], ignore_index)
    return Rows(
        student=student,
        teachers=tuple(teachers),
        teacher_rows=tuple(teacher_rows),
        labels=labels,
        edit_offsets=edit_offsets,
        edit_tokens=edit_tokens,
        rule=rule,
        ignore_index=ignore_index,
    )


def _fake_row_losses(student: Tensor, teachers: list[Tensor]) -> RowLosses:
    floats = (
        torch.float64 if torch.float64 in (student.dtype, *(t.dtype for t in teachers)) else torch.float32
    )
    n = student.shape[0]
    return RowLosses(
        student.new_empty(n, dtype=floats),
        student.new_empty(n, dtype=torch.int64),
        student.new_empty(n, dtype=floats),
        student.new_empty(n, dtype=torch.int64),
    )


def weighted(losses: Tensor, row_scale: Tensor) -> Tensor:
    """``row_scale * losses`` [N], 0 where the scale is 0, even if the loss is infinite."""
    return torch.where(row_scale == 0, 0.0, losses * row_scale.to(losses.dtype))


def weighted_sum(losses: Tensor, row_scale: Tensor) -> Tensor:
    return weighted(losses, row_scale).sum()


class _DifferentiableOnce(torch.autograd.Function):
    """Hands a gradient through; differentiating it again raises."""

    @staticmethod
    def forward(ctx, gradient, *upstream):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("whp_kernels: the losses are differentiable once, not twice")


def once(backward):
    """For ``register_autograd``: a second derivative raises. It would be wrong without a word: the gradient
    that was formed with the loss does not know what it depends on."""

    @functools.wraps(backward)
    def wrapped(ctx, *upstream):
        with torch.no_grad():
            outputs = backward(ctx, *upstream)
        depends = [g for g in upstream if isinstance(g, Tensor) and g.requires_grad]
        if not (torch.is_grad_enabled() and depends):
            return outputs
        return tuple(_DifferentiableOnce.apply(o, *depends) if isinstance(o, Tensor) else o for o in outputs)

    return wrapped


def no_gradients(lists) -> list:
    """What a backward returns for lists of tensors without gradients: torch.library wants a list of None for
    a list of tensors, and one None for a list that holds a None."""
    return [None if any(value is None for value in values) else [None] * len(values) for values in lists]


# ---------------------------------------------------------------------------------------- a loss for each row


@torch.library.custom_op(
    "whp_kernels::row_losses",
    mutates_args=(),
    schema=f"(Tensor student, {_TARGET}, bool statistics, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)
def row_losses(
    student,
    teachers,
    teacher_rows,
    labels,
    edit_offsets,
    edit_tokens,
    rule,
    ignore_index,
    statistics,
    impl,
):
    rows = _rows(student, teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index)
    return tuple(backend(impl, rows).row_losses(rows, statistics=statistics, row_scale=None, gradient=None))


@row_losses.register_fake
def _(student, teachers, *rest):
    return tuple(_fake_row_losses(student, teachers))


def _save_for_row_losses(ctx, inputs, output):
    student, teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index, _, impl = inputs
    ctx.lists = no_gradients(inputs[1:3])
    label_rule = once_labelled(rule)
    if label_rule is not None:  # the targets are known now: no teacher is kept for the backward
        teachers, teacher_rows, labels, edit_offsets, edit_tokens = [], [], output[1], None, None
        rule = label_rule
    ctx.n_teachers = len(teachers)
    ctx.save_for_backward(student, labels, edit_offsets, edit_tokens, *teachers, *teacher_rows)
    ctx.rule, ctx.ignore_index, ctx.impl = rule, ignore_index, impl


def saved_arguments(ctx):
    """The arguments of an operator as :func:`_save_for_row_losses` kept them: student first."""
    student, labels, edit_offsets, edit_tokens, *teachers = ctx.saved_tensors
    teachers, teacher_rows = teachers[: ctx.n_teachers], teachers[ctx.n_teachers :]
    return student, teachers, teacher_rows, labels, edit_offsets, edit_tokens, ctx.rule, ctx.ignore_index


@once
def _backward_of_row_losses(ctx, d_losses, *_):
    outputs = row_sum(*saved_arguments(ctx), d_losses.contiguous(), True, False, ctx.impl)
    return (outputs[-1], *ctx.lists, *[None] * 7)


row_losses.register_autograd(_backward_of_row_losses, setup_context=_save_for_row_losses)


# --------------------------------------------------------------------------------- the sum, with its gradient


_SUM = f"{_TARGET}, Tensor row_scale, bool with_gradient, bool statistics, str impl"
_SUM_OUTPUT = "(Tensor, Tensor, Tensor, Tensor, Tensor"


@torch.library.custom_op(
    "whp_kernels::row_sum", mutates_args=(), schema=f"(Tensor student, {_SUM}) -> {_SUM_OUTPUT}, Tensor)"
)
def row_sum(
    student,
    teachers,
    teacher_rows,
    labels,
    edit_offsets,
    edit_tokens,
    rule,
    ignore_index,
    row_scale,
    with_gradient,
    statistics,
    impl,
):
    rows = _rows(student, teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index)
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if with_gradient else None
    per_row = backend(impl, rows).row_losses(
        rows, statistics=statistics, row_scale=row_scale if with_gradient else None, gradient=gradient
    )
    return (
        weighted_sum(per_row.losses, row_scale),
        *per_row,
        student.new_empty(0) if gradient is None else gradient,
    )


@row_sum.register_fake
def _(student, teachers, *rest):
    per_row = _fake_row_losses(student, teachers)
    with_gradient = rest[7]
    gradient = student.new_empty(student.shape) if with_gradient else student.new_empty(0)
    return per_row.losses.new_empty(()), *per_row, gradient


def _save_for_row_sum(ctx, inputs, output):
    ctx.lists = no_gradients(inputs[1:3])
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)  # else zeros as large as the saved gradients come with every backward
    ctx.mark_non_differentiable(*output[1:])


@once
def _backward_of_row_sum(ctx, d_total, *_):
    if d_total is None:  # nothing came from the loss
        return (None, *ctx.lists, *[None] * 9)
    (gradient,) = ctx.saved_tensors
    if not gradient.numel():
        raise RuntimeError("whp_kernels::row_sum was run with with_gradient=False and has no backward")
    return (scaled(gradient, d_total), *ctx.lists, *[None] * 9)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient * factor``; the gradient itself where that is one and looking costs nothing (eager, CPU)."""
    if type(factor) is Tensor and factor.device.type == "cpu" and not torch.compiler.is_compiling():
        if factor.detach().numpy() == 1.0:
            return gradient
    return gradient * factor


row_sum.register_autograd(_backward_of_row_sum, setup_context=_save_for_row_sum)


@torch.library.custom_op(
    "whp_kernels::row_sum_",
    mutates_args=("student",),
    schema=f"(Tensor(a!) student, {_SUM}) -> {_SUM_OUTPUT})",
)
def row_sum_(
    student,
    teachers,
    teacher_rows,
    labels,
    edit_offsets,
    edit_tokens,
    rule,
    ignore_index,
    row_scale,
    with_gradient,
    statistics,
    impl,
):
    rows = _rows(student, teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index)
    per_row = backend(impl, rows).row_losses(
        rows, statistics=statistics, row_scale=row_scale, gradient=student if with_gradient else None
    )
    return weighted_sum(per_row.losses, row_scale), *per_row


@row_sum_.register_fake
def _(student, teachers, *rest):
    per_row = _fake_row_losses(student, teachers)
    return per_row.losses.new_empty(()), *per_row


@torch.library.custom_op(
    "whp_kernels::scale_", mutates_args=("values",), schema="(Tensor(a!) values, Tensor factor) -> ()"
)
def scale_(values, factor):
    """``values *= factor``; nothing is moved where the factor is one, and on a GPU nothing is read back."""
    if factor.device.type == "cpu":
        if float(factor) != 1.0:
            values.mul_(factor)
    elif dispatch.triton_reason() is None:
        from whp_kernels.losses import triton

        triton.scale_(values, factor)
    else:
        values.mul_(factor)


@scale_.register_fake
def _(values, factor):
    return None


# ----------------------------------------------------------------------------------------------------- labels


@torch.library.custom_op(
    "whp_kernels::row_labels",
    mutates_args=(),
    schema=f"({_TARGET}, float[] weights, str impl) -> (Tensor, Tensor)",
)
def row_labels(teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index, weights, impl):
    rows = _rows(None, teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index)
    return backend(impl, rows).row_labels(rows, weights)


@row_labels.register_fake
def _(teachers, teacher_rows, labels, edit_offsets, edit_tokens, rule, ignore_index, weights, impl):
    index = teacher_rows[0] if teacher_rows else None
    n = teachers[0].shape[0] if index is None else index.shape[0]
    like = teachers[0]
    return (
        like.new_empty((len(weights), n), dtype=torch.int64),
        like.new_empty(n, dtype=torch.int64),
    )
