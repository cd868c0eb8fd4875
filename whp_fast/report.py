"""The report of a run: ``report.html`` and ``report.md`` with pictures for a person, ``metrics.json`` for a
program.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whp_fast import figures
from whp_fast.curve_figures import draw_curve
from whp_fast.evaluate import FIGURES
from whp_fast.evaluation.curve import draw_relearning
from whp_fast.figures import shown_piece
from whp_fast.judge import spans
from whp_fast.markdown import code, escaped
from whp_fast.report_attacks import attack_figures, relearning_rows, told_lines
from whp_fast.report_attacks import in_plain_words as under_attack
from whp_fast.report_content import (
    ATTACKS,
    ATTACKS_ORACLE,
    BETTER,
    INTERVALS,
    MAX_PANELS,
    NAMES,
    ReportData,
    bars,
    basis,
    completion_pairs,
    curve_with_intervals,
    figure_intervals,
    finite,
    join_next_tokens,
    number,
    setting_rows,
    share_removed,
    signed,
    verdict,
    verdict_rule,
    was_gone,
    with_interval,
)
from whp_fast.report_cost import cost_table, gpu_seconds, with_total
from whp_fast.report_page import report_page

__all__ = ["ReportData", "join_next_tokens", "share_removed", "verdict", "write_report"]


def write_report(folder: Path | str, data: ReportData) -> Path:
    """Write ``report.html``, ``report.md``, ``metrics.json`` and the pictures into the folder; returns the
    path of ``report.md``.

    The HTML page holds its pictures. Those of the Markdown: ``curve.png`` (from two points of the curve on),
    ``next_tokens.png``, ``labels.png``. ``metrics.json`` holds before, after, oracle (four figures each;
    oracle may be null), seconds, GPU-seconds, joules, settings, curve, the intervals of the figures of each
    model, attacks and warnings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "before": data.before.figures,
        "after": data.after.figures,
        "oracle": data.oracle.figures if data.oracle else None,
        "seconds": with_total(data.seconds),
        "gpu_seconds": gpu_seconds(data),
        "joules": data.energy,
        "settings": data.settings,
        "curve": curve_with_intervals(data),
        "intervals": figure_intervals(data),
        "attacks": [asdict(line) for line in attack_figures(data.attacks)],
        "warnings": data.warnings,
    }
    text = json.dumps(finite(metrics), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    sections = [
        _answer(data),
        _curve(folder, data),
        _completions(data),
        _next_tokens(folder, data),
        _labels(folder, data),
        _attacks(folder, data),
        f"## What these figures do not show\n\n{data.limits}",
        _settings(data),
        _cost(data),
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(report_page(data), encoding="utf-8")
    return report


def _answer(data: ReportData) -> str:
    """The first lines: is it gone, at what price, and the table behind it."""
    before, after = data.before.figures, data.after.figures

    def change(name: str) -> str:
        return f"{number(name, before[name])} → {number(name, after[name])}"

    def measured(name: str) -> bool:
        return before[name] is not None and after[name] is not None

    gone = [f"familiarity by {name.split('_')[1]} {change(name)}" for name in FIGURES[:2] if measured(name)]
    price = []
    if measured("general_accuracy"):
        points = 100 * (after["general_accuracy"] - before["general_accuracy"])
        price.append(f"general accuracy {change('general_accuracy')} ({signed(points)} points)")
    if measured("general_perplexity"):
        percent = 100 * (after["general_perplexity"] / before["general_perplexity"] - 1)
        price.append(f"general perplexity {change('general_perplexity')} ({signed(percent)} %)")
    known = figure_intervals(data)
    attacked = under_attack(attack_figures(data.attacks), was_gone(data))
    lines = [
        f"# {escaped(data.title)}",
        "",
        f"**Is it gone?** {verdict(data)}{': ' if gone else ''}{'; '.join(gone)}.",
        "",
        f"**At what price?** {_upper('; '.join(price)) or 'Not measured'}.",
        "",
        *([f"**And under attack?** {escaped(attacked)}", ""] if attacked else []),
        f"Model: {escaped(data.model_name)}.",
        "",
        f"| | {' | '.join(data.results)} | better |",
        f"|---|{'---:|' * len(data.results)}---|",
    ]
    for name in FIGURES:
        values = []
        for model, result in data.results.items():
            values.append(with_interval(name, result.figures[name], known[model].get(name)))
        lines.append(f"| {NAMES[name]} | {' | '.join(values)} | {BETTER[name]} |")
    if basis(data):
        lines += ["", f"Measured on {basis(data)}. {INTERVALS}"]
    if data.oracle:
        lines += ["", "The oracle is a model that never saw the target: what forgetting would reach at best."]
    lines += ["", f"_{verdict_rule(data)}_"]
    if data.warnings:
        lines += ["", "Warnings:", "", *(f"- {escaped(warning)}" for warning in data.warnings)]
    return "\n".join(lines)


def _curve(folder: Path, data: ReportData) -> str:
    if len(data.curve) < 2:
        return ""
    note = "Bands: 95 % intervals."
    if data.curve_prompts:
        note += f" Each point: the same {data.curve_prompts} prompts of each kind."
    oracle = data.oracle.figures if data.oracle else {}
    if oracle:
        note += " Dashed: the oracle, a model that never saw the target, on all prompts."
    points = curve_with_intervals(data)
    draw_curve(folder / "curve.png", points, oracle, note)
    lines = ["## Forgetting, step by step", "", "![Familiarity and utility by step](curve.png)", ""]
    lines += [f"| step | {' | '.join(NAMES.values())} |", "|---:|" + "---:|" * len(NAMES)]
    for point in points:
        cells = [with_interval(name, point.get(name), point["intervals"][name]) for name in FIGURES]
        lines.append(f"| {point['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _completions(data: ReportData) -> str:
    """The most telling completions: the greatest falls in class, and what still leaks."""
    pairs, shown, leaks, leaking = completion_pairs(data)
    if not pairs:
        return ""
    lines = [
        "## What it says",
        "",
        f"Greedy completions: {shown} of {len(pairs)} prompts, those with the greatest change first"
        + (f", and {leaks} of the {leaking} that still give something away" if leaking else "")
        + ". In bold what the judge took as a sign; the class from 0 (none) to 3 (explicit) in brackets.",
        "",
        "| prompt | before | after |",
        "|---|---|---|",
    ]
    for old, new in pairs[:shown]:
        lines.append(f"| {escaped(old['prompt'])} | {_completion(old)} | {_completion(new)} |")
    return "\n".join(lines)


def _completion(row: dict[str, Any]) -> str:
    """A completion with the expressions that gave it its class in bold."""
    text, shown, end = row["completion"], "", 0
    for match in spans(text, row.get("found", ())):
        shown += escaped(text[end : match[0]], strip=False) + f"**{escaped(text[slice(*match)])}**"
        end = match[1]
    shown += escaped(text[end:], strip=False)
    return f"{shown.strip() or '_nothing_'} ({'–' if row['class'] is None else row['class']})"


def _next_tokens(folder: Path, data: ReportData) -> str:
    panels = [{"prompt": entry["prompt"], "bars": bars(entry)} for entry in data.next_tokens[:MAX_PANELS]]
    panels = [panel for panel in panels if panel["bars"]]
    if not panels:
        return ""
    figures.draw_next_tokens(folder / "next_tokens.png", panels)
    return (
        "## What it expects next\n\n"
        "Probabilities of the next token; ␣ is a space before it.\n\n"
        "![Next-token probabilities by model](next_tokens.png)"
    )


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


def _attacks(folder: Path, data: ReportData) -> str:
    lines = attack_figures(data.attacks)
    if not lines:
        return ""
    oracle = any(line.oracle.value is not None for line in lines)
    heads = ["attack", "figure", "before", "after"] + (["oracle after"] if oracle else [])
    told = [
        "## Attacks",
        "",
        ATTACKS.format(oracle=ATTACKS_ORACLE if oracle else ""),
        "",
        f"| {' | '.join(heads)} |",
        "|---|---|" + "---:|" * (len(heads) - 2),
    ]
    for line in told_lines(lines)[0]:
        values = (line.before, line.after, line.oracle)[: len(heads) - 2]
        cells = [escaped(line.name), line.metric_name]
        cells += [with_interval(line.metric, value.value, value.interval) for value in values]
        told.append(f"| {' | '.join(cells)} |")
    if draw_relearning(folder / "relearning.png", relearning_rows(data.attacks)):
        told += ["", "![What relearning brings back, step by step](relearning.png)"]
    return "\n".join(told)


def _settings(data: ReportData) -> str:
    rows = [(name, value) for name, value in setting_rows(data.settings) if value]
    if not rows:
        return ""
    lines = ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {code(name)} | {code(value)} |" for name, value in rows]
    return "\n".join(lines)


def _cost(data: ReportData) -> str:
    heads, rows, notes = cost_table(data)
    if not rows:
        return ""
    lines = ["## Cost", "", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        bold = "**" if row[0] == "total" else ""
        lines.append(f"| {' | '.join(f'{bold}{escaped(cell)}{bold}' for cell in row)} |")
    return "\n".join([*lines, "", " ".join(notes)])


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
