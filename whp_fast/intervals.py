"""How sure a figure is: 95 % intervals from the number of prompts that it rests on.

An interval speaks of the prompts alone: what other prompts of the same kind would have given. It does not
speak of other seeds of the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whp_fast.evaluate import EvaluationResult

Z = 1.959963984540054  # of the normal distribution, 95 % within
Interval = tuple[float, float]
_COUNTS = {
    "familiarity_completion": ("familiarity_prompts",),
    "familiarity_probability": ("probability_prompts",),
    "general_accuracy": ("choice_questions", "cloze_questions"),
}


def wilson(mean: float | None, count: int) -> Interval | None:
    """Wilson's 95 % interval of the mean of ``count`` values between 0 and 1; None without values.

    Of all values between 0 and 1 with a mean m, zeros and ones vary most, by m (1 - m). So it is right for
    shares and wide enough for scores and probabilities. It is never empty: 0 of 100 gives 0 to 0.037.
    (Wilson 1927, J. Am. Stat. Assoc. 22, 209.)
    """
    if mean is None or count <= 0 or not math.isfinite(mean):
        return None
    middle = (mean + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = (
        Z / (1 + Z * Z / count) * math.sqrt(max(mean * (1 - mean), 0.0) / count + Z * Z / (4 * count * count))
    )
    return max(0.0, min(middle - half, mean)), min(1.0, max(middle + half, mean))


def of_result(result: EvaluationResult) -> dict[str, Interval | None]:
    """The interval of each figure; None where there is none.

    The one that came with the figure (a bootstrap), unless it has no width: that none of 100 completions
    leaked does not show that none would. Then, or where none came, Wilson's, if the figure is a mean over
    prompts (perplexity is not).
    """
    counts = prompts(result)
    found: dict[str, Interval | None] = {}
    for name, value in result.figures.items():
        low, high = result.intervals.get(name, (0.0, 0.0))
        found[name] = (low, high) if high > low else wilson(value, counts.get(name, 0))
    return found


def prompts(result: EvaluationResult, at_most: int | None = None) -> dict[str, int]:
    """How many prompts each figure rests on."""
    counts = {name: sum(result.counts.get(key, 0) for key in keys) for name, keys in _COUNTS.items()}
    return {name: min(n, at_most) if at_most else n for name, n in counts.items()}


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float] | None:
    """The change of a share on the same questions, and its 95 % interval; None without questions.

    Only questions whose answer turned from right to wrong or back tell of a change, so this is narrower than
    two intervals side by side. (Agresti and Min 2005, Stat. Med. 24, 729: half a count more in each cell.)
    """
    if not before or len(before) != len(after):
        return None
    n = len(before) + 2.0
    won = sum(b < a for b, a in zip(before, after)) + 0.5
    lost = sum(b > a for b, a in zip(before, after)) + 0.5
    middle = (won - lost) / n
    half = Z * math.sqrt(max(won + lost - (won - lost) ** 2 / n, 0.0)) / n
    change = (sum(after) - sum(before)) / len(before)
    return change, max(-1.0, middle - half), min(1.0, middle + half)
