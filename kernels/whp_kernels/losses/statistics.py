"""Cheap figures about a loss for the log: tensors on the device, nothing is read back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whp_kernels.losses import ops
from whp_kernels.losses.reference import softcapped
from whp_kernels.losses.rule import Rule


class Statistics(NamedTuple):
    """Means are over the rows that were used; all are 0-dimensional tensors on the student's device.

    Attributes:
        rows: number of rows used, int64.
        unusable: rows that were not ignored but whose target could not be used (NaN, no finite value), int64.
        target_entropy: mean entropy of the target in nats, float32; the floor of ``cross_entropy`` (soft
            divergences; 0 otherwise).
        agreement: share of rows where the student's argmax is the label (``label``, ``hard``) or the target's
            argmax (soft divergences).
        set_probability: mean probability that the student gives to ``token_set``; NaN without one.
    """

    rows: Tensor
    unusable: Tensor
    target_entropy: Tensor
    agreement: Tensor
    set_probability: Tensor


def gather_statistics(
    per_row, labels: Tensor | None, teacher_rows, ignore_index: int, probability: Tensor | None
) -> Statistics:
    """Figures of :class:`whp_kernels.losses.rows.RowLosses` [N]; ``probability`` is [N] or None."""
    _, targets, entropy, predicted = (values.detach() for values in per_row)
    used = targets != ignore_index
    asked = torch.ones_like(used)
    if labels is not None:
        asked = asked & (labels != ignore_index)
    for index in teacher_rows:
        if index is not None:
            asked = asked & (index >= 0)
    count = used.sum()
    share = 1.0 / count.clamp(min=1)
    nan = torch.full((), float("nan"), device=entropy.device)
    return Statistics(
        rows=count,
        unusable=asked.sum() - count,
        target_entropy=entropy.sum() * share,
        agreement=((predicted == targets) & used).sum() * share,
        set_probability=nan if probability is None else torch.where(used, probability, 0.0).sum() * share,
    )


def token_set_probability(logits: Tensor, token_set: Tensor, softcap: float, impl: str) -> Tensor:
    """Probability [N] of the tokens ``token_set`` [K] (each once) under ``softmax(logits)`` [N, V].

    The row kernel gives the log-sum-exp as its loss for the set's likeliest token plus that token's logit."""
    if not token_set.numel():
        return logits.new_zeros(logits.shape[0], dtype=torch.float32)
    picked = logits[:, token_set]
    picked = softcapped(picked.to(torch.promote_types(picked.dtype, torch.float32)), softcap)
    highest, position = picked.max(dim=-1)
    rule = Rule(divergence="label", softcap=softcap).encode()
    with torch.no_grad():
        losses = ops.row_losses(
            logits, [], [], token_set.long()[position], None, None, rule, -100, False, impl
        )[0]
    log_sum_exp = losses.to(highest.dtype) + highest
    probability = (picked - log_sum_exp.unsqueeze(1)).exp().sum(-1)
    return torch.where(torch.isneginf(highest), 0.0, probability)
