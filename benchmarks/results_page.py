"""Writes benchmarks/RESULTS.md from the files in benchmarks/results: one section a file, header first.

    python -m benchmarks.results_page [--folder benchmarks/results] [--out benchmarks/RESULTS.md]

Every figure on that page was written by a benchmark; nothing is typed in by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
_SHOWN_ROWS = 80
_LEFT_OUT = {"seconds", "target", "error"}  # lists and texts that a table cannot hold


def page(folder: Path) -> str:
    """The Markdown of all result files of a folder, in the order of their names."""
    parts = [
        "# Results",
        "",
        "Made by `python -m benchmarks.results_page` from the files in `benchmarks/results`. GPU figures "
        "stand here once a file of a GPU run is there.",
    ]
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        parts += ["", f"## {file.stem}", "", *_header(content), ""]
        parts += _summary(content) if file.stem == "compile_report" else _table(content.get("rows", []))
        parts += _requirements(content.get("requirements", []))
    return "\n".join(parts) + "\n"


def _header(content: dict) -> list[str]:
    header = content.get("header", content)
    shown = {k: header[k] for k in ("command", "device", "threads", "commit", "date") if header.get(k)}
    named = {name: header[name] for name in ("torch", "triton") if isinstance(header.get(name), str)}
    versions = header.get("versions") or named
    lines = [f"- {key}: `{value}`" for key, value in shown.items()]
    if versions:
        lines.append("- versions: " + ", ".join(f"{name} {v}" for name, v in versions.items() if v))
    return lines


def _table(rows: Sequence[dict]) -> list[str]:
    if not rows:
        return ["no rows"]
    keys = [key for key in rows[0] if key not in _LEFT_OUT]
    keys = [key for key in keys if not isinstance(rows[0][key], (list, dict))]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows[:_SHOWN_ROWS]:
        lines.append("| " + " | ".join(_cell(row.get(key)) for key in keys) + " |")
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"\n{len(rows) - _SHOWN_ROWS} more rows in the file.")
    return lines


def _summary(content: dict) -> list[str]:
    """Of the compile report: a row a target in the place of hundreds."""
    rows = content["rows"]
    lines = [
        "| target | compiled | most registers | most shared memory | spilled bytes | refused |",
        "|---|" + "---:|" * 5,
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        of = [row for row in rows if row["target"] == target]
        figures = (
            len(of),
            max(row["registers"] for row in of),
            max(row["shared_bytes"] for row in of),
            sum(row["spilled_bytes"] for row in of),
            sum(bool(row["error"]) for row in of),
        )
        lines.append(f"| {target} | " + " | ".join(f"{figure:,}" for figure in figures) + " |")
    return lines


def _requirements(requirements: Sequence[dict]) -> list[str]:
    lines = [
        f"- {'met' if one['met'] else '**not met**'}: {one['what']}: {one['found']}" for one in requirements
    ]
    return ["", *lines] if lines else []


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results_page", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(arguments)
    options.out.write_text(page(options.folder), encoding="utf-8")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
