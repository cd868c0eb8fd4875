"""One picture an operation: time and memory of every implementation, beside each other.

matplotlib is imported on the first call only. Colours are those of Okabe and Ito, as in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.loss_cases import OPS, Op, Sizes
from whp_fast.figures import DPI, FAINT, GREY, INK, RULE, STYLE

OURS, OURS_LIGHT = "#0072B2", "#8FC3E4"
OTHERS, OTHERS_LIGHT = "#8A8A8A", "#C9C9C9"
BAR, INCHES_A_BAR, INCHES_A_PANEL = 0.66, 0.27, 0.75
WRONG = 0.01  # relative errors from here on are named beside the bar


def draw(folder: Path, found: dict[str, Any], device: str) -> list[Path]:
    """Write ``loss_DEVICE_OP.png`` for each operation of the results ``found`` and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in dict.fromkeys(row["op"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["op"] == name]
        paths.append(_draw_op(folder / f"loss_{device}_{name}.png", name, rows, found["header"]))
    return paths


def _draw_op(path: Path, name: str, rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> Path:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or wanted
    from matplotlib import pyplot

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], Sizes(row["tokens"], row["vocab"], row["hidden"])), []).append(row)
    heights = [len(group) * INCHES_A_BAR + INCHES_A_PANEL for group in groups.values()]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(groups),
            2,
            figsize=(10.5, sum(heights) + 0.95),
            height_ratios=heights,
            width_ratios=(1.25, 1),
            squeeze=False,
            layout="constrained",
        )
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.04)
        figure.suptitle(OPS[name].title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
        for (time_axis, memory_axis), ((dtype, sizes), group) in zip(axes, groups.items()):
            draw_times(time_axis, group, f"{dtype}, {sizes}")
            draw_memory(memory_axis, group)
        figure.supxlabel(_note(OPS[name], header), x=0.012, ha="left", fontsize=8.5, color=GREY)
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)
    return path


def draw_times(axis, group: Sequence[dict[str, Any]], title: str) -> None:
    """Bars of both passes, each beside the other; factors are those to the first of ours."""
    ours = next((row["total_ms"] for row in group if row["ours"]), None)
    for at, row in enumerate(group):
        dark, light, style = _colours(row)
        axis.barh(at, row["fwd_ms"], BAR, color=dark, **style)
        axis.barh(at, row["bwd_ms"], BAR, left=row["fwd_ms"], color=light, **style)
        text = _number(row["total_ms"])
        if ours and row["total_ms"] != ours:
            text += f"   {_ratio(row['total_ms'] / ours)}"
        error = row.get("rel_err")
        if error is not None and error >= WRONG:
            text += f"   error {100 * error:.0f} %"
        _beside(axis, row["fwd_ms"] + row["bwd_ms"], at, text, row)
    _finish(axis, group, f"{title}: time in ms", max(row["total_ms"] for row in group), room=1.42)
    axis.set_yticks(range(len(group)), [row["label"] for row in group])
    for label, row in zip(axis.get_yticklabels(), group):
        label.set_color(INK if row["ours"] else GREY)
        label.set_fontweight("bold" if row["ours"] else "normal")


def draw_memory(
    axis, group: Sequence[dict[str, Any]], key: str = "peak_extra_mb", title: str = "peak memory in MB"
) -> None:
    """Bars of one figure of memory."""
    for at, row in enumerate(group):
        dark, _, style = _colours(row)
        axis.barh(at, row[key], BAR, color=dark, **style)
        _beside(axis, row[key], at, _number(row[key]), row)
    _finish(axis, group, title, max(row[key] for row in group), room=1.15)
    axis.set_yticks([])


def _finish(axis, group, title: str, most: float, room: float) -> None:
    axis.set_title(title, fontsize=10)
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlim(0, most * room or 1)
    axis.set_ylim(len(group) - 0.4, -0.6)
    axis.grid(axis="x", color=RULE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)


def _beside(axis, x: float, y: float, text: str, row: dict[str, Any]) -> None:
    axis.annotate(
        text,
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=OURS if row["ours"] else GREY,
        fontweight="bold" if row["ours"] else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _colours(row: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    if row["impl"] == "bare_gemms":
        return "none", "none", {"edgecolor": FAINT, "hatch": "/////", "linewidth": 0.8}
    dark, light = (OURS, OURS_LIGHT) if row["ours"] else (OTHERS, OTHERS_LIGHT)
    return dark, light, {"linewidth": 0}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}"


def _ratio(value: float) -> str:
    places = 0 if value >= 9.95 else 1 if value >= 1.95 else 2
    return f"{value:.{places}f}×"


def _note(op: Op, header: dict[str, Any]) -> str:
    where = header["device"] + (f", {header['threads']} threads" if header["threads"] else "")
    note = f"{where}, torch {header['versions']['torch']}."
    if op.gradient:
        note += "  Dark: forward pass, light: backward pass."
    note += "  ×: time divided by that of the first bar."
    return note
