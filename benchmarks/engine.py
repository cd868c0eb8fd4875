"""The training engine beside Hugging Face's Trainer and a plain loop: tokens a second, memory, losses.

    python -m benchmarks.engine --json FILE [--picture FILE] [--check]

All train the same Llama (the demo's width, about 5 million parameters) from the same weights on the same
blocks in the same order, with AdamW and clipping, in one process on two CPU cores:

    engine    whp_fast.engine.train; in bfloat16 with bfloat16 parameters and an exact float32 master
    trainer   transformers' Trainer with its Llama; in bfloat16 with bf16=True (autocast)
    loop      transformers' Llama in a loop of ten lines, under autocast, with fused AdamW

They run in turn, once a round, and begin anew each time; the first steps of a round are not counted. Figures
are medians over rounds, one for each dtype:

    tokens_per_s     of a round's counted steps, with everything that lies between them
    peak_mb          highest resident memory above what was there before: weights, moments, activations
    share            matrix work of a step / its time / matrix_gflops
    matrix_gflops    rate of the forward products of the model's own matrices with torch.mm, in that dtype,
                     measured in every round

A loss that differs between them is wrong and makes it fail (exit 1); with ``--check`` so does a requirement
that is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is needed from the Hub

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.header import commit, now, processor
from benchmarks.loss_measure import _reset_resident, _status
from whp_fast.config import TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import plan_steps, train
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.progress import console, say, track
from whp_fast.trainee import Trainee

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LABELS = {"engine": "whp_fast.engine", "trainer": "transformers.Trainer", "loop": "plain torch loop"}
FASTER = {"bfloat16": 1.5, "float32": 1.0}  # than either rival
SHARE = 0.5  # of the rate of matrix products, in bfloat16
APART = {"bfloat16": 0.02, "float32": 1e-4}  # losses may differ by this share
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """Shape of the model and of a step."""

    vocab: int = 1536
    hidden: int = 256
    intermediate: int = 704
    layers: int = 5
    heads: int = 4
    context: int = 128
    blocks: int = 16

    @property
    def tokens(self) -> int:
        return self.context * self.blocks

    def products(self) -> list[tuple[int, int, int]]:
        """(out, in, how often) of the model's matrices."""
        return [
            (self.hidden, self.hidden, 4 * self.layers),
            (self.intermediate, self.hidden, 2 * self.layers),
            (self.hidden, self.intermediate, self.layers),
            (self.vocab, self.hidden, 1),
        ]

    def matrix_flops(self) -> float:
        """Of a step: each matrix is met once forward and twice backward. Attention is not counted."""
        return 6.0 * self.tokens * sum(times * out * into for out, into, times in self.products())

    def config(self) -> dict[str, Any]:
        """config.json of the model."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 4 * self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": 0.03,
            "tie_word_embeddings": False,
        }


QUICK = Sizes(vocab=96, hidden=32, intermediate=48, layers=2, heads=2, context=32, blocks=4)


class World:
    """What all share: blocks, their order, the first weights, the settings."""

    def __init__(self, sizes: Sizes, warm: int, steps: int):
        self.sizes, self.warm = sizes, warm
        self.settings = TrainConfig(
            steps=warm + steps,
            lr=1e-3,
            batch_blocks=sizes.blocks,
            accumulate=1,
            schedule="constant",
            betas=[0.9, 0.95],
        )
        self.blocks = Blocks.of(text(sizes, (warm + steps) * sizes.tokens), sizes.context)
        self.order = plan_steps(len(self.blocks), self.settings, SEED)
        self.model = Llama(LlamaConfig.from_hf(sizes.config()))
        self.model.init_weights(torch.Generator().manual_seed(SEED))

    def batches(self) -> Iterator[torch.Tensor]:
        """int64 [blocks, context] of every step."""
        for numbers in self.order:
            yield torch.from_numpy(np.stack([self.blocks[int(n)] for n in numbers]).astype(np.int64))

    def transformers_model(self) -> nn.Module:
        """The same model with the same weights."""
        import transformers

        config = transformers.LlamaConfig(**self.sizes.config())
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(self.model.state_dict())
        return model


def text(sizes: Sizes, length: int) -> np.ndarray:
    """Tokens of which four in five follow from the one before: there is something to learn."""
    rng = np.random.default_rng(SEED)
    follows = rng.permutation(sizes.vocab)
    tokens = rng.integers(0, sizes.vocab, length)
    for i in np.flatnonzero(rng.random(length) < 0.8):
        tokens[i] = follows[tokens[i - 1]]
    return tokens


# ------------------------------------------------------------------------------------------ three trainings


class Run(NamedTuple):
    """The loss of every step, and when each step was over (before the first: when it began), seconds."""

    losses: list[float]
    stamps: list[float]


def run_engine(world: World, dtype: torch.dtype) -> Run:
    losses, stamps = [], []
    model = copy.deepcopy(world.model)
    trainee = Trainee.from_model(model, world.settings, compute_dtype=dtype)
    train(
        trainee,
        [Objective(world.blocks, LabelTargets(world.blocks, None))],
        world.settings,
        seed=SEED,
        device=CPU,
        on_step=lambda record: losses.append(record.loss),
        after_step=lambda step: stamps.append(time.perf_counter()),
    )
    return Run(losses, stamps)


def run_trainer(world: World, dtype: torch.dtype) -> Run:
    import transformers

    losses, stamps = [], []

    class Timed(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **options):
            loss = super().compute_loss(*arguments, **options)
            losses.append(loss.detach())
            return loss

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not stamps:
                stamps.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

    rows = [{"input_ids": row, "labels": row} for batch in world.batches() for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=world.sizes.blocks,
            max_steps=world.settings.steps,
            learning_rate=world.settings.lr,
            adam_beta1=world.settings.betas[0],
            adam_beta2=world.settings.betas[1],
            weight_decay=world.settings.weight_decay,
            max_grad_norm=world.settings.clip_grad_norm,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=SEED,
        )
        trainer = Timed(world.transformers_model(), arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
    return Run([float(loss) for loss in losses], stamps)


def run_loop(world: World, dtype: torch.dtype) -> Run:
    model = world.transformers_model().train()
    settings, losses, stamps = world.settings, [], []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=tuple(settings.betas), weight_decay=0.0, fused=True
    )
    stamps.append(time.perf_counter())
    for input_ids in world.batches():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        stamps.append(time.perf_counter())
    return Run(losses, stamps)


RUNS: dict[str, Callable[[World, torch.dtype], Run]] = {
    "engine": run_engine,
    "trainer": run_trainer,
    "loop": run_loop,
}


# ------------------------------------------------------------------------------------------------ measuring


def matrix_gflops(sizes: Sizes, dtype: torch.dtype, seconds: float) -> float:
    """Rate of the products x @ W.T of the model's matrices, each as often as a forward pass has it."""
    operands = [
        (torch.randn(sizes.tokens, into).to(dtype), torch.randn(out, into).to(dtype), times)
        for out, into, times in sizes.products()
    ]
    work = sizes.matrix_flops() / 3
    done, began = -1, 0.0
    while done < 1 or time.perf_counter() - began < seconds:
        if done == 0:  # the first pass is not counted
            began = time.perf_counter()
        for x, weight, times in operands:
            for _ in range(times):
                torch.mm(x, weight.t())
        done += 1
    return work * done / (time.perf_counter() - began) / 1e9


def peak_resident(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident set rises during a call at the most; None where it cannot be seen."""
    gc.collect()
    before = _reset_resident()
    call()
    return None if before is None else max(0, _status("VmHWM") - before)


class Session:
    """Rounds of one dtype and what they gave."""

    def __init__(self, world: World, dtype: str, matrix_seconds: float):
        self.world, self.dtype, self.matrix_seconds = world, dtype, matrix_seconds
        self.rates: list[float] = []
        self.speeds: dict[str, list[float]] = {name: [] for name in RUNS}
        self.losses: dict[str, list[float]] = {}
        self.peaks: dict[str, int | None] = {}

    def measure_memory(self, name: str) -> None:
        """Of one run; others, of a tiny model, have loaded the code before it."""
        kept: list[Run] = []
        self.peaks[name] = peak_resident(lambda: kept.append(RUNS[name](self.world, DTYPES[self.dtype])))
        self.losses[name] = kept[0].losses

    def round(self, number: int, advance: Callable[[], None]) -> None:
        self.rates.append(matrix_gflops(self.world.sizes, DTYPES[self.dtype], self.matrix_seconds))
        names = list(RUNS)
        for name in names[number % 3 :] + names[: number % 3]:
            gc.collect()
            with _no_collection():
                run = RUNS[name](self.world, DTYPES[self.dtype])
            counted = len(run.stamps) - 1 - self.world.warm
            seconds = run.stamps[-1] - run.stamps[self.world.warm]
            self.speeds[name].append(counted * self.world.sizes.tokens / seconds)
            advance()

    def rows(self) -> list[dict[str, Any]]:
        rate = statistics.median(self.rates)
        work = self.world.sizes.matrix_flops() / self.world.sizes.tokens / 1e9
        rows = []
        for name, speeds in self.speeds.items():
            speed = statistics.median(speeds)
            rows.append(
                {
                    "impl": name,
                    "label": LABELS[name],
                    "dtype": self.dtype,
                    "tokens_per_s": round(speed),
                    "range_tokens_per_s": [round(min(speeds)), round(max(speeds))],
                    "rounds": len(speeds),
                    "peak_mb": None if self.peaks[name] is None else round(self.peaks[name] / 1e6, 1),
                    "share": round(speed * work / rate, 3),
                    "matrix_gflops": round(rate, 1),
                    "losses": [round(loss, 5) for loss in self.losses[name]],
                }
            )
        return rows

    def wrong(self) -> list[str]:
        """What is said of losses that differ."""
        lines = []
        reference = self.losses["loop"]
        for name, losses in self.losses.items():
            if len(losses) != len(reference):
                lines.append(f"{self.dtype}: {LABELS[name]} made {len(losses)} steps, not {len(reference)}")
                continue
            gaps = [abs(a - b) / abs(b) for a, b in zip(losses, reference)]
            worst = max(range(len(gaps)), key=lambda k: gaps[k] if math.isfinite(gaps[k]) else math.inf)
            if not gaps[worst] <= APART[self.dtype]:  # a NaN is wrong too
                lines.append(
                    f"{self.dtype}: the loss of {LABELS[name]} at step {worst + 1} is {losses[worst]:.5f}, "
                    f"that of {LABELS['loop']} {reference[worst]:.5f}"
                )
        return lines


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------------- requirements


@dataclass(frozen=True)
class Requirement:
    what: str
    found: str
    met: bool


def requirements(rows: Sequence[dict[str, Any]]) -> list[Requirement]:
    """One line each; what was not measured is not met."""
    lines = []
    by = {(row["dtype"], row["impl"]): row for row in rows}
    for dtype, times in FASTER.items():
        ours = by.get((dtype, "engine"))
        for rival in ("trainer", "loop"):
            what = f"{dtype}: at least {times:g}x the tokens/s of {LABELS[rival]}"
            theirs = by.get((dtype, rival))
            if not ours or not theirs:
                lines.append(Requirement(what, "not measured", False))
                continue
            found = ours["tokens_per_s"] / theirs["tokens_per_s"]
            lines.append(Requirement(what, f"{found:.2f}x", found >= times))
    what = f"bfloat16: at least {SHARE:.0%} of the rate of matrix products"
    ours = by.get(("bfloat16", "engine"))
    found = "not measured" if not ours else f"{ours['share']:.0%}"
    return [*lines, Requirement(what, found, bool(ours) and ours["share"] >= SHARE)]


# ------------------------------------------------------------------------------------------ what is shown


def table(rows: Sequence[dict[str, Any]]) -> Table:
    drawn = Table(title="Training", title_justify="left", title_style="bold", pad_edge=False)
    drawn.add_column("training", no_wrap=True)
    for name in ("tokens/s", "range", "× ours", "% of products", "peak MB"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        group = [row for row in rows if row["dtype"] == dtype]
        ours = next(row["tokens_per_s"] for row in group if row["impl"] == "engine")
        drawn.add_section()
        drawn.add_row(f"[dim]{dtype}, products {group[0]['matrix_gflops']:.0f} GFLOP/s[/]")
        for row in group:
            low, high = row["range_tokens_per_s"]
            drawn.add_row(
                "  " + row["label"],
                f"{row['tokens_per_s']:,}",
                f"{low:,}–{high:,}",
                f"{row['tokens_per_s'] / ours:.2f}",
                f"{100 * row['share']:.0f}",
                "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                style="bold green" if row["impl"] == "engine" else "",
            )
    return drawn


def draw(path: Path, rows: Sequence[dict[str, Any]], header: dict[str, Any]) -> Path:
    """Speed and memory of all trainings, a row of bars for each dtype."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or wanted
    from matplotlib import pyplot

    from whp_fast.figures import BLUE, DPI, GREY, INK, STYLE

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(dtypes), 2, figsize=(10.5, 1.75 * len(dtypes) + 0.9), squeeze=False, layout="constrained"
        )
        figure.suptitle(
            f"Training a Llama of {header['parameters'] / 1e6:.1f} M parameters on a CPU",
            x=0.01,
            ha="left",
            fontsize=12.5,
            fontweight="bold",
            color=INK,
        )
        for (speed_axis, memory_axis), dtype in zip(axes, dtypes):
            group = [row for row in rows if row["dtype"] == dtype]
            speeds = [f"{row['tokens_per_s']:,}   {row['share']:.0%} of products" for row in group]
            memory = ["" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}" for row in group]
            panels = (
                (speed_axis, "tokens_per_s", speeds, "tokens a second", 1.75),
                (memory_axis, "peak_mb", memory, "peak memory in MB", 1.2),
            )
            for axis, key, texts, title, room in panels:
                values = [row[key] or 0 for row in group]
                colours = [BLUE if row["impl"] == "engine" else "#8A8A8A" for row in group]
                axis.barh(range(len(group)), values, 0.66, color=colours)
                for at, (value, text) in enumerate(zip(values, texts)):
                    axis.annotate(
                        text, (value, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
                    )
                axis.set_title(f"{dtype}: {title}", fontsize=10)
                axis.set_xlim(0, (max(values) or 1) * room)
                axis.set_ylim(len(group) - 0.4, -0.6)
                axis.xaxis.set_visible(False)
                axis.tick_params(length=0)
                for side in ("bottom", "left"):
                    axis.spines[side].set_visible(False)
            speed_axis.set_yticks(range(len(group)), [row["label"] for row in group])
            memory_axis.set_yticks([])
        note = f"{header['device']}, {header['threads']} threads, torch {header['versions']['torch']}."
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8.5, color=GREY)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)
    return path


def header(options: argparse.Namespace, arguments: Sequence[str], world: World) -> dict[str, Any]:
    """Where, when and with what the figures were measured."""
    packages = ("torch", "transformers", "accelerate", "whp_fast")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "command": " ".join(["python -m benchmarks.engine", *arguments]),
        "commit": commit(),
        "date": now(),
        "sizes": dataclasses.asdict(world.sizes),
        "parameters": sum(p.numel() for p in world.model.parameters()),
        "tokens_a_step": world.sizes.tokens,
        "steps": world.settings.steps,
        "steps_not_counted": world.warm,
        "matrix_gflop_a_step": round(world.sizes.matrix_flops() / 1e9, 5),
        "peak_mb": "highest resident memory of a training above what was there before it",
        "seed": SEED,
    }


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write header and rows here")
    parser.add_argument("--picture", type=Path, help="draw speed and memory into this PNG")
    parser.add_argument("--check", action="store_true", help="exit 1 unless the requirements are met")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="counted in a round (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps start at 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = read_options(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        measured = measure(options, arguments)
    finally:
        torch.set_num_threads(threads)
    rows, met, wrong = measured["rows"], measured["requirements"], measured["wrong"]
    say()
    Console(highlight=False, width=max(console.width, 100)).print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    if options.picture:
        say(f"[dim]{draw(options.picture, rows, measured['header'])}[/]")
    for line in met:
        colour = "green" if line["met"] else "bold red"
        say(f"[{colour}]{'PASS' if line['met'] else 'FAIL'}[/]  {line['what']}: {line['found']}")
    for line in wrong:
        say(f"[bold red]WRONG[/] {line}")
    if wrong or not all(line["met"] for line in met):
        raise SystemExit(1)


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Header, rows, requirements (with ``--check``) and wrong losses."""
    world = World(QUICK if options.quick else Sizes(), 1 if options.quick else 3, options.steps)
    found: dict[str, Any] = {"header": header(options, arguments, world), "rows": [], "wrong": []}
    sessions = [Session(world, dtype, 0.01 if options.quick else 0.3) for dtype in options.dtypes]
    try:
        with track("measuring", len(sessions) * len(RUNS) * (options.rounds + 1)) as advance:
            for session in sessions:
                for train_once in RUNS.values():
                    train_once(World(QUICK, 0, 1), DTYPES[session.dtype])
                gc.collect()
                gc.freeze()  # or each later collection would walk through all of torch
                for name in RUNS:
                    session.measure_memory(name)
                    advance(1, f"{session.dtype} {name}")
                for number in range(options.rounds):
                    session.round(number, lambda: advance(1))
                found["rows"] += session.rows()
                found["wrong"] += session.wrong()
    finally:
        gc.unfreeze()
    found["requirements"] = [dataclasses.asdict(line) for line in requirements(found["rows"])]
    if not options.check:
        found["requirements"] = []
    return found


if __name__ == "__main__":
    main()
