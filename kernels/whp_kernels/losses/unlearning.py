"""Unlearning losses that need only the log-probability of the label, fused below them.

    nll = linear_combination_loss(h, W, labels, reduction="none", shift_labels=True)  # [B, T], 0 if ignored

    loss         formula                                                  source
    GradAscent   -mean CE                                                 TOFU, arXiv 2401.06121
    GradDiff     gamma * (-mean CE_forget) + alpha * retain               TOFU, arXiv 2401.06121
    NPO          -(2 / beta) mean log sigmoid(beta (NLL - NLL_ref))       arXiv 2404.05868
    SimNPO       -(2 / beta) mean log sigmoid(beta (NLL / |y| - delta))   arXiv 2410.07163
    WGA          -mean[ sg(p)^beta CE ]                                   Wang et al., G-effect, ICLR 2025
    SatImp       -mean[ sg(p)^beta1 (1 - sg(p))^beta2 CE ]                Yang et al., SatImp, ICML 2025

CE and p are those of one token, NLL the sum over a sequence, sg stops the gradient. All take ``nll`` [B, T]
in float32, zero where ignored, and give a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from whp_kernels.losses.arguments import shifted


def trained_positions(labels: Tensor, *, shift_labels: bool = False, ignore_index: int = -100) -> Tensor:
    """bool [B, T]: the positions whose output is taught something, as ``shift_labels`` of the loss counts
    them."""
    return (shifted(labels, ignore_index) if shift_labels else labels) != ignore_index


def grad_ascent_loss(
    nll: Tensor, trained: Tensor, num_items_in_batch: float | Tensor | None = None
) -> Tensor:
    """Minus the mean cross-entropy over trained tokens; ``trained`` is bool [B, T]."""
    return -_mean(nll, trained, num_items_in_batch)


def grad_diff_loss(
    forget_nll: Tensor,
    forget_trained: Tensor,
    retain_loss: Tensor,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """``gamma * GradAscent + alpha * retain_loss``; the latter a scalar, cross-entropy or a KL to the
    base."""
    return gamma * grad_ascent_loss(forget_nll, forget_trained, num_items_in_batch) + alpha * retain_loss


def npo_loss(nll: Tensor, reference_nll: Tensor, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation. ``reference_nll``: [B, T] of the frozen model, or [B] already
    summed."""
    reference = reference_nll.sum(-1) if reference_nll.ndim == nll.ndim else reference_nll
    return _preference(nll.sum(-1) - reference, beta)


def simnpo_loss(nll: Tensor, trained: Tensor, *, beta: float = 0.1, delta: float = 0.0) -> Tensor:
    """NPO without a reference model, on the mean over each sequence's trained tokens."""
    return _preference(nll.sum(-1) / trained.sum(-1).clamp(min=1) - delta, beta)


def wga_loss(
    nll: Tensor, trained: Tensor, *, beta: float = 1.0, num_items_in_batch: float | Tensor | None = None
) -> Tensor:
    """Gradient ascent weighted by the token's probability: what is forgotten already is left alone."""
    return -_mean(torch.exp(-beta * nll.detach()) * nll, trained, num_items_in_batch)


def satimp_loss(
    nll: Tensor,
    trained: Tensor,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Gradient ascent weighted by saturation ``p^beta1`` and importance ``(1 - p)^beta2``."""
    fixed = nll.detach()
    weight = torch.exp(-beta1 * fixed) * (-torch.expm1(-fixed)) ** beta2
    return -_mean(weight * nll, trained, num_items_in_batch)


def _preference(margin: Tensor, beta: float) -> Tensor:
    return -(2 / beta) * functional.logsigmoid(beta * margin).mean()


def _mean(values: Tensor, trained: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
    count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return torch.where(trained, values, 0.0).sum() / count
