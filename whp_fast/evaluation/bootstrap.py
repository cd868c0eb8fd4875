"""A figure and how sure it is: percentile bootstrap intervals over the things that were asked.

The units are drawn again, with replacement, as often as there are (Efron 1979); the figure of each such draw
is computed, and the interval holds the middle 95 % of them. It says how far the figure depends on which
prompts, questions or passages were asked; it does not see chance in the training. Where every unit gave the
same value the interval has no width: that none of 300 prompts leaked does not show that none would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """A value with its interval.

    Attributes:
        value: the figure on all units.
        low, high: the interval; not a number where a single unit leaves nothing to draw from.
        n: units it rests on (the first sample's, where there are several).
    """

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """``{"value", "low", "high", "n"}``; what is not finite becomes None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: x if math.isfinite(x) else None for name, x in numbers.items()} | {"n": self.n}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Figure:
        """The inverse of `to_json`; None becomes not a number."""
        numbers = (content[name] for name in ("value", "low", "high"))
        return cls(*(math.nan if x is None else float(x) for x in numbers), content["n"])

    def __str__(self) -> str:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return _shown(self.value)
        return f"{_shown(self.value)} [{_shown(self.low)}, {_shown(self.high)}]"


def mean_figure(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Figure:
    """The mean of the values, which are the units.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=np.float64)
    draws = [float(values[index].mean()) for (index,) in draw([len(values)], resamples, seed)]
    return _figure(float(values.mean()), draws, len(values))


def ratio_figure(
    numerators: Sequence[float],
    denominators: Sequence[float],
    transform: Callable[[float], float] = float,
    *,
    seed: int = 0,
) -> Figure:
    """``transform(sum of numerators / sum of denominators)``; unit i is the pair i.

    A perplexity is ``transform=exp`` of negative log-likelihoods over tokens.
    """
    pairs = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], 1)

    def statistic(sample: np.ndarray) -> float:
        top, bottom = sample.sum(0)
        return transform(top / bottom) if bottom else math.nan

    return figure(statistic, pairs, seed=seed)


def figure(
    statistic: Callable[..., float],
    *samples: Sequence | np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
    interpolate: bool = True,
) -> Figure:
    """A statistic of one or several samples, each drawn again on its own.

    Args:
        statistic: of as many arrays as there are samples, each [n, ...]; may give nan where it is not
            defined, and such draws are left out of the interval.
        samples: arrays whose first axis counts the units. Things that belong to the same unit (the same
            question asked of two models) stand side by side in one array.
        interpolate: False: the ends of the interval are values that occurred.

    Raises:
        ValueError: an empty sample.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    draws = [
        float(statistic(*(array[index] for array, index in zip(arrays, indices))))
        for indices in draw([len(array) for array in arrays], resamples, seed)
    ]
    return _figure(float(statistic(*arrays)), draws, len(arrays[0]), interpolate)


def draw(sizes: Sequence[int], resamples: int, seed: int) -> Iterator[list[np.ndarray]]:
    """For each draw one index array a sample, as long as the sample."""
    if min(sizes) == 0:
        raise ValueError("a sample is empty, and there is nothing to draw from")
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield [rng.integers(0, size, size) for size in sizes]


def _figure(value: float, draws: list[float], n: int, interpolate: bool = True) -> Figure:
    finite = [x for x in draws if math.isfinite(x)]
    if n < 2 or not finite:
        return Figure(value, math.nan, math.nan, n)
    tail = (1 - LEVEL) / 2
    method = "linear" if interpolate else "inverted_cdf"
    low, high = np.quantile(finite, [tail, 1 - tail], method=method)
    return Figure(value, float(low), float(high), n)


def _shown(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if value and (size < 5e-4 or size >= 1e4):
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 100 else f"{value:.1f}"
