"""Truth ratio and forget quality (TOFU, Maini et al. 2024, arXiv 2401.06121).

    P(a | q)      probability of an answer, per token: exp(mean log-probability of its tokens)
    truth ratio   R = mean of P over the wrong answers / P of the right one
    forget        mean of min(R, 1 / R): 1 where right and wrong are equally likely, 0 where one of them rules
    utility       mean of max(0, 1 - R): for questions that should still be answered, 1 is best
    forget        p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios of the unlearned
      quality     model and those of one that never saw the target: near 1 the two cannot be told apart,
                  below 0.05 they can

The mean over the wrong answers is geometric, as in the code of TOFU and of OpenUnlearning (the paper's
formula has an arithmetic one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MOST = 700.0  # exp of more overflows
EXACT_UP_TO = 10_000  # values in a sample; beyond, the distribution of the limit


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """R from mean log-probabilities per token: of the right answer, and of each wrong one."""
    return math.exp(min(_MOST, float(np.mean(np.asarray(wrong, np.float64))) - right))


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """The mean of min(R, 1 / R)."""
    ratios = np.asarray(ratios, dtype=np.float64)
    return float(np.minimum(ratios, 1 / np.maximum(ratios, 1e-300)).mean())


def ks_statistic(one: Sequence[float], other: Sequence[float]) -> float:
    """D: the greatest distance between the two empirical distribution functions."""
    one, other = np.sort(np.asarray(one, np.float64)), np.sort(np.asarray(other, np.float64))
    places = np.concatenate([one, other])
    below = np.searchsorted(one, places, "right") / len(one)
    return float(np.abs(below - np.searchsorted(other, places, "right") / len(other)).max())


def ks_p_value(statistic: float, m: int, n: int) -> float:
    """P(D >= statistic) for two samples of m and n values of one continuous distribution, two-sided.

    Exact up to 10,000 values: every order of the m + n values is a path in a lattice, and all are equally
    likely; counted is the share that somewhere leaves the band |i / m - j / n| < D. The sum has positive
    terms only, so that small p-values keep their digits. Beyond that Kolmogorov's limit
    2 sum_k (-1)^(k-1) exp(-2 k^2 D^2 m n / (m + n)).
    """
    if statistic <= 0:
        return 1.0
    if max(m, n) > EXACT_UP_TO:
        effective = statistic * math.sqrt(m * n / (m + n))
        if effective < 0.2:  # the series needs many terms there, and the value is 1 up to 12 digits
            return 1.0
        terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * effective) ** 2) for k in range(1, 101))
        return min(1.0, max(0.0, sum(terms)))
    if m < n:
        m, n = n, m
    places = np.arange(n + 1)
    # distances are multiples of 1 / (m n): half a step keeps rounding from moving the edge of the band
    edge = (0.5 + math.floor(statistic * m * n - 1e-7)) / (m * n)
    # share[j]: paths to (i, j) that were outside at least once, divided by all paths to (i, n)
    share = np.where(places / n > edge, _paths_share(0, places, n), 0.0)
    for i in range(1, m + 1):
        outside = np.abs(i / m - places / n) > edge
        first = int(outside.argmin())  # the band is one run of places
        last = first + int(np.argmax(np.append(outside[first:], True)))
        row = _paths_share(i, places, n)
        steps = share * (i / (i + n))
        row[first:last] = (row[first - 1] if first else 0.0) + np.cumsum(steps[first:last])
        share = row
        if outside.all():
            return 1.0
    return float(min(1.0, share[n]))


def ks_two_sample(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(D, p) of the two-sided test, as ``scipy.stats.ks_2samp``."""
    statistic = ks_statistic(one, other)
    return statistic, ks_p_value(statistic, len(one), len(other))


def _paths_share(i: int, places: np.ndarray, n: int) -> np.ndarray:
    """binom(i + j, i) / binom(i + n, i) for each place j."""
    factorials = _log_factorials(i + n)
    return np.exp(factorials[i + places] - factorials[places] - factorials[i + n] + factorials[n])


def _log_factorials(up_to: int) -> np.ndarray:
    global _known
    if len(_known) <= up_to:
        _known = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, 2 * up_to + 2)))])
    return _known


_known = np.zeros(1)


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean of values that are not negative; 0 where one of them is."""
    values = np.asarray(values, dtype=np.float64)
    return float(len(values) / (1 / values).sum()) if (values > 0).all() else 0.0
