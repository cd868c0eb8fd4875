"""The picture of a relearning attack: a figure against the steps of further training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from whp_fast.evaluation.attacks import AttackRow
from whp_fast.figures import BLUE, GREY, MODEL_COLOURS, STYLE, load_pyplot, save_picture

SHOWN = ("familiarity_completion", "familiarity_probability", "verbatim", "knowledge_accuracy")


def curve_series(rows: Sequence[AttackRow]) -> dict[str, dict[str, list[AttackRow]]]:
    """Metric -> model -> the rows of the relearning, in the order of their steps; metrics of `SHOWN` only."""
    series: dict[str, dict[str, list[AttackRow]]] = {}
    for metric in SHOWN:
        for row in rows:
            if row.attack == "relearn" and row.metric == metric:
                series.setdefault(metric, {}).setdefault(row.model, []).append(row)
    return {
        metric: {model: sorted(points, key=lambda row: row.x) for model, points in models.items()}
        for metric, models in series.items()
    }


def draw_relearning(path: Path, rows: Sequence[AttackRow]) -> Path | None:
    """A panel a metric with a line a model and its interval as a band; None where there is no such row."""
    series = curve_series(rows)
    if not series:
        return None
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        picture, grid = plt.subplots(
            1, len(series), figsize=(3.4 * len(series), 2.9), layout="constrained", squeeze=False
        )
        for axes, (metric, models) in zip(grid[0], series.items(), strict=True):
            for model, points in models.items():
                colour = MODEL_COLOURS.get(model, BLUE)
                steps = [row.x for row in points]
                axes.plot(steps, [r.after.value for r in points], color=colour, marker="o", ms=3, label=model)
                if all(math.isfinite(r.after.low) for r in points):
                    low, high = [r.after.low for r in points], [r.after.high for r in points]
                    axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            axes.set(title=metric.replace("_", " "), xlabel="steps of relearning", ylim=(-0.02, 1.02))
            axes.grid(axis="y", color=GREY, alpha=0.2, lw=0.6)
        if len(next(iter(series.values()))) > 1:
            grid[0][0].legend(frameon=False)
        return save_picture(picture, path)
