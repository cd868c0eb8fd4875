"""What a run took: time, GPU-seconds, and energy where it could be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whp_fast.markdown import duration

if TYPE_CHECKING:
    from whp_fast.report_content import ReportData

_COUNTERS = {"gpus": "energy of the GPUs", "processors": "energy of the processors"}


def with_total(seconds: dict[str, float]) -> dict[str, float]:
    stages = {stage: value for stage, value in seconds.items() if stage != "total"}
    return stages | {"total": seconds.get("total", sum(stages.values()))} if seconds else {}


def gpu_seconds(data: ReportData) -> dict[str, float]:
    """Of each stage: its time on the clock, times the GPUs that the job held; with the total."""
    found = {stage: seconds * data.gpus.get(stage, 0) for stage, seconds in data.seconds.items()}
    return with_total({stage: value for stage, value in found.items() if stage != "total"})


def cost_table(data: ReportData) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, rows (the total last) and sentences below, as plain text; no rows where nothing is known."""
    counters = [name for name in _COUNTERS if any(name in read for read in data.energy.values())]
    gpus = max(data.gpus.values(), default=0)
    heads = ["stage", "time"] + (["GPU-seconds"] if gpus else []) + [_COUNTERS[name] for name in counters]
    on_gpus, rows, partly = gpu_seconds(data), [], False
    for stage, seconds in with_total(data.seconds).items():
        row = [stage, duration(seconds)] + ([f"{on_gpus[stage]:,.0f}"] if gpus else [])
        for name in counters:
            if stage != "total":
                row.append(_watt_hours(data.energy.get(stage, {}).get(name)))
                continue
            read = [s for s in data.seconds if name in data.energy.get(s, {})]
            whole = len(read) == len([s for s in data.seconds if s != "total"])
            partly = partly or not whole
            row.append(("" if whole else "at least ") + _watt_hours(sum(data.energy[s][name] for s in read)))
        rows.append(row)
    notes = [f"{gpus} GPU{'s' * (gpus > 1)} held from beginning to end." if gpus else "No GPU was used."]
    if counters:
        notes.append(
            "Energy is what the counters of whole devices showed, other work on them included"
            + ("; – where they were not read in the whole stage." if partly else ".")
        )
    else:
        notes.append("Energy: not readable here (no counter that the job may read).")
    return heads, rows, notes


def _watt_hours(joules: float | None) -> str:
    return "–" if joules is None else f"{joules / 3600:,.2f} Wh"
