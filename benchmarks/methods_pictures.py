"""Two pictures of the methods' results.

    methods_forget_keep.png   what is left of the text against what is kept, every setting that was tried
    methods_return.png        familiarity after forgetting, with 4-bit weights and after relearning

Methods that diverged at every setting are in neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods_labels import place_labels
from whp_fast.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RULE,
    STYLE,
    VERMILION,
    load_pyplot,
    save_picture,
)

_MODELS = ("base", "oracle")


def draw(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Draw a file's content (``header``, ``rows``, ``search``) into a folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in found["rows"] if row["status"] != "diverged"]
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        return [
            _forget_keep(plt, folder / "methods_forget_keep.png", rows, found),
            _return(plt, folder / "methods_return.png", rows, found),
        ]


def _forget_keep(plt, path: Path, rows: Sequence[dict], found: dict[str, Any]) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 6.2), layout="constrained")
    _title(figure, "Forgetting against keeping")
    base = next(row for row in rows if row["method"] == "base")
    tried = [row for row in found["search"] if row["status"] != "diverged"]
    groups = {row["method"]: row for row in rows}
    reference = _search_reference(found, base)
    for axis, keep, heading in ((axes[0], _accuracy, "accuracy"), (axes[1], _fluency, "fluency")):
        low = min(keep(row, base) for row in rows) - 0.1
        for row in tried:
            left, kept = _left(row, reference), keep(row, reference)
            colour = _colour(groups.get(row["method"], row))
            marker = "o" if kept >= low else "v"
            axis.plot(left, max(kept, low + 0.012), marker, ms=4.5, color=colour, alpha=0.28, mew=0)
        points, names, colours = [], [], []
        for row in rows:
            points.append((_left(row, base), keep(row, base)))
            names.append(row["method"])
            colours.append(_colour(row))
            marker = "D" if row["method"] in _MODELS else "o"
            axis.plot(*points[-1], marker, ms=8, color=colours[-1], mec="white", mew=0.8, zorder=3)
        axis.set_title(f"{heading} that is kept")
        axis.set_xlabel("familiarity that is left, share of the base's")
        axis.set_xlim(-0.06, 1.14)
        axis.set_ylim(low, 1.12)
        axis.set_ylabel(
            "general accuracy, share of the base's"
            if heading == "accuracy"
            else "perplexity of the base / own perplexity, general text"
        )
        axis.grid(color=RULE, linewidth=0.7)
        axis.set_axisbelow(True)
        place_labels(figure, axis, points, names, colours)
    _legend(plt, figure)
    figure.supxlabel(
        "Large: the setting with the best score of the search, on the report half. Pale: every setting that "
        f"was tried, on the search half; triangles lie below. {_note(found)}",
        x=0.012,
        ha="left",
        fontsize=8.5,
        color=GREY,
    )
    return save_picture(figure, path)


def _return(plt, path: Path, rows: Sequence[dict], found: dict[str, Any]) -> Path:
    rows = sorted(rows, key=lambda row: (row["method"] in _MODELS, row["relearnt_familiarity_completion"]))
    figure, axis = plt.subplots(figsize=(9.5, 0.36 * len(rows) + 1.9), layout="constrained")
    _title(figure, "What comes back")
    oracle = next((row for row in rows if row["method"] == "oracle"), None)
    if oracle is not None:
        axis.axvline(oracle["relearnt_familiarity_completion"], color=GREEN, lw=1, ls=(0, (4, 3)), zorder=1)
    kinds = (
        ("familiarity_completion", "o", "after forgetting"),
        ("quantised_familiarity_completion", "s", "with 4-bit weights"),
        ("relearnt_familiarity_completion", ">", "after relearning"),
    )
    for at, row in enumerate(rows):
        values = [row[key] for key, *_ in kinds if row[key] is not None]
        colour = _colour(row)
        axis.plot([min(values), max(values)], [at, at], color=colour, lw=1.4, alpha=0.45, zorder=2)
        for (key, marker, _), fill, size in zip(kinds, (colour, "white", colour), (9, 6, 6)):
            if row[key] is not None:
                axis.plot(row[key], at, marker, ms=size, color=colour, mfc=fill, zorder=3, clip_on=False)
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows):
        label.set_color(_colour(row))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("familiarity by completion")
    axis.grid(axis="x", color=RULE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    handles = [
        plt.Line2D([], [], ls="", marker=marker, color=INK, mfc="white" if marker == "s" else INK, label=name)
        for _, marker, name in kinds
    ]
    handles.append(plt.Line2D([], [], color=GREEN, lw=1, ls=(0, (4, 3)), label="oracle, after relearning"))
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    relearn = found["header"]["settings"]["relearn"]
    figure.supxlabel(
        f"Relearning: {relearn['steps']} steps at {relearn['lr']:g} on a tenth of the text. {_note(found)}",
        x=0.012,
        ha="left",
        fontsize=8.5,
        color=GREY,
    )
    return save_picture(figure, path)


def _search_reference(found: dict[str, Any], base: dict) -> dict:
    """The base on the search half, to which its rows are put in relation."""
    return found["header"].get("base_on_search_half") or base


def _left(row: dict, base: dict) -> float:
    names = ("familiarity_completion", "familiarity_probability")
    whole = sum(base[name] for name in names)
    return sum(row[name] for name in names) / whole if whole else 0.0


def _accuracy(row: dict, base: dict) -> float:
    return row["general_accuracy"] / base["general_accuracy"] if base["general_accuracy"] else 0.0


def _fluency(row: dict, base: dict) -> float:
    own = row["general_perplexity"]
    return 0.0 if own is None or not math.isfinite(own) else base["general_perplexity"] / own


_KINDS = {
    "WHP": BLUE,
    "with text to keep": VERMILION,
    "without": ORANGE,
    "base": GREY,
    "oracle": GREEN,
}


def _kind(row: dict) -> str:
    if row["method"] in _MODELS:
        return row["method"]
    if row["method"].startswith("WHP"):
        return "WHP"
    return "with text to keep" if row.get("retain_text") else "without"


def _colour(row: dict) -> str:
    return _KINDS[_kind(row)]


def _legend(plt, figure) -> None:
    names = {"WHP": "WHP", "with text to keep": "others, with text to keep", "without": "others, without"}
    handles = [
        plt.Line2D([], [], ls="", marker="o", ms=8, color=_KINDS[kind], label=name)
        for kind, name in names.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9.5)


def _title(figure, text: str) -> None:
    figure.suptitle(text, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)


def _note(found: dict[str, Any]) -> str:
    header = found["header"]
    return f"Demo world, seed {header['settings']['seed']}, torch {header['versions']['torch']}."
