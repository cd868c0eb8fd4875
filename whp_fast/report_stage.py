"""What the report of a job shows, gathered from its finished stages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from whp_fast.artifacts import Stage
from whp_fast.config import JobConfig
from whp_fast.corpus import Blocks
from whp_fast.evaluate import EvaluationResult
from whp_fast.inputs import Inputs
from whp_fast.label_stage import labels_file
from whp_fast.label_statistics import label_page
from whp_fast.report import ReportData, join_next_tokens


def report_data(
    config: JobConfig,
    inputs: Inputs,
    stages: Mapping[str, Stage],
    blocks: Blocks,
    seconds: dict[str, float],
    warnings: list[str],
) -> ReportData:
    """The data of the report.

    Args:
        stages: the finished ones by name.
        blocks: of the corpus.
        seconds: of each stage, work before the job included.
        warnings: what a person should know of the inputs.
    """

    def read(stage: str, name: str):
        file = stages[stage].folder / name if stage in stages else None
        return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None

    models = ("before", "after", "oracle")
    results = {name: read("evaluate", f"{name}.json") for name in models}
    results = {name: EvaluationResult.from_json(r) for name, r in results.items() if r is not None}
    costs = {name: stage.summary.get("cost", {}) for name, stage in stages.items()}
    label, align = stages["label"].folder, stages["align"].folder
    labels = np.load(label / labels_file(config.label.alpha), mmap_mode="r")
    reason = np.load(label / "reason.npy", mmap_mode="r")
    shown = _telling_block(blocks, np.load(align / "used_offsets.npy", mmap_mode="r"))
    here = slice(*blocks.offsets(shown, shown + 1))
    tables = {name: read("evaluate", f"next_tokens_{name}.json") for name in models}
    return ReportData(
        title=f"{inputs.base.name}: forgetting {_names(config.data.corpus)}",
        model_name=inputs.base.name,
        settings=dataclasses.asdict(config),
        before=results.get("before", EvaluationResult()),
        after=results.get("after", EvaluationResult()),
        oracle=results.get("oracle"),
        curve=read("unlearn", "curve.json") or [],
        curve_prompts=config.evaluate.curve_prompts,
        label_stats=read("label", "statistics.json"),
        label_page=label_page(inputs.tokenizer, blocks[shown], labels[here], reason[here]),
        next_tokens=join_next_tokens(**tables) if tables["before"] else [],
        attacks=read("attack", "attacks.json") or [],
        warnings=warnings,
        seconds=seconds,
        gpus={name: cost.get("gpus", 0) for name, cost in costs.items()},
        energy={name: cost["joules"] for name, cost in costs.items() if cost.get("joules")},
    )


def _names(paths: Sequence[str]) -> str:
    return ", ".join(Path(p).name for p in paths[:3]) + (" and others" if len(paths) > 3 else "")


def _telling_block(blocks: Blocks, used_offsets: np.ndarray) -> int:
    """The block with the most expressions among the first thousand: the one worth showing."""
    return int(np.argmax(np.diff(used_offsets[: min(len(blocks), 1000) + 1])))
