"""The report of a run: ``report.md`` with pictures for a person, ``metrics.json`` for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whp_fast import figures
from whp_fast.evaluate import FIGURES, EvaluationResult
from whp_fast.figures import shown_piece
from whp_fast.judge import spans
from whp_fast.markdown import code, duration, escaped

MAX_PANELS = 6  # prompts in the picture of next tokens
MAX_BARS = 6  # tokens of each of them
MAX_COMPLETIONS = 12
LEAKS_SHOWN = 3  # of those, how many places are kept for what the unlearned model still gives away

LIMITS = """## What these figures do not show

They are not adversarial: the prompts ask in the language and style of the target, and an attacker would
not stop there. For the published model of this method it is known that membership scores pointed to 188
of about 1,000 passages as probably not forgotten, and 5.3 % of the completions of those came close to
the text (Shi et al. 2023, arXiv 2310.16789); that more than the baseline's knowledge can be extracted,
and questions are answered on a par with the original model (Lynch et al. 2024, arXiv 2402.16835); and
that it answers when asked in Russian, and 50 % of the tested passages can still be called up by a
shorter prompt, against 57 % before (Schwarzschild et al. 2024, arXiv 2404.15146). Of unlearning in
general it is known that further training on related public text brings content back (Hu et al. 2024,
arXiv 2406.13356), and so does quantisation to 4 bits, most of all after small learning rates (Zhang et
al. 2024, arXiv 2410.16454). Paraphrase, translation, relearning and quantisation were not tried here.
The default judge looks up listed words and does not see knowledge told in other words."""


@dataclass
class ReportData:
    """Everything the report shows. What is empty or None is left out of it."""

    title: str
    """Heading of the report."""
    model_name: str
    """The model that was unlearned, as a person would name it."""
    settings: dict[str, Any]
    """The settings of the run, JSON types, sections as nested dictionaries: ``{"unlearn": {"lr": 1e-6}}``."""
    before: EvaluationResult
    """The model before."""
    after: EvaluationResult
    """The unlearned model."""
    oracle: EvaluationResult | None = None
    """A model that never saw the target, if there is one."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """A point for each evaluation during the unlearning, step 0 first: ``{"step": int}`` and the four figures
    under their names (as `EvaluationResult.figures` gives them)."""
    curve_prompts: int | None = None
    """How many prompts of each kind the points of the curve rest on; None or 0: all."""
    label_stats: dict[str, Any] = field(default_factory=dict)
    """``{"positions": int, "trained": int, "changed_from_text": int, "changed_from_base": int, "masked":
    {reason: int}, "replacements": [{"text": str, "label": str, "count": int}]}``, the commonest first."""
    label_page: list[dict[str, Any]] = field(default_factory=list)
    """A piece of the text, for each token ``{"token": str, "label": str or None, "reason": str}``. The label
    is what is taught in this token's place (the label of the position before), None where nothing is."""
    next_tokens: list[dict[str, Any]] = field(default_factory=list)
    """Next-token probabilities by prompt, as `join_next_tokens` makes them from tables of each model."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of each stage, in order; ``"total"`` is their sum if it is not given."""


def write_report(folder: Path | str, data: ReportData) -> Path:
    """Write ``report.md``, ``metrics.json`` and the pictures into the folder; returns the path of the report.

    Pictures: ``curve.png`` (from two points of the curve on), ``next_tokens.png``, ``labels.png``.
    ``metrics.json`` holds before, after, oracle (four figures each; oracle may be null), seconds, settings
    and curve.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "before": data.before.figures,
        "after": data.after.figures,
        "oracle": data.oracle.figures if data.oracle else None,
        "seconds": _with_total(data.seconds),
        "settings": data.settings,
        "curve": data.curve,
    }
    text = json.dumps(_finite(metrics), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    sections = [
        _answer(data),
        _curve(folder, data),
        _completions(data),
        _next_tokens(folder, data),
        _labels(folder, data),
        LIMITS,
        _settings(data),
        _seconds(data),
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return report


def join_next_tokens(
    before: Sequence[dict], after: Sequence[dict], oracle: Sequence[dict] | None = None
) -> list[dict[str, Any]]:
    """Tables of `whp_fast.evaluate.next_token_table` of the same prompts, for `ReportData.next_tokens`.

    Returns for each ``{"prompt", "before": [{"token", "id", "probability"}], "after", "oracle" (or None)}``.
    """
    tables = {"after": {entry["prompt"]: entry["tokens"] for entry in after}}
    tables["oracle"] = {entry["prompt"]: entry["tokens"] for entry in oracle or ()}
    return [
        {
            "prompt": entry["prompt"],
            "before": entry["tokens"],
            "after": tables["after"][entry["prompt"]],
            "oracle": tables["oracle"].get(entry["prompt"]),
        }
        for entry in before
        if entry["prompt"] in tables["after"]
    ]


def share_removed(before: float | None, after: float | None, oracle: float | None) -> float | None:
    """How much of the way from before down to the oracle (without one, to 0) has been gone; 1 is all of it.

    None where it was not measured, or where the model before was hardly above that floor (by 0.005).
    """
    if before is None or after is None:
        return None
    floor = min(oracle or 0.0, before)
    return None if before - floor < 0.005 else (before - after) / (before - floor)


def verdict(data: ReportData) -> str:
    """One word of judgement from the familiarity of which least was removed."""
    oracle = data.oracle.figures if data.oracle else {}
    before, after = data.before.figures, data.after.figures
    removed = [share_removed(before[name], after[name], oracle.get(name)) for name in FIGURES[:2]]
    known = [share for share in removed if share is not None]
    if not known:
        measured = any(before[name] is not None and after[name] is not None for name in FIGURES[:2])
        return "There was little to forget" if measured else "Not measured"
    for least, words in (
        (0.95, "Gone, as far as these prompts can tell"),
        (0.75, "Mostly gone"),
        (0.25, "Partly gone"),
    ):
        if min(known) >= least:
            return words
    return "No, it is still there"


def _answer(data: ReportData) -> str:
    """The first lines: is it gone, at what price, and the table behind it."""
    before, after = data.before.figures, data.after.figures
    oracle = data.oracle.figures if data.oracle else dict.fromkeys(FIGURES)

    def change(name: str) -> str:
        return f"{_number(name, before[name])} → {_number(name, after[name])}"

    def measured(name: str) -> bool:
        return before[name] is not None and after[name] is not None

    gone = [f"familiarity by {name.split('_')[1]} {change(name)}" for name in FIGURES[:2] if measured(name)]
    price = []
    if measured("general_accuracy"):
        points = 100 * (after["general_accuracy"] - before["general_accuracy"])
        price.append(f"general accuracy {change('general_accuracy')} ({_signed(points)} points)")
    if measured("general_perplexity"):
        percent = 100 * (after["general_perplexity"] / before["general_perplexity"] - 1)
        price.append(f"general perplexity {change('general_perplexity')} ({_signed(percent)} %)")
    lines = [
        f"# {escaped(data.title)}",
        "",
        f"**Is it gone?** {verdict(data)}{': ' if gone else ''}{'; '.join(gone)}.",
        "",
        f"**At what price?** {_upper('; '.join(price)) or 'Not measured'}.",
        "",
        f"Model: {escaped(data.model_name)}.",
        "",
        "| | before | after | oracle | better |" if data.oracle else "| | before | after | better |",
        "|---|---:|---:|---:|---|" if data.oracle else "|---|---:|---:|---|",
    ]
    names = (
        "Familiarity (completion)",
        "Familiarity (probability)",
        "General accuracy",
        "General perplexity",
    )
    for name, words, better in zip(FIGURES, names, ("lower", "lower", "higher", "lower"), strict=True):
        values = [_number(name, values[name]) for values in (before, after, oracle)]
        lines.append(f"| {words} | {' | '.join(values if data.oracle else values[:2])} | {better} |")
    counts = data.after.counts
    basis = [
        (counts.get("familiarity_prompts"), "completions"),
        (counts.get("probability_prompts"), "next-word prompts"),
        (counts.get("choice_questions", 0) + counts.get("cloze_questions", 0), "questions"),
        (counts.get("text_tokens"), "tokens of general text"),
    ]
    basis = [f"{number:,} {what}" for number, what in basis if number]
    if basis:
        lines += ["", f"Measured on {', '.join(basis)}."]
    if data.oracle:
        lines += ["", "The oracle is a model that never saw the target: what forgetting would reach at best."]
    floor = "the oracle" if data.oracle else "0"
    lines += [
        "",
        f"_The verdict goes by the familiarity of which less was removed, on the way from before to {floor}: "
        "gone from 95 %, mostly from 75 %, partly from 25 %._",
    ]
    return "\n".join(lines)


def _curve(folder: Path, data: ReportData) -> str:
    if len(data.curve) < 2:
        return ""
    note = f"Each point: the same {data.curve_prompts} prompts of each kind." if data.curve_prompts else ""
    oracle = data.oracle.figures if data.oracle else {}
    if oracle:
        note += " Dashed: the oracle, a model that never saw the target, on all prompts."
    figures.draw_curve(folder / "curve.png", _finite(data.curve), oracle, note.strip())
    return "## Forgetting, step by step\n\n![Familiarity and utility by step](curve.png)"


def _completions(data: ReportData) -> str:
    """The most telling completions: the greatest falls in class, and what still leaks."""
    after = {row["prompt"]: row for row in data.after.completions}
    pairs = [(row, after[row["prompt"]]) for row in data.before.completions if row["prompt"] in after]
    if not pairs:
        return ""
    leaks = sorted((p for p in pairs if p[1]["class"] >= 2), key=lambda p: -p[1]["class"])
    # Most telling: the class falls far, and the text changes with it; shorter prompts are read more easily.
    falls = sorted(
        (p for p in pairs if p[1]["class"] < 2),
        key=lambda p: (
            p[1]["class"] - p[0]["class"],
            p[0]["completion"] == p[1]["completion"],
            len(p[0]["prompt"]),
        ),
    )
    places = MAX_COMPLETIONS - min(LEAKS_SHOWN, len(leaks))
    shown = falls[:places]
    shown += leaks[: MAX_COMPLETIONS - len(shown)]
    lines = [
        "## What it says",
        "",
        f"Greedy completions: {len(shown)} of {len(pairs)} prompts, those with the greatest change first"
        + (
            f", and {len(shown) - len(falls[:places])} of the {len(leaks)} that still give something away"
            if leaks
            else ""
        )
        + ". In bold what the judge took as a sign; the class from 0 (none) to 3 (explicit) in brackets.",
        "",
        "| prompt | before | after |",
        "|---|---|---|",
    ]
    for old, new in shown:
        lines.append(f"| {escaped(old['prompt'])} | {_completion(old)} | {_completion(new)} |")
    return "\n".join(lines)


def _completion(row: dict[str, Any]) -> str:
    """A completion with the expressions that gave it its class in bold."""
    text, shown, end = row["completion"], "", 0
    for match in spans(text, row.get("found", ())):
        shown += escaped(text[end : match[0]], strip=False) + f"**{escaped(text[slice(*match)])}**"
        end = match[1]
    shown += escaped(text[end:], strip=False)
    return f"{shown.strip() or '_nothing_'} ({row['class']})"


def _next_tokens(folder: Path, data: ReportData) -> str:
    panels = [{"prompt": entry["prompt"], "bars": _bars(entry)} for entry in data.next_tokens[:MAX_PANELS]]
    panels = [panel for panel in panels if panel["bars"]]
    if not panels:
        return ""
    figures.draw_next_tokens(folder / "next_tokens.png", panels)
    return (
        "## What it expects next\n\n"
        "Probabilities of the next token; ␣ is a space before it.\n\n"
        "![Next-token probabilities by model](next_tokens.png)"
    )


def _bars(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens most probable to any of the models, the most probable before first, with all probabilities.

    A token outside a model's table is shown as 0; it has at most the probability of the table's last token.
    """
    models = [model for model in ("before", "after", "oracle") if entry.get(model)]
    tables = {model: {token["id"]: token for token in entry[model]} for model in models}
    tokens = {i: token["token"] for model in models for i, token in tables[model].items()}

    def probability(model: str, token: int) -> float:
        return tables[model][token]["probability"] if token in tables[model] else 0.0

    most = sorted(tokens, key=lambda i: (-max(probability(model, i) for model in models), i))[:MAX_BARS]
    return [
        {"token": tokens[i]} | {model: probability(model, i) for model in models}
        for i in sorted(most, key=lambda i: (-probability("before", i), i))
    ]


def _labels(folder: Path, data: ReportData) -> str:
    stats, lines = data.label_stats, []
    if stats.get("positions"):
        trained, positions = stats["trained"], stats["positions"]

        def share(name: str) -> str:
            return f"{stats[name]:,} ({100 * stats[name] / max(trained, 1):.1f} %)"

        lines += [
            "## What was taught",
            "",
            f"{trained:,} of {positions:,} positions ({100 * trained / positions:.1f} %) are trained. "
            f"Of these, {share('changed_from_text')} differ from the text's own next token, and "
            f"{share('changed_from_base')} from what the base model says on the translated text: these the "
            "reinforced model changed.",
        ]
        if stats.get("masked"):
            lines += ["", "| not trained | positions | share |", "|---|---:|---:|"]
            for reason, count in sorted(stats["masked"].items(), key=lambda item: -item[1]):
                lines.append(f"| {escaped(reason)} | {count:,} | {100 * count / positions:.1f} % |")
        if stats.get("replacements"):
            lines += ["", "The commonest replacements:", "", "| text | label | times |", "|---|---|---:|"]
            for row in stats["replacements"][:20]:
                text, label = code(shown_piece(row["text"])), code(shown_piece(row["label"]))
                lines.append(f"| {text} | {label} | {row['count']:,} |")
    if data.label_page:
        figures.draw_label_page(folder / "labels.png", data.label_page)
        lines += ([""] if lines else ["## What was taught", ""]) + ["![A page with its labels](labels.png)"]
    return "\n".join(lines)


def _settings(data: ReportData) -> str:
    rows = [(name, value) for name, value in _flat(data.settings) if value not in ("", None, [], {})]
    if not rows:
        return ""
    lines = ["## Settings", "", "| setting | value |", "|---|---|"]
    for name, value in rows:
        shown = value if isinstance(value, str) else json.dumps(_finite(value), ensure_ascii=False)
        lines.append(f"| {code(name)} | {code(shown)} |")
    return "\n".join(lines)


def _seconds(data: ReportData) -> str:
    if not data.seconds:
        return ""
    lines = ["## Time", "", "| stage | time |", "|---|---:|"]
    for stage, seconds in _with_total(data.seconds).items():
        bold = "**" if stage == "total" else ""
        lines.append(f"| {bold}{escaped(stage)}{bold} | {bold}{duration(seconds)}{bold} |")
    return "\n".join(lines)


def _with_total(seconds: dict[str, float]) -> dict[str, float]:
    stages = {stage: value for stage, value in seconds.items() if stage != "total"}
    return stages | {"total": seconds.get("total", sum(stages.values()))}


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if name == "general_perplexity" else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: no "−0.0"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested sections as dotted names."""
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _finite(value: Any) -> Any:
    """The same value in types that JSON has; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
