"""The tables of an evaluation, in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whp_fast.evaluation.attacks import AttackRow
from whp_fast.evaluation.bootstrap import Figure
from whp_fast.evaluation.metrics import METRICS
from whp_fast.markdown import escaped

UNITS = {
    "familiarity_completion": "completions",
    "familiarity_probability": "prompts",
    "verbatim": "passages",
    "exact_memorisation": "passages",
    "extraction_strength": "passages",
    "knowledge_accuracy": "questions",
    "truth_ratio": "questions",
    "forget_quality": "questions",
    "min_k": "passages",
    "min_k_auc": "passages",
    "priv_leak": "passages",
    "general_accuracy": "questions",
    "model_utility": "questions",
    "general_perplexity": "tokens",
}
NOTE = "In brackets the middle 95 % of 1,000 bootstrap draws over the prompts, questions or passages."


def metric_rows(models: Mapping[str, Mapping[str, Figure]]) -> list[list[str]]:
    """The heading and a row a metric: name, a figure a model, what is better, what it rests on.

    Args:
        models: name of the model -> its figures by metric.
    """
    rows = [["figure", *models, "better", "rests on"]]
    for name, metric in METRICS.items():
        found = [figures.get(name) for figures in models.values()]
        if any(found):
            n = next(f.n for f in found if f)
            shown = [str(f) if f else "–" for f in found]
            rows.append([name.replace("_", " "), *shown, metric.better, f"{n:,} {UNITS[name]}"])
    return rows


def attack_rows(found: Sequence[AttackRow]) -> list[list[str]]:
    """The heading and a row a figure: attack, model, setting, figure, before, after."""
    rows = [["attack", "model", "setting", "figure", "before the attack", "after it"]]
    return rows + [
        [r.attack, r.model, r.setting, r.metric.replace("_", " "), str(r.before), str(r.after)] for r in found
    ]


def harness_rows(models: Mapping[str, Mapping[str, Figure]]) -> list[list[str]]:
    """The heading and a row a task and metric of lm-evaluation-harness."""
    names = list(dict.fromkeys(name for figures in models.values() for name in figures))
    return [["task", *models]] + [
        [name, *(str(f[name]) if name in f else "–" for f in models.values())] for name in names
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows (the first one the heading) as a Markdown table."""
    lines = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def markdown(title: str, tables: Mapping[str, Sequence[Sequence[str]]], warnings: Sequence[str]) -> str:
    """A page: a heading a table, tables with nothing below their heading left out, then the warnings."""
    parts = [f"# {escaped(title)}"]
    parts += [f"## {name}\n\n{markdown_table(rows)}" for name, rows in tables.items() if len(rows) > 1]
    parts.append(NOTE)
    if warnings:
        parts.append("Warnings:\n\n" + "\n".join(f"- {escaped(warning)}" for warning in warnings))
    return "\n\n".join(parts) + "\n"


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table in the terminal; no figure is cut, whatever its width."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if len(rows) < 2:
        return
    table = Table(title=escape(title), title_justify="left")
    for heading in rows[0]:
        table.add_column(escape(heading), no_wrap=True)
    for row in rows[1:]:
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    wide = Console(width=10_000).measure(table).maximum
    if console.width < wide:
        console = Console(width=wide)
    console.print(table)
