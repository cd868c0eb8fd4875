"""The attacks in a report: each figure before and after, beside the oracle's under the same attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from whp_fast.evaluation.attacks import AttackRow
from whp_fast.evaluation.bootstrap import Figure
from whp_fast.evaluation.curve import figure_interval

NAMES = {
    "relearn": "Relearning",
    "quantise": "Quantisation",
    "prefix": "Longer true beginning",
    "sampling": "Sampling",
    "prompts": "Other prompts",
}
METRICS = {
    "familiarity_completion": "Familiarity (completion)",
    "familiarity_probability": "Familiarity (probability)",
    "verbatim": "Verbatim (ROUGE-L)",
    "knowledge_accuracy": "Questions on the text",
    "general_perplexity": "General perplexity",
}
ORACLE = "oracle"
_CAME_BACK = 0.05  # of familiarity, beyond what the oracle gives too


@dataclass(frozen=True)
class Value:
    """A figure with its interval; None where there is none."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass
class AttackFigure:
    """A line of the table: a figure of the unlearned model before and after an attack, and the oracle's
    after it."""

    attack: str
    setting: str
    metric: str
    x: float | None = None
    before: Value = field(default_factory=lambda: Value(None))
    after: Value = field(default_factory=lambda: Value(None))
    oracle: Value = field(default_factory=lambda: Value(None))

    @property
    def name(self) -> str:
        """The attack with its setting, for a person."""
        return ", ".join(part for part in (NAMES.get(self.attack, self.attack), self.setting) if part)

    @property
    def metric_name(self) -> str:
        return METRICS.get(self.metric, self.metric.replace("_", " "))


def attack_figures(attacks: Any) -> list[AttackFigure]:
    """The lines, from ``attacks.json``, its list of rows, or rows of ``{"attack", "figure", "before",
    "after", "interval"}`` written by others; what says nothing is left out."""
    if isinstance(attacks, dict):
        attacks = attacks.get("attacks")
    found: dict[tuple, AttackFigure] = {}
    for entry in attacks if isinstance(attacks, list) else []:
        if not isinstance(entry, dict) or not entry.get("attack"):
            continue
        metric = str(entry.get("metric") or entry.get("figure") or "")
        key = str(entry["attack"]), str(entry.get("setting") or ""), metric
        line = found.setdefault(key, AttackFigure(*key, _number(entry.get("x"))))
        if entry.get("model") == ORACLE:
            line.oracle = _value(entry, "after", metric)
        else:
            line.before, line.after = (_value(entry, side, metric) for side in ("before", "after"))
    return list(found.values())


def told_lines(figures: Sequence[AttackFigure]) -> tuple[list[AttackFigure], list[AttackFigure]]:
    """What the table shows at once, and what is folded away: the relearning before its last step."""
    last = max((f.x or 0 for f in figures if f.attack == "relearn"), default=0)
    first = [f for f in figures if f.attack != "relearn" or (f.x or 0) == last]
    return first, [f for f in figures if f not in first]


def relearning_rows(attacks: Any) -> list[AttackRow]:
    """The rows of the relearning curve."""
    if isinstance(attacks, dict):
        attacks = attacks.get("attacks")
    rows = []
    for entry in attacks if isinstance(attacks, list) else []:
        try:
            row = AttackRow.from_json(entry)
        except (KeyError, TypeError, ValueError):
            continue
        if row.attack == "relearn" and row.x is not None:
            rows.append(row)
    return rows


def in_plain_words(figures: Sequence[AttackFigure], gone: bool = True) -> str:
    """The attack that brought back most, in a sentence; nothing where familiarity was not attacked.

    gone: whether it was gone before, so that something could come back.
    """
    for metric in ("familiarity_completion", "familiarity_probability"):
        lines = [f for f in figures if f.metric == metric]
        lines = [f for f in lines if f.before.value is not None and f.after.value is not None]
        if lines:
            break
    else:
        return ""
    kinds = ", ".join(dict.fromkeys(NAMES.get(f.attack, f.attack).lower() for f in figures))
    told = f"familiarity by {metric.split('_')[1]}"
    most = max(lines, key=lambda f: f.after.value - max(f.before.value, f.oracle.value or 0.0))
    gained = most.after.value - max(most.before.value, most.oracle.value or 0.0)
    if gained < _CAME_BACK:
        highest = max(f.after.value for f in lines)
        if highest - most.before.value >= _CAME_BACK:
            return f"No attack tried ({kinds}) brought out more than a model that never read the text gives."
        return (
            f"No attack tried ({kinds}) brought {'it back' if gone else 'out more'}: {told} is at most "
            f"{highest:.3f} under them, against "
            f"{most.before.value:.3f} without."
        )
    pair = f" ({most.after.interval[0]:.3f}–{most.after.interval[1]:.3f})" if most.after.interval else ""
    beside = (
        f"; a model that never read the text reaches {most.oracle.value:.3f} in the same way"
        if most.oracle.value is not None
        else ""
    )
    return (
        f"Under attack {'it comes back' if gone else 'more of it comes out'}: "
        f"{most.name[0].lower()}{most.name[1:]}, takes {told} from "
        f"{most.before.value:.3f} to {most.after.value:.3f}{pair}{beside}. "
        f"Tried: {kinds}."
    )


def _value(entry: dict[str, Any], side: str, metric: str) -> Value:
    given = entry.get("interval")
    value, pair = entry.get(side), (given if isinstance(given, dict) else {"after": given}).get(side)
    if isinstance(value, dict):  # a figure with its own interval
        figure = Figure(*(_or_nan(value.get(key)) for key in ("value", "low", "high")), value.get("n") or 0)
        number = _number(figure.value)
        share = metric != "general_perplexity"
        return Value(number, None if number is None else figure_interval(figure, share))
    ends = [_number(end) for end in pair] if isinstance(pair, (list, tuple)) else []
    return Value(_number(value), tuple(ends) if len(ends) == 2 and None not in ends else None)


def _or_nan(value: Any) -> float:
    number = _number(value)
    return math.nan if number is None else number


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
