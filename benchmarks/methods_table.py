"""The methods' rows as a table, in a terminal and in Markdown: the same cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

COLUMNS = {
    "method": "method",
    "retain_text": "retain text",
    "setting": "rate",
    "familiarity_completion": "completion",
    "familiarity_probability": "probability",
    "general_accuracy": "accuracy",
    "general_perplexity": "perplexity",
    "kl_target": "KL on target",
    "kl_general": "KL on general",
    "relearnt_familiarity_completion": "relearnt",
    "quantised_familiarity_completion": "4 bits",
    "train_seconds": "seconds",
}
"""Key of a row -> heading."""
_TEXT = ("method", "retain_text")
_DIGITS = {"general_perplexity": 2, "train_seconds": 1}


def cells(row: Mapping[str, Any]) -> list[str]:
    """What stands in the table for a row; a dash for what was not measured."""
    return [_cell(key, row) for key in COLUMNS]


def terminal(rows: Sequence[Mapping[str, Any]]) -> Table:
    """For a terminal; methods that are no published ones in italics."""
    table = Table(title="methods side by side", title_justify="left")
    for key, heading in COLUMNS.items():
        table.add_column(heading, justify="left" if key in _TEXT else "right", no_wrap=key == "method")
    for row in rows:
        table.add_row(*cells(row), style="italic" if row["extra"] else None)
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """For the README: a line a row."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|" + "|".join("---" if key in _TEXT else "---:" for key in COLUMNS) + "|")
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value = row[key]
    if key in _TEXT:
        return (value or "–") if key == "retain_text" else value + (" (diverged)" if _diverged(row) else "")
    if value is None:
        return "–"
    if key == "setting":
        return f"{value:g}" + (" ¹" if row["at_edge"] else "")
    if key == "general_perplexity" and value >= 1000:
        return f"{value:.1e}"
    return f"{value:.{_DIGITS.get(key, 3)}f}"


def _diverged(row: Mapping[str, Any]) -> bool:
    return row["status"] == "diverged"


NOTES = (
    "rate: learning rate, of the task vector its strength; ¹ the lowest or highest that was tried.",
    "KL: of the oracle to the model, nats a token, on the text to forget and on general text.",
    "relearnt, 4 bits: completion after {steps} steps at {lr:g} on a tenth of the text, and in nf4.",
    "seconds: of one training; the reinforced model took {reinforce:.0f} and the labels {label:.0f} beside.",
)


def notes(settings: Mapping[str, Any], seconds: Mapping[str, float]) -> list[str]:
    """What the columns mean, a line each."""
    relearn = settings["relearn"]
    return [
        note.format(
            steps=relearn["steps"],
            lr=relearn["lr"],
            reinforce=seconds["reinforce"],
            label=seconds["label"],
        )
        for note in NOTES
    ]
