"""The picture of a relearning attack: figures against the steps of further training, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from whp_fast import intervals
from whp_fast.curve_figures import Line, Panel, draw_panel, panel_svgs
from whp_fast.evaluation.attacks import AttackRow
from whp_fast.evaluation.bootstrap import Figure
from whp_fast.figures import BLUE, GREEN, STYLE, load_pyplot, save_picture

SHOWN = {
    "familiarity_completion": "Familiarity (completion)",
    "familiarity_probability": "Familiarity (probability)",
    "verbatim": "Verbatim (ROUGE-L)",
    "knowledge_accuracy": "Questions on the text",
}


def curve_series(rows: Sequence[AttackRow]) -> dict[str, dict[str, list[AttackRow]]]:
    """Metric -> model -> the rows of the relearning, in the order of their steps; metrics of `SHOWN` only."""
    series: dict[str, dict[str, list[AttackRow]]] = {}
    for metric in SHOWN:
        for row in rows:
            if row.attack == "relearn" and row.metric == metric and math.isfinite(row.after.value):
                series.setdefault(metric, {}).setdefault(row.model, []).append(row)
    return {
        metric: {model: sorted(points, key=lambda row: row.x) for model, points in models.items()}
        for metric, models in series.items()
    }


def draw_relearning(path: Path, rows: Sequence[AttackRow]) -> Path | None:
    """A panel a metric with a line a model and its interval as a band; None where there is no such row."""
    panels = relearning_panels(rows)
    if not panels:
        return None
    plt = load_pyplot()
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        picture, grid = plt.subplots(
            lines, columns, figsize=(5.3 * columns, 3.2 * lines), layout="constrained", squeeze=False
        )
        picture.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        for axes, panel in zip(grid.flat, panels, strict=False):
            draw_panel(axes, panel, apart=0.08)
        for axes in list(grid.flat)[len(panels) :]:
            axes.axis("off")
        return save_picture(picture, path)


def relearning_svgs(rows: Sequence[AttackRow]) -> list[tuple[str, str]]:
    """The panels of `draw_relearning` one by one, for a page: (what it shows in words, SVG)."""
    return panel_svgs(relearning_panels(rows), "relearning")


def relearning_panels(rows: Sequence[AttackRow]) -> list[Panel]:
    """A panel a metric with a line a model."""
    panels = []
    for metric, models in curve_series(rows).items():
        if max(map(len, models.values())) < 2:
            continue  # one point makes no curve
        lines = []
        for model, points in models.items():
            name, marker, colour = ("oracle", "s", GREEN) if model == "oracle" else ("unlearned", "o", BLUE)
            line = [(row.x, row.after.value, figure_interval(row.after)) for row in points]
            lines.append(Line(name, marker, colour, line, None))
        panels.append(Panel(SHOWN[metric], "lower", lines, 1.0, from_zero=True, steps="steps of relearning"))
    return panels


def figure_interval(figure: Figure, share: bool = True) -> intervals.Interval | None:
    """The interval of a figure. One without width shows only that all units gave the same: for a ``share``
    (a mean of values between 0 and 1) Wilson's is taken then."""
    pair = (figure.low, figure.high)
    if all(map(math.isfinite, pair)) and pair[1] > pair[0]:
        return pair
    if share and 0 <= figure.value <= 1:
        return intervals.wilson(figure.value, figure.n)
    return None
