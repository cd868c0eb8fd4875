"""``linear_combination_loss``: the family from hidden states and LM heads, without logits for the whole
batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from whp_kernels.losses import arguments, linear_ops, ops
from whp_kernels.losses.combination import SELF, Combination, RowEdits
from whp_kernels.losses.rule import Rule
from whp_kernels.losses.statistics import Statistics, gather_statistics

Teacher = Sequence[Tensor | None]


def linear_combination_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teachers: Sequence[Teacher] = (),
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
    ignore_index: int | None = -100,
    chunk_mib: int = 256,
    store_free: bool = False,
    compute_dtype: torch.dtype | None = None,
    statistics: bool = False,
    token_set: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Statistics]:
    """:func:`whp_kernels.losses.combination_loss` of ``hidden_states @ lm_head_weight.T + bias``.

    Args that are not named here mean what they mean there.

    Args:
        hidden_states: [..., H].
        lm_head_weight: [V, H]; without ``requires_grad`` (a frozen head, LoRA) its gradient is not computed.
            Its gradient is accumulated in float32.
        bias: [V] or None.
        teachers: for each (hidden states [..., H_k], LM head weight [V, H_k]) or with a bias [V] as third;
            heads may be one and the same tensor. Or :data:`SELF`. No gradient.
        teacher_rows: rows are gathered before the products.
        ignore_index: None promises that every row has a label of the vocabulary: rows are then not looked
            for, and nothing is read from the device. Rows that cannot be used (NaN) are left out as ever, and
            have the label -100 in the statistics.
        chunk_mib: memory for the logits (and their gradient) of one chunk of rows, in MiB. More rows make
            better matrix products.
        store_free: no logits at all in memory but tiles; the backward computes them again: 60 to 75 % more
            matrix work for the least memory.
        compute_dtype: dtype of the operands of the products; by default what hidden states and weight promote
            to. Logits leave the products in float32 whatever it is.
        reduction: for ``mean`` and ``sum`` the gradients are formed with the loss, for an upstream gradient
            of one; another one scales them. For ``none`` the backward computes the logits again.

    Returns:
        as :func:`combination_loss`.

    Raises:
        ValueError: shapes, dtypes or choices that do not fit; DTensors.
    """
    combination = arguments.check_combination(combination, teachers)
    if ignore_index is None and shift_labels:
        raise ValueError("shift_labels ignores the last position, so ignore_index cannot be None")
    rule = Rule.of(combination, row_edits, divergence, beta=beta, temperature=temperature, softcap=softcap)
    _check_budget(chunk_mib)
    lead = hidden_states.shape[:-1]
    hidden, weight, bias = _projection("", hidden_states, lm_head_weight, bias)
    n, vocabulary = hidden.shape[0], weight.shape[0]
    projections = [] if teachers is SELF else _teachers(teachers)
    index = arguments.check_teacher_rows(teacher_rows, len(projections), n, hidden.device)
    for k, (teacher_hidden, teacher_weight, _) in enumerate(projections):
        arguments.check_teacher(k, teacher_hidden.shape[0], vocabulary, teacher_weight.shape[0], index[k], n)
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
        like=hidden,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )
    call = (
        hidden,
        weight,
        bias,
        *(map(list, zip(*projections)) if projections else ([], [], [])),
        index,
        flat_labels,
        None if row_edits is None else row_edits.offsets,
        None if row_edits is None else row_edits.tokens,
        rule.encode(),
        ignore_index,
        statistics,
        token_set,
        compute_dtype,
        chunk_mib,
        store_free,
        impl,
    )
    if reduction == "none":
        *per_row, probability = linear_ops.linear_losses(*call)
        loss = ops.weighted(per_row[0], scale).view(lead)
    else:
        grad = torch.is_grad_enabled()
        needs = [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
        loss, *per_row, probability, _, _, _ = linear_ops.linear_sum(*call, scale, *needs)
    if not statistics:
        return loss
    probability = None if token_set is None else probability
    unusable = arguments.IGNORE_INDEX if ignore_index is None else ignore_index
    return loss, gather_statistics(per_row, flat_labels, index, unusable, probability)


class LinearCombinationLoss(nn.Module):
    """:func:`linear_combination_loss` with its choices kept; ``forward`` takes the tensors.

    >>> loss = LinearCombinationLoss(combination=Whp(5.0), divergence="hard", chunk_mib=512)
    >>> loss(hidden_states, lm_head.weight, labels, teachers=((h_base, W_base), (h_reinforced, W_reinforced)))
    """

    def __init__(self, **choices):
        super().__init__()
        self.choices = choices

    def forward(self, hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor | None = None, **tensors):
        return linear_combination_loss(hidden_states, lm_head_weight, labels, **{**self.choices, **tensors})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.choices.items())


def _projection(whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None):
    """Hidden states as [N, H] with a head that fits them."""
    flat = arguments.flat_rows(f"{whose}hidden_states", hidden)
    arguments.refuse_dtensor(f"{whose}lm_head_weight", weight)
    if weight.ndim != 2 or weight.shape[1] != flat.shape[1]:
        raise ValueError(
            f"{whose}hidden_states have width {flat.shape[1]}, but {whose}lm_head_weight has shape "
            f"{tuple(weight.shape)}, expected [V, H] (of a sharded head pass the gathered weight)"
        )
    if bias is not None:
        arguments.refuse_dtensor(f"{whose}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{whose}bias has shape {tuple(bias.shape)}, expected [{weight.shape[0]}]")
    return flat, weight, bias


def _teachers(teachers: Sequence[Teacher]):
    projections = []
    for k, teacher in enumerate(teachers):
        if isinstance(teacher, Tensor) or len(teacher) not in (2, 3):
            raise ValueError(f"teachers[{k}] must be (hidden_states, lm_head_weight) or with a bias as third")
        hidden, weight, bias = (*teacher, None)[:3]
        projections.append(
            _projection(
                f"teachers[{k}] ",
                hidden.detach(),
                weight.detach(),
                None if bias is None else bias.detach(),
            )
        )
    return projections


def _check_budget(chunk_mib: int) -> None:
    if chunk_mib < 1:
        raise ValueError(f"chunk_mib is {chunk_mib}, give at least 1 MiB")
