"""``combination_loss``: loss and gradient of the family from logits.

    combination   x   divergence
    none, Identity, Whp(alpha), Offset(weight), StudentOffset(weight)
                      label, hard, cross_entropy, forward_kl, reverse_kl, jsd(beta)

The formulas of both axes stand in :mod:`whp_kernels.losses.combination` and
:mod:`whp_kernels.losses.reference`; the table of named losses in ``kernels/README.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from whp_kernels.losses import arguments, ops
from whp_kernels.losses.combination import SELF, Combination, RowEdits
from whp_kernels.losses.rule import Rule
from whp_kernels.losses.statistics import Statistics, gather_statistics, token_set_probability


def combination_loss(
    student_logits: Tensor,
    labels: Tensor | None = None,
    *,
    teachers: Sequence[Tensor] = (),
    teacher_rows: Sequence[Tensor | None] | None = None,
    combination: Combination | None = None,
    row_edits: RowEdits | None = None,
    divergence: str = "label",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    weights: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    shift_labels: bool = False,
    ignore_index: int = -100,
    inplace: bool = False,
    gradient: Literal["forward", "backward"] = "forward",
    statistics: bool = False,
    token_set: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Statistics]:
    """A divergence between a student and a combination of teachers, or labels; from logits.

    Args:
        student_logits: [..., V], float32, bfloat16 or float16 (float64: reference only). Computation is in
            float32 from what is given; the gradient is rounded once to this dtype.
        labels: int64 [...]. For ``divergence="label"`` what is taught; otherwise only which rows are left out
            (``ignore_index``), None for none.
        teachers: logits [..., V] in the order of the combination, no gradient; or :data:`SELF`, the student's
            own logits without gradient.
        teacher_rows: for each teacher int64 [...] in the shape of the student's rows: the number of its row
            (of its flattened rows) that belongs to each student row, negative where there is none; None for
            the same row.
        combination: ``Whp(alpha)``, ``Offset(weight)``, ``StudentOffset(weight)`` or ``Identity()`` (the
            default with one teacher).
        row_edits: changes of single tokens of the first teacher before it is combined.
        divergence: ``label``, ``hard`` (argmax of the target, then cross-entropy), ``cross_entropy`` (soft
            target), ``forward_kl``, ``reverse_kl`` or ``jsd``.
        beta: of ``jsd``; 0 is the forward, 1 the reverse KL (the convention of TRL's GKD).
        temperature: divides the logits of both sides of a soft divergence; no factor T^2 is applied.
        softcap: every model's logits are ``softcap * tanh(logits / softcap)`` first.
        weights: [...], the loss of each row is multiplied with it; no gradient.
        reduction: ``mean`` over the rows that are not ignored, ``sum``, or ``none`` for float32 [...].
        num_items_in_batch: denominator of ``mean``; the count over all accumulated micro-batches makes
            accumulation equal one large batch.
        shift_labels: labels are aligned with ``input_ids``: position ``t`` is taught ``labels[..., t + 1]``.
        ignore_index: label of rows that are left out.
        inplace: the gradient takes the memory of ``student_logits``, which are lost: in the forward pass for
            ``gradient="forward"``, in the backward pass otherwise. A second backward raises.
        gradient: ``forward``: formed in the pass that computes the loss, for an upstream gradient of one;
            another one scales it (exact for powers of two, else one more rounding). ``backward``: computed in
            the backward pass with the upstream gradient inside the one rounding, for another read of the
            logits; always so for ``reduction="none"``.
        statistics: also return :class:`Statistics`.
        token_set: int64 [K], for ``Statistics.set_probability`` (at temperature 1).
        impl: ``auto``, ``reference``, ``triton``, ``cpp`` or ``cuda``; see
        :mod:`whp_kernels.losses.dispatch`.

    Returns:
        the loss, float32 (float64 for float64), a scalar or [...] for ``none``; with ``statistics`` a pair.
        Rows whose target is unusable (a NaN in a teacher, no finite maximum) add nothing but stay in the
        default denominator; ``Statistics.unusable`` counts them. A NaN in the student makes the loss NaN.

    Raises:
        ValueError: shapes, dtypes or choices that do not fit.
    """
    if gradient not in ("forward", "backward"):
        raise ValueError(f"gradient is {gradient!r}, give 'forward' or 'backward'")
    combination = arguments.check_combination(combination, teachers)
    rule = Rule.of(combination, row_edits, divergence, beta=beta, temperature=temperature, softcap=softcap)
    lead = student_logits.shape[:-1]
    student = arguments.flat_rows("student_logits", student_logits, in_place=inplace)
    n, vocabulary = student.shape
    flat_teachers = (
        []
        if teachers is SELF
        else [arguments.flat_rows(f"teachers[{k}]", teacher.detach()) for k, teacher in enumerate(teachers)]
    )
    index = arguments.check_teacher_rows(teacher_rows, len(flat_teachers), n, student.device)
    for k, teacher in enumerate(flat_teachers):
        arguments.check_teacher(k, teacher.shape[0], vocabulary, teacher.shape[1], index[k], n)
    arguments.check_edits(row_edits, n)
    flat_labels = arguments.flat_labels(
        labels,
        lead,
        shift_labels=shift_labels,
        ignore_index=ignore_index,
        required=rule.divergence == "label",
    )
    scale = arguments.row_scales(
        flat_labels,
        index,
        weights,
        lead=lead,
        like=student,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )
    target = (
        flat_teachers,
        index,
        flat_labels,
        None if row_edits is None else row_edits.offsets,
        None if row_edits is None else row_edits.tokens,
        rule.encode(),
        ignore_index,
    )
    probability = None
    if token_set is not None:  # before the gradient may take the place of the logits
        probability = token_set_probability(student.detach(), token_set, rule.softcap, impl)
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    if needs_gradient and (reduction == "none" or gradient == "backward"):
        function = _inplace_row_losses if inplace else ops.row_losses
        per_row = function(student, *target, statistics, impl)
        loss = ops.weighted(per_row[0], scale) if reduction == "none" else ops.weighted_sum(per_row[0], scale)
    elif needs_gradient and inplace:
        loss, *per_row = _InPlaceSum.apply(student, target, scale, statistics, impl)
    else:
        loss, *per_row = ops.row_sum(student, *target, scale, needs_gradient, statistics, impl)[:5]
        if reduction == "none":
            loss = ops.weighted(per_row[0], scale)
    if reduction == "none":
        loss = loss.view(lead)
    if not statistics:
        return loss
    return loss, gather_statistics(per_row, flat_labels, index, ignore_index, probability)


class CombinationLoss(nn.Module):
    """:func:`combination_loss` with its choices kept; ``forward`` takes the tensors.

    >>> loss = CombinationLoss(combination=Whp(5.0), divergence="forward_kl")
    >>> loss(student_logits, labels, teachers=(base_logits, reinforced_logits))
    """

    def __init__(self, **choices):
        super().__init__()
        self.choices = choices

    def forward(self, student_logits: Tensor, labels: Tensor | None = None, **tensors):
        return combination_loss(student_logits, labels, **{**self.choices, **tensors})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.choices.items())


class _InPlaceSum(torch.autograd.Function):
    """The gradient in the student's memory, written by the forward pass."""

    @staticmethod
    def forward(ctx, student, target, scale, statistics, impl):
        buffer = student.detach()  # shares the version counter: whoever saved these logits will notice
        outputs = ops.row_sum_(buffer, *target, scale, True, statistics, impl)
        ctx.save_for_backward(buffer)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total, *_):
        (buffer,) = ctx.saved_tensors  # raises if this was done before: scale_ counts as a change
        ops.scale_(buffer, d_total)
        return buffer, None, None, None, None


class _InPlaceRows(torch.autograd.Function):
    """A loss for each row; the gradient is written into the student's memory by the backward pass."""

    @staticmethod
    def forward(ctx, student, target, statistics, impl):
        arguments_ = (student.detach(), *target, statistics, impl)
        outputs = ops.row_losses(*arguments_)
        ops._save_for_row_losses(ctx, arguments_, outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_losses, *_):
        student, *target = ops.saved_arguments(ctx)
        ops.row_sum_(student, *target, d_losses.contiguous(), True, False, ctx.impl)
        return student, None, None, None


def _inplace_row_losses(student, *arguments_):
    *target, statistics, impl = arguments_
    return _InPlaceRows.apply(student, tuple(target), statistics, impl)
