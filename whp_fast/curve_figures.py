"""The curve: familiarity and utility by step, with intervals, as a picture and as parts of a page.

The style and the colours are those of `whp_fast.figures`.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whp_fast.figures import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    PURPLE,
    RULE,
    STYLE,
    VERMILION,
    load_pyplot,
    save_picture,
)


def draw_curve(
    path: Path, curve: Sequence[dict[str, Any]], oracle: dict[str, Any] | None = None, note: str = ""
) -> Path:
    """The paper's main figure: what is forgotten (left) and what that costs (right), by step.

    curve: ``{"step", "familiarity_completion", "familiarity_probability", "general_accuracy",
    "general_perplexity"}`` for each step, values may be None or missing; the first entry is the model before.
    Where a point has ``"intervals": {figure: (low, high) or None}`` they are drawn as a band.
    oracle: the four figures of a model that never saw the target, drawn as dashed lines.
    """
    plt = load_pyplot()
    familiarity, accuracy, perplexity = _curve_panels(curve, oracle or {})
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10.5, 4.9), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1), wspace=0.06, hspace=0.08)
        left = figure.add_subplot(grid[:, 0])
        draw_panel(left, familiarity, apart=0.048)
        upper, lower = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
        draw_panel(upper, accuracy, apart=0.13)
        draw_panel(lower, perplexity, apart=0.13)
        upper.tick_params(labelbottom=not lower.lines)
        if lower.lines:
            upper.set_xlabel("")
        if note:
            figure.supxlabel(note, fontsize=8.5, color=GREY, x=0.01, ha="left")
        return save_picture(figure, path)


def curve_svgs(
    curve: Sequence[dict[str, Any]], oracle: dict[str, Any] | None = None
) -> list[tuple[str, str]]:
    """The panels of `draw_curve` one by one, for a page: (what it shows in words, SVG).

    Text stays text, and the colours are the page's variables (`whp_fast.page`), so that they follow light and
    dark. A figure that was not measured has no panel.
    """
    return panel_svgs(_curve_panels(curve, oracle or {}), "curve")


def panel_svgs(panels: Sequence[Panel], name: str) -> list[tuple[str, str]]:
    """Panels one by one, for a page: (what each shows in words, SVG). ``name`` keeps their ids apart."""
    plt, made = load_pyplot(), []
    style = {"svg.fonttype": "none", "svg.hashsalt": "whp_fast", "font.size": 10, "axes.titlesize": 10.5}
    for number, panel in enumerate(panels):
        if not any(line.points for line in panel.lines):
            continue
        with plt.rc_context(STYLE | style):
            figure = plt.figure(figsize=(4.6, 3.1), layout="constrained")
            figure.get_layout_engine().set(w_pad=0.04, h_pad=0.06)
            draw_panel(figure.add_subplot(), panel, apart=0.075)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
            plt.close(figure)
        words = panel.in_words()
        made.append((words, _inline_svg(text.getvalue(), words, f"{name}{number}-")))
    return made


@dataclass(frozen=True)
class Line:
    """A figure by step: ``points`` of (step, value, interval or None), and the oracle's value or None."""

    name: str
    marker: str
    colour: str
    points: Sequence[tuple[float, float, tuple[float, float] | None]]
    oracle: float | None


@dataclass(frozen=True)
class Panel:
    """Lines with one y axis. ``least_span``: what it spans at least, so that noise looks like no change.
    ``steps``: what the x axis counts."""

    title: str
    better: str
    lines: Sequence[Line]
    least_span: float
    from_zero: bool = False
    steps: str = "step of the unlearning"

    def in_words(self) -> str:
        """The panel for a person who does not see it."""
        told = []
        for line in self.lines:
            if line.points:
                (first, value, _), (last, then, _) = line.points[0], line.points[-1]
                name = f"{line.name} " if line.name else ""
                name = f"by {name}" if line.name in ("completion", "probability") else name
                told.append(f"{name}{value:.3f} at step {first}, {then:.3f} at step {last}")
                if line.oracle is not None:
                    told[-1] += f", oracle {line.oracle:.3f}"
        return f"{self.title}, {self.better} is better: {'; '.join(told)}."


def _curve_panels(curve: Sequence[dict[str, Any]], oracle: dict[str, Any]) -> tuple[Panel, Panel, Panel]:
    """Familiarity, accuracy, and perplexity as a multiple of that before."""
    curve = sorted(curve, key=lambda point: point["step"])
    familiarity = [
        Line(kind, marker, colour, _series(curve, f"familiarity_{kind}"), oracle.get(f"familiarity_{kind}"))
        for kind, marker, colour in (("completion", "o", VERMILION), ("probability", "s", BLUE))
    ]
    accuracy = _series(curve, "general_accuracy")
    price = _series(curve, "general_perplexity")
    first, at_oracle = price[0][1] if price else None, oracle.get("general_perplexity")
    ratio = at_oracle / first if first and at_oracle is not None else None
    price = [(x, y / first, pair and tuple(end / first for end in pair)) for x, y, pair in price]
    return (
        Panel("Familiarity with the target", "lower", familiarity, 0.05, from_zero=True),
        Panel(
            "General accuracy",
            "higher",
            [Line("", "o", GREEN, accuracy, oracle.get("general_accuracy"))],
            0.1,
        ),
        Panel("General perplexity / before", "lower", [Line("", "o", PURPLE, price, ratio)], 0.1),
    )


def draw_panel(axes, panel: Panel, *, apart: float) -> None:
    """The lines with their intervals as bands, and names and last values beside them.

    apart: least distance of two labels, as a share of the height.
    """
    axes.set_title(f"{panel.title}  ({panel.better} is better)")
    lines = [line for line in panel.lines if line.points]
    if not lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        axes.set(xticks=[], yticks=[], xlabel="")
        axes.spines[:].set_visible(False)
        return
    labels, values = [], []
    for line in lines:
        steps, heights, pairs = zip(*line.points, strict=True)
        look = {"color": line.colour, "zorder": 3, "clip_on": False}
        axes.plot(steps, heights, marker=line.marker, ms=4.5, lw=2, **look)
        known = [(step, *pair) for step, pair in zip(steps, pairs, strict=True) if pair is not None]
        if known:
            at, low, high = zip(*known, strict=True)
            axes.fill_between(at, low, high, color=line.colour, alpha=0.16, lw=0, zorder=1)
            values += low + high
        labels.append((heights[-1], f"{line.name} {heights[-1]:.3f}".strip(), line.colour, "bold"))
        values += heights
        if line.oracle is not None:
            axes.axhline(line.oracle, color=line.colour, lw=1.2, ls=(0, (5, 3)), alpha=0.85, zorder=2)
            labels.append((line.oracle, f"oracle {line.oracle:.3f}", line.colour, "normal"))
            values.append(line.oracle)
    low, high = min(values), max(values)
    if panel.from_zero:
        axes.set_ylim(0, max(high * 1.04, panel.least_span))
    else:
        middle, half = (low + high) / 2, 0.56 * max(high - low, panel.least_span)
        axes.set_ylim(middle - half, middle + half)
    axes.set_xlim(min(line.points[0][0] for line in lines), max(line.points[-1][0] for line in lines) or 1)
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=6)
    axes.set_xlabel(panel.steps)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _label_right(axes, labels, apart)


# The pictures' colours as the variables of the page.
_VARIABLES = {
    INK: "ink",
    GREY: "grey",
    FAINT: "faint",
    RULE: "rule",
    BLUE: "blue",
    VERMILION: "vermilion",
    GREEN: "green",
    PURPLE: "purple",
}


def _inline_svg(svg: str, words: str, prefix: str) -> str:
    """A file of matplotlib's as an element of a page: named, with its own ids, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}", svg)
    for colour, name in _VARIABLES.items():
        svg = re.sub(re.escape(colour), f"var(--{name})", svg, flags=re.IGNORECASE)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(words, quote=True)}" ', 1).strip()


def _label_right(axes, labels: Sequence[tuple[float, str, str, str]], apart: float) -> None:
    """Labels of (y, text, colour, weight) to the right of the axes, each at its y but never over another."""
    bottom, top = axes.get_ylim()
    labels = sorted(labels)
    wanted = [(y - bottom) / (top - bottom) for y, *_ in labels]
    places = []
    for place in wanted:  # from below, each at least `apart` above the one before
        places.append(max(place, places[-1] + apart) if places else max(place, 0.0))
    for i in reversed(range(len(places))):  # and back down where that has left the picture
        places[i] = min(places[i], 1.0 if i == len(places) - 1 else places[i + 1] - apart)
    for (_, text, colour, weight), place, at in zip(labels, places, wanted, strict=True):
        axes.plot(
            [1.0, 1.025, 1.045],
            [at, place, place],
            transform=axes.transAxes,
            color=colour,
            lw=0.7,
            clip_on=False,
        )
        axes.text(
            1.055, place, text, transform=axes.transAxes, color=colour, weight=weight, va="center", fontsize=9
        )


def _series(
    curve: Sequence[dict[str, Any]], name: str
) -> list[tuple[float, float, tuple[float, float] | None]]:
    return [
        (point["step"], point[name], (point.get("intervals") or {}).get(name))
        for point in curve
        if point.get(name) is not None
    ]
