"""The pictures of the report, drawn by matplotlib without a display.

Each function takes plain lists and dictionaries (the fields of `whp_fast.report.ReportData`), writes one PNG
and returns its path. matplotlib is imported on the first call only. The colours are those of Okabe and Ito,
which people with any of the common kinds of colour blindness tell apart.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#E69F00"
INK, GREY, FAINT, RULE = "#222222", "#6B6B6B", "#9A9A9A", "#DDDDDD"
MODEL_COLOURS = {"before": "#B5B5B5", "after": BLUE, "oracle": GREEN}
DARK_VERMILION, TINT = "#A33F00", "#FCE9DF"
DPI = 160
# The page of labels, in inches and points.
PAGE_WIDTH, SIDE, BOX_HEIGHT, LINE_HEIGHT, TOKEN_SIZE, LABEL_SIZE = 10.0, 0.3, 0.40, 0.52, 9.5, 8
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a token "$" is a dollar sign
    "axes.edgecolor": FAINT,
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "figure.facecolor": "white",
    "hatch.linewidth": 0.5,
}


def draw_next_tokens(path: Path, panels: Sequence[dict[str, Any]]) -> Path:
    """Next-token probabilities of several prompts, a panel each, with a bar per model.

    panels: ``{"prompt": str, "bars": [{"token": str, "before": p, "after": p, "oracle": p or None}]}``.
    """
    plt = load_pyplot()
    models = [
        m for m in MODEL_COLOURS if any(bar.get(m) is not None for panel in panels for bar in panel["bars"])
    ]
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        longest = max(len(panel["bars"]) for panel in panels)
        height = 0.8 + (0.14 + 0.105 * len(models)) * longest
        figure, grid = plt.subplots(
            rows, columns, figsize=(5.3 * columns, rows * height + 0.6), layout="constrained", squeeze=False
        )
        figure.get_layout_engine().set(w_pad=0.1, wspace=0.03, hspace=0.05)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_bars(axes, panel, models)
        for axes in list(grid.flat)[len(panels) :]:
            axes.axis("off")
        handles = [plt.Rectangle((0, 0), 1, 1, color=MODEL_COLOURS[m]) for m in models]
        figure.legend(
            handles, models, loc="outside upper left", ncols=len(models), frameon=False, fontsize=10
        )
        return save_picture(figure, path)


def draw_label_page(path: Path, page: Sequence[dict[str, Any]], max_lines: int = 22) -> Path:
    """A page of the text with what is taught in the place of each token under it (the paper's Fig. 4).

    page: ``{"token": str, "label": str or None, "reason": str}`` in the order of the text; the label is the
    one that takes this token's place, None where nothing is taught there, with the reason. A grey label
    is the text's own token, a coloured one replaces it, hatched boxes are not trained.
    """
    plt = load_pyplot()
    from matplotlib.patches import FancyBboxPatch, Rectangle

    with plt.rc_context(STYLE):
        boxes = _laid_out(page, max_lines)
        looks = _looks_of_reasons(boxes)
        legend = [(RULE, "white", "", "the text's own token"), (VERMILION, TINT, "", "replaced")]
        legend += [(colour, "white", hatch, f"not trained: {r}") for r, (colour, hatch) in looks.items()]
        places, legend_lines = [], 1  # of the legend's entries: (x, line)
        x = SIDE
        for *_, words in legend:
            wide = 0.28 + _inches(words, 8.5) + 0.25
            if x > SIDE and x + wide > PAGE_WIDTH - SIDE + 0.25:
                x, legend_lines = SIDE, legend_lines + 1
            places.append((x, legend_lines - 1))
            x += wide

        top = 0.55 + 0.2 * legend_lines
        height = top + (1 + max((box.line for box in boxes), default=0)) * LINE_HEIGHT + 0.1
        figure = plt.figure(figsize=(PAGE_WIDTH, height))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, PAGE_WIDTH), ylim=(height, 0))  # in inches, y downwards
        axes.axis("off")
        title = "What is taught in the place of each token"
        axes.text(SIDE, 0.27, title, fontsize=11.5, weight="bold", va="center")
        for (edge, face, hatch, words), (x, line) in zip(legend, places, strict=True):
            axes.add_patch(
                Rectangle((x, 0.46 + 0.2 * line), 0.22, 0.13, fc=face, ec=edge, lw=0.8, hatch=hatch)
            )
            axes.text(x + 0.28, 0.53 + 0.2 * line, words, fontsize=8.5, va="center", color=GREY)
        for box in boxes:
            left, upper = SIDE + box.x, top + box.line * LINE_HEIGHT
            colour, hatch = looks.get(box.reason, (RULE if box.same else VERMILION, ""))
            look = {"ec": colour, "fc": "white" if box.same or box.reason else TINT, "lw": 0.8}
            outline = "round,pad=0,rounding_size=0.04"
            axes.add_patch(FancyBboxPatch((left, upper), box.width, BOX_HEIGHT, outline, **look))
            centred = {"x": left + box.width / 2, "ha": "center", "va": "baseline"}
            axes.text(
                y=upper + 0.16, s=box.token, fontsize=TOKEN_SIZE, color=GREY if box.reason else INK, **centred
            )
            if box.reason:
                inner = (left + 0.02, upper + 0.225), box.width - 0.04, 0.145
                axes.add_patch(Rectangle(*inner, fc="none", ec=colour, lw=0, hatch=hatch, alpha=0.8))
            else:
                colour, weight = (FAINT, "normal") if box.same else (DARK_VERMILION, "bold")
                axes.text(
                    y=upper + 0.335, s=box.label, fontsize=LABEL_SIZE, color=colour, weight=weight, **centred
                )
        return save_picture(figure, path)


@dataclass(frozen=True)
class _Box:
    """A token of the page: its two lines of text, why it is not trained (or ""), its place in inches."""

    token: str
    label: str
    same: bool
    reason: str
    x: float
    line: int
    width: float


def _laid_out(page: Sequence[dict[str, Any]], max_lines: int) -> list[_Box]:
    """The boxes of the page's tokens, in lines. A token that begins with a space stands apart."""
    boxes: list[_Box] = []
    x, line = 0.0, 0
    for entry in page:
        token, label = _shown_token(entry["token"]), _shown_token(entry["label"])
        same = entry["label"] == entry["token"]
        if token == label and not same:  # they differ in the space before them, so it has to be shown
            token, label = shown_piece(entry["token"]), shown_piece(entry["label"])
        label_width = _inches(label, LABEL_SIZE, "normal" if same else "bold")
        wide = max(_inches(token, TOKEN_SIZE), label_width, 0.06) + 0.09
        if boxes and not x and not entry["token"].strip():  # an empty line stays at the end of the one before
            x, line = boxes[-1].x + boxes[-1].width + 0.012, boxes[-1].line
        if x and entry["token"].startswith(" "):
            x += 0.075
        if x and x + wide > PAGE_WIDTH - 2 * SIDE:
            x, line = 0.0, line + 1
        if line >= max_lines:
            break
        reason = "" if entry["label"] is not None else entry["reason"] or "no reason given"
        boxes.append(_Box(token, label, same, reason, x, line, wide))
        x += wide + 0.012
        if entry["token"].endswith("\n"):
            x, line = 0.0, line + 1
    return boxes


def _looks_of_reasons(boxes: Sequence[_Box]) -> dict[str, tuple[str, str]]:
    """A colour and a hatch for each reason, in the order in which they come up."""
    looks = [
        (ORANGE, "////"),
        (SKY, "\\\\\\\\"),
        (PURPLE, "...."),
        (GREEN, "xxxx"),
        (FAINT, "----"),
        (BLUE, "++++"),
    ]
    reasons = dict.fromkeys(box.reason for box in boxes if box.reason)
    return {reason: looks[i % len(looks)] for i, reason in enumerate(reasons)}


def _inches(text: str, size: float, weight: str = "normal") -> float:
    """The width of a line of text in the font of the pictures."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a sign that the font lacks is drawn as a box
        font = FontProperties(family=STYLE["font.family"], weight=weight)
        return TextPath((0, 0), text, size=size, prop=font).get_extents().width / 72


def shown_piece(token: str) -> str:
    """A token for a person: the space at its front as an open box, line breaks and tabs as arrows."""
    text = _shown_token(token)
    return "␣" + text if token.startswith(" ") and text != "␣" else text


def _shown_token(token: str | None) -> str:
    """A token inside a box of its own: a first space is left to the layout, other blanks become signs."""
    if token is None:
        return ""
    text = token[1:] if token.startswith(" ") and token.strip() else token
    text = text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")
    text = re.sub(r"\s", lambda _: "␣", text) if not text.strip() or text[0].isspace() else text
    return text if len(text) <= 24 else text[:23] + "…"


def _draw_bars(axes, panel: dict[str, Any], models: Sequence[str]) -> None:
    """One panel of `draw_next_tokens`: a group of bars for each token, the models from top to bottom."""
    import textwrap

    bars, thick = panel["bars"], 0.82 / len(models)
    axes.set_title("\n".join(textwrap.wrap(f"{_shown_prompt(panel['prompt'])} ___", 50)), fontsize=10)
    widest = max((bar.get(model) or 0.0) for bar in bars for model in models)
    axes.set_xlim(0, max(widest, 0.01) * 1.12)
    for i, bar in enumerate(bars):
        for j, model in enumerate(models):
            value = bar.get(model)
            if value is None:
                continue
            y = i + (j - (len(models) - 1) / 2) * thick
            axes.barh(y, value, height=thick * 0.88, color=MODEL_COLOURS[model], zorder=2)
            shown = f"{value:.3f}" if value >= 0.0005 else "0"
            place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(shown, (value, y), fontsize=7, color=GREY, **place)
    axes.set_yticks(range(len(bars)), [shown_piece(bar["token"]) for bar in bars], fontsize=9.5, color=INK)
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _shown_prompt(prompt: str, most: int = 110) -> str:
    """The prompt on one line; of a long one the end, which is what the next token depends on most."""
    text = re.sub(r"\s*\n\s*", " ↵ ", prompt).strip()
    return text if len(text) <= most else "…" + text[-most + 1 :]


def load_pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or wanted
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, path: Path) -> Path:
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a sign that the font lacks is drawn as a box
        figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path
