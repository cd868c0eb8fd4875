"""Markdown: which mode for which GPU, for Llama 2 7B and the paper's job."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from whp_fast.config import JobConfig
from whp_fast.plan import PRESETS, duration, job_and_shape
from whp_fast.plan_gpus import Gpu, find_gpu
from whp_fast.plan_job import StagePlan, apply_changes, plan_stage

SHAPE = PRESETS["llama2_7b"]
TOKENS = 3_100_000
STEP_BLOCKS = 128
CARDS = ("RTX4090", "L40S", "H100", "H200")
COUNTS = (1, 2, 8)

_FULL8 = {"memory.moments": "int8", "memory.gradients": "bfloat16"}
# The first that fits is taken: what is exact and plain comes first.
MODES: tuple[tuple[str, dict], ...] = (
    ("full, float32 moments and gradients", {}),
    ("full, 8-bit moments, bfloat16 gradients", _FULL8),
    ("full, 8-bit moments in host memory, bfloat16 gradients", {**_FULL8, "memory.offload_moments": True}),
    ("LoRA 16, bfloat16 base", {"memory.lora_rank": 16}),
    ("LoRA 16, NF4 base", {"memory.lora_rank": 16, "memory.frozen": "nf4"}),
)


def mode_table() -> str:
    """A row for each card and number of cards: the first mode that fits, and its fastest micro-batch."""
    lines = [
        "| GPU | memory, GB | GPUs | mode | blocks in a micro-batch | checkpointing | planned, GB a GPU | "
        "planned time | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    job, _ = job_and_shape([], "llama2_7b")
    job.label.dtype = "float16"
    for name, gpus in itertools.product(CARDS, COUNTS):
        gpu = find_gpu(name)
        best = best_mode(job, gpu, gpus)
        if best is None:
            lines.append(f"| {gpu.name} | {gpu.memory / 1e9:.0f} | {gpus} | nothing fits | | | | | |")
            continue
        mode, config, plans = best
        peak = max(plan.total for plan in plans) / 1e9
        seconds = sum(plan.seconds or 0.0 for plan in plans)
        lines.append(
            f"| {gpu.name} | {gpu.memory / 1e9:.0f} | {gpus} | {mode} | {config.reinforce.batch_blocks} | "
            f"{config.memory.checkpointing} | {peak:.1f} | {duration(seconds)} | not measured |"
        )
    shares = ", ".join(f"{gpu.name} {gpu.share:.0%}" for gpu in map(find_gpu, CARDS))
    lines += [
        "",
        f"Llama 2 7B, {TOKENS:,} tokens in blocks of 512: reinforce 3 epochs, label pass with two models in "
        f"float16, unlearn 120 steps of {STEP_BLOCKS * 512:,} tokens; loading, evaluation and writing come "
        f"on top. Assumed share of the dense bfloat16 peak: {shares}.",
    ]
    return "\n".join(lines)


def best_mode(job: JobConfig, gpu: Gpu, gpus: int) -> tuple[str, JobConfig, list[StagePlan]] | None:
    """(mode, job, plans of the stages) of the first mode that fits, with its fastest micro-batch; None if
    none does."""
    for mode, settings in MODES:
        found = []
        for config in _variants(job, settings, gpus):
            plans = [
                plan_stage(stage, config, SHAPE, TOKENS, gpu, gpus) for stage in ("reinforce", "unlearn")
            ]
            label = _label_plan(config, gpu, gpus)
            if label is not None and all(plan.fits for plan in plans):
                plans.insert(1, label)
                found.append((sum(plan.seconds or 0.0 for plan in plans), len(found), config, plans))
        if found:
            _, _, config, plans = min(found)
            return mode, config, plans
    return None


def _variants(base: JobConfig, settings: dict, gpus: int) -> Iterator[JobConfig]:
    config, _ = apply_changes(base, gpus, [settings])
    for blocks, kind in itertools.product((8, 4, 2, 1), ("none", "selective", "full")):
        if blocks * gpus > STEP_BLOCKS:
            continue
        batch = {"batch_blocks": blocks, "accumulate": STEP_BLOCKS // blocks}
        yield dataclasses.replace(
            config,
            memory=dataclasses.replace(config.memory, checkpointing=kind),
            reinforce=dataclasses.replace(config.reinforce, **batch),
            unlearn=dataclasses.replace(config.unlearn, steps=120, **batch),
        )


def _label_plan(config: JobConfig, gpu: Gpu, gpus: int) -> StagePlan | None:
    """The label pass with as large a batch as fits, sharded only where it must be."""
    for sharded, blocks in itertools.product((False, True), (8, 4, 2, 1)):
        changed = dataclasses.replace(
            config,
            memory=dataclasses.replace(config.memory, shard_teachers=sharded),
            label=dataclasses.replace(config.label, batch_blocks=blocks),
        )
        plan = plan_stage("label", changed, SHAPE, TOKENS, gpu, gpus)
        if plan.fits:
            return plan
    return None
