"""Sums that run along the vocabulary: the forward pass of the family without a whole row of logits.

For the columns of a tile (or of any part of the vocabulary), a student ``s`` and a target ``t`` with maxima
``m_s``, ``m_t`` there and the temperature ``T``, let ``a = (s - m_s) / T`` and ``b = (t - m_t) / T``:

    student_sum  = sum e^a          cross_sum    = sum w f       cross_entropy   w = e^b   f = -a
    target_sum   = sum e^b                                       forward_kl      w = e^b   f = b - a
    entropy_sum  = sum b e^b                                     reverse_kl      w = e^a   f = a - b

A higher maximum scales the weights of a row and shifts every ``f`` by one number, so the sums of several
parts give those of the whole, like those of the online softmax (arXiv 1805.02867). All is relative to the
maxima: an offset of the logits costs no digits, and a student equal to its target diverges by exactly zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from whp_kernels.losses.reference import first_argmax
from whp_kernels.losses.rule import Rule


class Sum(IntEnum):
    """Which number stands where in the first dimension of the sums."""

    STUDENT_MAX = 0
    STUDENT_SUM = 1
    TARGET_MAX = 2
    TARGET_SUM = 3
    ENTROPY_SUM = 4
    CROSS_SUM = 5


def nothing(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sums [len(Sum), n] of no columns at all."""
    sums = torch.zeros(len(Sum), n, dtype=dtype, device=device)
    sums[Sum.STUDENT_MAX] = sums[Sum.TARGET_MAX] = -math.inf
    return sums


def sums_of_tile(s: Tensor, t: Tensor | None, rule: Rule) -> Tensor:
    """The sums [len(Sum), r] of a tile's student and, in soft divergences, target [r, c]."""
    sums = nothing(s.shape[0], s.dtype, s.device)
    sums[Sum.STUDENT_MAX] = s.amax(-1)
    a = (s - finite(sums[Sum.STUDENT_MAX]).unsqueeze(1)) / rule.temperature
    e_a = a.exp()
    sums[Sum.STUDENT_SUM] = e_a.sum(-1)
    if t is None:
        return sums
    sums[Sum.TARGET_MAX] = t.amax(-1)
    b = (t - finite(sums[Sum.TARGET_MAX]).unsqueeze(1)) / rule.temperature
    e_b = b.exp()
    sums[Sum.TARGET_SUM] = e_b.sum(-1)
    sums[Sum.ENTROPY_SUM] = weighted(e_b, b)
    if rule.divergence == "cross_entropy":
        sums[Sum.CROSS_SUM] = weighted(e_b, -a)
    elif rule.divergence == "forward_kl":
        sums[Sum.CROSS_SUM] = weighted(e_b, b - a)
    elif rule.divergence == "reverse_kl":
        sums[Sum.CROSS_SUM] = weighted(e_a, a - b)
    return sums


def merged(sums: Tensor, rule: Rule) -> Tensor:
    """The sums [len(Sum), n] of the whole vocabulary, from those of its parts [len(Sum), parts, n]."""
    m_s, l_s, m_t, l_t, entropy, cross = sums
    top_s, scale_s, rise_s = _risen(m_s, rule.temperature)
    top_t, scale_t, rise_t = _risen(m_t, rule.temperature)
    weight, scale = (l_s, scale_s) if rule.divergence == "reverse_kl" else (l_t, scale_t)
    rise = {
        "cross_entropy": -rise_s,
        "forward_kl": rise_t - rise_s,
        "reverse_kl": rise_s - rise_t,
    }.get(rule.divergence, rise_s)
    # an infinite sum (a column with weight where the other has none) vanishes with its weight
    cross = torch.where(scale == 0, 0.0, scale * (cross - weight * rise))
    entropy = scale_t * (entropy - l_t * rise_t)
    parts = ((scale_s * l_s).sum(0), (scale_t * l_t).sum(0), entropy.sum(0), cross.sum(0))
    return torch.stack([top_s, parts[0], top_t, *parts[1:]])


def loss_and_entropy(sums: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Of a soft divergence, from the sums of the whole vocabulary; in jsd only the entropy."""
    _, l_s, _, l_t, entropy, cross = sums
    log_s, log_t = l_s.log(), l_t.log()
    entropy = log_t - entropy / l_t
    if rule.divergence == "cross_entropy":
        return cross / l_t + log_s, entropy
    if rule.divergence == "forward_kl":
        return cross / l_t - (log_t - log_s), entropy
    return cross / l_s - (log_s - log_t), entropy


def finite(maximum: Tensor) -> Tensor:
    """What is subtracted before exp: the maximum, or 0 where there is nothing but -inf (no -inf - -inf)."""
    return torch.where(maximum == -math.inf, 0.0, maximum)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Their product's sum over the columns, where a weight of 0 counts nothing whatever its value."""
    return torch.where(weights == 0, 0.0, weights * values).sum(-1)


def _risen(maxima: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The highest of the parts' maxima [n]; the factors of the parts' weights, and by how much their ``a`` or
    ``b`` sink [parts, n]."""
    top = maxima.amax(0)
    center = finite(top)
    return top, ((maxima - center) / temperature).exp(), (center - finite(maxima)) / temperature


@dataclass
class Best:
    """The highest value of each row so far and the lowest column that holds it (0 where all are -inf)."""

    value: Tensor
    index: Tensor

    @classmethod
    def empty(cls, n: int, dtype: torch.dtype, device: torch.device) -> Best:
        return cls(
            torch.full((n,), -math.inf, dtype=dtype, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
        )

    def see(self, block: slice, values: Tensor, start: int) -> Tensor:
        """Take in the columns from ``start`` on; returns which rows of the block have a new best one."""
        highest = values.amax(-1)
        better = highest > self.value[block]
        self.value[block] = torch.where(better, highest, self.value[block])
        self.index[block] = torch.where(better, first_argmax(values) + start, self.index[block])
        return better

    def index_in(self, block: slice, start: int) -> Tensor:
        """The best columns' places in the tile from ``start`` on, 0 for those of earlier tiles."""
        return (self.index[block] - start).clamp(min=0)
