"""Planned memory beside measured memory, for models of the demo's sizes in every memory mode.

    python -m benchmarks.plan --json FILE [--check]

Measured: the allocator's highest point over building a model with its optimizer and two optimizer steps of
two micro-batches each, on one process of the CPU. Planned: ``whp_fast.plan_memory`` for the same settings.
With ``--check`` a difference above 10 % is an error (exit 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.header import now
from whp_fast import adapters
from whp_fast.config import MemoryConfig, TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import train
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.plan_memory import training_parts
from whp_fast.plan_setup import Setup
from whp_fast.quantised import quantise_
from whp_fast.trainee import Trainee

ALLOWED = 0.10
CHUNK_MIB = 8


class Size(NamedTuple):
    name: str
    shape: LlamaConfig
    blocks: int
    context: int


SIZES = (
    Size("tiny", LlamaConfig(1000, 96, 256, 3, 4, 2), 8, 64),
    Size("demo", LlamaConfig(1600, 192, 512, 6, 6, 2), 16, 128),
    Size("5 M", LlamaConfig(4000, 256, 704, 5, 8, 4), 16, 128),
)
MODES = {
    "float32": ("float32", {}),
    "float32 weights, bfloat16 products": ("bfloat16", {"weights": "float32"}),
    "bfloat16 and remainder": ("bfloat16", {}),
    "bfloat16 moments": ("bfloat16", {"moments": "bfloat16"}),
    "8-bit moments, bfloat16 gradients": ("bfloat16", {"moments": "int8", "gradients": "bfloat16"}),
    "selective checkpointing": ("bfloat16", {"checkpointing": "selective"}),
    "full checkpointing": ("bfloat16", {"checkpointing": "full"}),
    "adapters of rank 8": ("bfloat16", {"lora_rank": 8}),
    "adapters over nf4": ("bfloat16", {"lora_rank": 8, "frozen": "nf4"}),
    "bitsandbytes, float32 weights": ("bfloat16", {"optimizer": "bitsandbytes"}),
}


def measure(size: Size, compute: str, memory: MemoryConfig) -> int:
    """Bytes above the start at the highest point of two steps, the model's own included."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, size.shape.vocab_size, 4 * size.blocks * size.context).astype(np.uint16)
    blocks = Blocks.of(tokens, size.context)
    settings = TrainConfig(steps=2, lr=1e-4, batch_blocks=size.blocks, accumulate=2, loss_chunk_mib=CHUNK_MIB)

    def work() -> None:
        trainee = _trainee(size, settings, compute, memory)
        objective = Objective(blocks, LabelTargets(blocks, None))
        train(trainee, [objective], settings, seed=0, device=torch.device("cpu"))

    work()  # what is made once and kept (tables of angles, pools) is not of the training
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def _trainee(size: Size, settings: TrainConfig, compute: str, memory: MemoryConfig) -> Trainee:
    weights = compute if memory.lora_rank else memory.weights_dtype(compute)
    with torch.device("meta"):
        model = Llama(size.shape).to(getattr(torch, weights))
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    how = {"compute_dtype": getattr(torch, compute)}
    if memory.lora_rank:
        if memory.frozen in ("nf4", "int8"):
            quantise_(model, memory.frozen)
        adapters.add_adapter(
            model,
            "reinforce",
            rank=memory.lora_rank,
            alpha=memory.lora_alpha,
            targets=memory.lora_targets,
            generator=torch.Generator().manual_seed(0),
        )
        adapters.use_adapter(model, "reinforce")
        how["adapter"] = "reinforce"
    return Trainee(model, settings, memory, **how)


def planned(size: Size, compute: str, memory: MemoryConfig) -> int:
    """Bytes of the same training by the plan."""
    setup = Setup(size.shape, memory, compute, size.blocks, size.context, CHUNK_MIB, cpu=True)
    return sum(training_parts(setup).values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write header and rows here")
    parser.add_argument("--check", action="store_true", help="exit 1 if a plan is off by more than 10 %%")
    parser.add_argument(
        "--sizes", nargs="+", default=[s.name for s in SIZES], choices=[s.name for s in SIZES]
    )
    options = parser.parse_args(arguments)
    rows = []
    for size in SIZES:
        if size.name not in options.sizes:
            continue
        for mode, (compute, settings) in MODES.items():
            memory = MemoryConfig(**settings)
            found, plan = measure(size, compute, memory), planned(size, compute, memory)
            rows.append(
                {"model": size.name, "mode": mode, "planned_mb": plan / 1e6, "measured_mb": found / 1e6}
            )
    _tell(rows)
    if options.json:
        header = {
            "command": "python -m benchmarks.plan "
            + " ".join(sys.argv[1:] if arguments is None else arguments),
            "torch": torch.__version__,
            "date": now(),
        }
        options.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    off = [row for row in rows if abs(row["planned_mb"] / row["measured_mb"] - 1) > ALLOWED]
    for row in off:
        print(f"off by more than 10 %: {row['model']}, {row['mode']}", file=sys.stderr)
    return 1 if off and options.check else 0


def _tell(rows: list[dict]) -> None:
    table = Table(title="memory of a training, MB")
    for heading in ("model", "mode"):
        table.add_column(heading)
    for heading in ("planned", "measured", "difference"):
        table.add_column(heading, justify="right")
    for row in rows:
        difference = row["planned_mb"] / row["measured_mb"] - 1
        table.add_row(
            row["model"],
            row["mode"],
            f"{row['planned_mb']:.1f}",
            f"{row['measured_mb']:.1f}",
            f"{difference:+.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
