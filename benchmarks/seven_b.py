"""The stages of a paper-size job on the GPU at hand: Llama 2 7B's shape, random weights, a random corpus.

    python -m benchmarks.seven_b --json FILE [--preset NAME] [--profile FOLDER]

For each way of keeping the training in memory: tokens a second of whole optimizer steps (65,536 tokens, as in
the paper), share of the GPU's peak, highest memory; then the label pass through two models; then how long the
whole job would take: reinforce 3 epochs of 3.1 M tokens, label 3.1 M, unlearn 120 steps. Beside it, in the
same run, the same training with transformers' Llama, scaled_dot_product_attention and torch's fused AdamW,
and with Liger-Kernel's patch where it is installed. Random weights change no speed; losses are looked at all
the same: one that is not finite, or not near ln V at the start, makes it fail.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from whp_kernels.layers.fp8 import has_fp8

from benchmarks.header import commit, now, processor
from whp_fast.alignment import Alignment
from whp_fast.checkpoint import save_model
from whp_fast.compile_blocks import compile_blocks
from whp_fast.config import MemoryConfig, TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import train
from whp_fast.fp8 import use_fp8
from whp_fast.label import Labeller, label_range
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.plan import PRESETS
from whp_fast.plan_gpus import device_at_hand
from whp_fast.plan_job import forward_flops
from whp_fast.plan_memory import training_parts
from whp_fast.plan_setup import Setup
from whp_fast.trainee import Trainee

CONTEXT = 512
REINFORCED, LABELLED, UNLEARNED = 9_300_000, 3_100_000, 120 * 65_536
"""Tokens of the paper-size job."""
SMALL = LlamaConfig(1000, 64, 160, 2, 4, 2)
MODES = {
    "float32 moments": {},
    "8-bit moments, bfloat16 gradients": {"moments": "int8", "gradients": "bfloat16"},
    "8-bit moments, selective checkpointing": {
        "moments": "int8",
        "gradients": "bfloat16",
        "checkpointing": "selective",
    },
    "8-bit moments, fp8": {"moments": "int8", "gradients": "bfloat16", "fp8": "tensorwise"},
    "8-bit moments, compiled blocks": {"moments": "int8", "gradients": "bfloat16", "layers": "compile"},
    "8-bit moments, fp8 in compiled blocks": {
        "moments": "int8",
        "gradients": "bfloat16",
        "fp8": "tensorwise",
        "layers": "compile",
    },
}
"""Of the memory settings, and of ``model.fp8`` and ``model.layers``; those with 8-bit moments fit an 80 GB
card."""


class Run:
    """What all measurements of one command share."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.shape = SMALL if options.preset == "small" else PRESETS[options.preset]
        self.steps, self.blocks = options.steps, options.blocks
        self.step_blocks = options.step_tokens // CONTEXT
        at_hand = device_at_hand()
        self.peak = at_hand.bfloat16 if self.cuda else 0.0
        self.capacity = at_hand.memory
        rng = np.random.default_rng(0)
        n_tokens = self.step_blocks * CONTEXT * 2
        tokens = rng.integers(0, self.shape.vocab_size, n_tokens)
        self.corpus = Blocks.of(tokens.astype(np.uint32), CONTEXT)
        self.labels = rng.integers(0, self.shape.vocab_size, n_tokens).astype(np.int32)
        self.labels[rng.random(n_tokens) < 0.15] = -100  # about as many positions as a book masks

    def settings(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            lr=1e-6,
            batch_blocks=self.blocks,
            accumulate=self.step_blocks // self.blocks,
            schedule="constant",
        )

    def model(self, dtype: torch.dtype) -> Llama:
        """Random weights, made on the device."""
        with torch.device("meta"):
            model = Llama(self.shape).to(dtype)
        model.to_empty(device=self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        return model

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Nothing of the measurement before is left, and its peak is forgotten."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def row(self, stage: str, impl: str, seconds: Sequence[float], tokens: int, flops: float, **more) -> dict:
        """Figures of measured steps; the first one, in which kernels are compiled, is not counted."""
        counted = seconds[1:] if len(seconds) > 1 else seconds
        rate = tokens / statistics.median(counted)
        return {
            "stage": stage,
            "impl": impl,
            "tokens_per_s": rate,
            "share_of_peak": rate * flops / self.peak if self.peak else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None,
            "seconds": [round(s, 4) for s in seconds],
            "first_seconds": seconds[0],
            "blocks": self.blocks,
            **more,
        }


def training(run: Run, mode: str, labels: bool) -> dict:
    """Whole optimizer steps of the engine."""
    run.clean()
    settings = run.settings()
    trainee = Trainee(run.model(torch.bfloat16), settings, _memory(mode), compute_dtype=torch.bfloat16)
    use_fp8(trainee.model, MODES[mode].get("fp8", "off"), only_in_training=True)
    if MODES[mode].get("layers") == "compile":
        compile_blocks(trainee.model)
    records = []
    objective = Objective(run.corpus, LabelTargets(run.corpus, run.labels if labels else None))
    train(trainee, [objective], settings, seed=0, device=run.device, on_step=records.append)
    _check_losses(run, [record.loss for record in records])
    flops = 3 * forward_flops(run.shape, CONTEXT)
    stage = "unlearn" if labels else "reinforce"
    seconds = [record.seconds for record in records]
    row = run.row(stage, "whp_fast", seconds, records[0].tokens, flops, mode=mode)
    row["planned_gb"] = _planned(run, mode) / 1e9
    return row


def transformers_training(run: Run, liger: bool) -> dict:
    """The same steps with transformers' Llama in bfloat16, its attention by SDPA, and torch's fused AdamW.

    Its weights and moments are bfloat16 (no exact master): the fastest and leanest way that it offers.
    """
    from transformers import LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    run.clean()
    with torch.device(run.device):
        model = LlamaForCausalLM._from_config(_transformers_config(run.shape), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    model.train()
    seconds, losses = [], []
    for step in range(run.steps):
        began = time.monotonic()
        total = 0.0
        for first in range(0, run.step_blocks, run.blocks):
            numbers = [(step * run.step_blocks + first + k) % len(run.corpus) for k in range(run.blocks)]
            ids = np.stack([run.corpus[number] for number in numbers]).astype(np.int64)
            ids = torch.from_numpy(ids).to(run.device)
            positions = run.step_blocks * (CONTEXT - 1)
            loss = model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=positions).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        run.synchronize()
        seconds.append(time.monotonic() - began)
    _check_losses(run, losses)
    name = "transformers, Liger" if liger else "transformers"
    flops = 3 * forward_flops(run.shape, CONTEXT)
    tokens = run.step_blocks * CONTEXT
    return run.row("reinforce", name, seconds, tokens, flops, mode="bfloat16 weights and moments")


def labelling(run: Run, dtype: torch.dtype, fp8: str = "off") -> dict:
    """Both forward passes and the labels, as the label stage does them; nothing is translated."""
    run.clean()
    base, reinforced = run.model(dtype).requires_grad_(False), run.model(dtype).requires_grad_(False)
    for model in (base, reinforced):
        use_fp8(model, fp8, only_in_training=False)
    labeller = Labeller(base, reinforced, _NoDictionary(), [5.0], batch_size=run.blocks, device=run.device)
    offsets = run.corpus.offsets()
    n = len(run.corpus)
    places = (np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))).astype(np.int32)
    alignment = Alignment(
        block_offsets=offsets,
        index_map=np.where(run.labels[: offsets[-1]] == -100, -1, places).astype(np.int32),
        reason=np.zeros(offsets[-1], dtype=np.uint8),
        translated=np.asarray(run.corpus.tokens[: offsets[-1]], dtype=np.int32),
        translated_offsets=offsets,
        used_at=np.zeros(0, dtype=np.int32),
        used_value=np.zeros(0, dtype=np.int32),
        used_offsets=np.zeros(n + 1, dtype=np.int64),
        matches=np.zeros(0, dtype=np.int64),
    )
    seconds, per_part = [], max(run.blocks, 4 * run.blocks)
    for first in range(0, n, per_part):
        began = time.monotonic()
        last = min(first + per_part, n)
        found = list(label_range(labeller, run.corpus, alignment, first, last))
        run.synchronize()
        if last - first == per_part or not seconds:
            seconds.append(time.monotonic() - began)
        if any((part.labels[0] >= run.shape.vocab_size).any() for part in found):
            raise SystemExit("wrong: a label is no token")
    flops = 2 * forward_flops(run.shape, CONTEXT)
    tokens = min(per_part, n) * CONTEXT
    name = str(dtype).removeprefix("torch.") + ("" if fp8 == "off" else f", fp8 {fp8}")
    return run.row("label", "whp_fast", seconds, tokens, flops, mode=f"two models in {name}")


def start_up(run: Run) -> float:
    """Seconds from a checkpoint on disk to the end of the first micro-batch's step."""
    with tempfile.TemporaryDirectory() as folder:
        run.clean()
        save_model(run.model(torch.bfloat16), folder)
        run.clean()
        settings = TrainConfig(steps=1, lr=1e-6, batch_blocks=run.blocks, accumulate=1)
        memory = MemoryConfig(**MODES["8-bit moments, bfloat16 gradients"])
        began = time.monotonic()
        trainee = Trainee.load(
            Path(folder), settings, memory, compute_dtype=torch.bfloat16, device=run.device
        )
        objective = Objective(run.corpus, LabelTargets(run.corpus, None))
        train(trainee, [objective], settings, seed=0, device=run.device)
        run.synchronize()
        return time.monotonic() - began


def profile_step(run: Run, folder: Path) -> None:
    """A kernel table and a trace of one step of two micro-batches."""
    from torch.profiler import ProfilerActivity, profile

    run.clean()
    memory = MemoryConfig(**MODES["8-bit moments, bfloat16 gradients"])
    settings = TrainConfig(steps=1, lr=1e-6, batch_blocks=run.blocks, accumulate=2)
    trainee = Trainee(run.model(torch.bfloat16), settings, memory, compute_dtype=torch.bfloat16)
    objective = Objective(run.corpus, LabelTargets(run.corpus, None))

    def step() -> None:
        train(trainee, [objective], settings, seed=0, device=run.device)

    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.cuda else [])
    with profile(activities=activities) as found:
        step()
        run.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / "trace.json"))
    key = "self_cuda_time_total" if run.cuda else "self_cpu_time_total"
    (folder / "kernels.txt").write_text(found.key_averages().table(sort_by=key, row_limit=60) + "\n")


def whole_job(rows: list[dict], start: float | None) -> dict | None:
    """Minutes of the paper-size job at the measured rates; three loads of the model come on top."""

    def best(stage: str) -> float:
        return max((r["tokens_per_s"] for r in rows if r["stage"] == stage and _counts(r)), default=0)

    rates = {stage: best(stage) for stage in ("reinforce", "label", "unlearn")}
    if not all(rates.values()):
        return None
    minutes = {
        "reinforce": REINFORCED / rates["reinforce"] / 60,
        "label": LABELLED / rates["label"] / 60,
        "unlearn": UNLEARNED / rates["unlearn"] / 60,
    }
    if start is not None:
        minutes["start-up, three times"] = 3 * start / 60
    return {**minutes, "in all": sum(minutes.values())}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    run = Run(options)
    if run.cuda and not torch.cuda.is_available():
        print("error: --device cuda: there is no GPU; nothing was measured.", file=sys.stderr)
        return 2
    rows, left_out, start = [], [], None
    work: list[tuple[str, Callable[[], dict]]] = []
    for mode in options.modes or MODES:
        if run.cuda and _planned(run, mode) > 0.97 * run.capacity:
            left_out.append(f"{mode}: {_planned(run, mode) / 1e9:.0f} GB planned do not fit")
            continue
        if not run.cuda and "layers" in MODES[mode]:
            left_out.append(f"{mode}: on a CPU the compiler takes longer than the steps")
            continue
        if run.cuda and "fp8" in MODES[mode] and not has_fp8(run.device):
            left_out.append(f"{mode}: this GPU has no 8-bit floats")
            continue
        work.append((f"reinforce, {mode}", lambda mode=mode: training(run, mode, labels=False)))
    if work:
        work.append(("unlearn", lambda: training(run, _last_mode(rows), labels=True)))
    work.append(("label, bfloat16", lambda: labelling(run, torch.bfloat16)))
    if not run.cuda or has_fp8(run.device):
        work.append(("label, fp8", lambda: labelling(run, torch.bfloat16, "tensorwise")))
    if not options.no_baselines:
        work.append(("transformers", lambda: transformers_training(run, liger=False)))
        work.append(("transformers with Liger", lambda: transformers_training(run, liger=True)))
    for name, measure in work:
        print(f"  measuring {name}", file=sys.stderr, flush=True)
        try:
            rows.append(measure())
        except ImportError as error:
            left_out.append(f"{name}: {error}")
        except torch.OutOfMemoryError as error:
            left_out.append(f"{name}: out of memory ({str(error).splitlines()[0]})")
    if options.start_up:
        print("  measuring start-up", file=sys.stderr, flush=True)
        start = start_up(run)
    if options.profile:
        profile_step(run, options.profile)
    job = whole_job(rows, start)
    _tell(rows, left_out, start, job)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        header = _header(run, arguments)
        result = {
            "header": header,
            "rows": rows,
            "left_out": left_out,
            "start_up_s": start,
            "job_minutes": job,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


class _NoDictionary:
    """In the place of an aligner: no counterparts are used."""

    def first_tokens(self) -> np.ndarray:
        return np.zeros((0, 2), dtype=np.int32)


def _last_mode(rows: list[dict]) -> str:
    """The fastest of the modes that were measured."""
    trained = [row for row in rows if row["stage"] == "reinforce" and _counts(row)]
    return max(trained, key=lambda row: row["tokens_per_s"])["mode"] if trained else next(iter(MODES))


def _counts(row: dict) -> bool:
    """Whether a row tells how fast the job is with its default products; 8-bit ones change results."""
    return row["impl"] == "whp_fast" and "fp8" not in row["mode"]


def _memory(mode: str) -> MemoryConfig:
    return MemoryConfig(**{k: v for k, v in MODES[mode].items() if k not in ("fp8", "layers")})


def _planned(run: Run, mode: str) -> int:
    setup = Setup(run.shape, _memory(mode), "bfloat16", run.blocks, CONTEXT, fp8="fp8" in MODES[mode])
    return sum(training_parts(setup).values())


def _check_losses(run: Run, losses: Sequence[float]) -> None:
    expected = math.log(run.shape.vocab_size)
    if not all(math.isfinite(loss) and 0.5 * expected < loss < 3 * expected for loss in losses):
        raise SystemExit(f"wrong: the losses are {losses}, and about {expected:.2f} is expected")


def _transformers_config(shape: LlamaConfig):
    from transformers import LlamaConfig as TheirConfig

    known = TheirConfig().to_dict()
    ours = {key: value for key, value in shape.to_hf().items() if key in known and value is not None}
    config = TheirConfig(**ours)
    config._attn_implementation = "sdpa"
    return config


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seven_b", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--preset", choices=(*PRESETS, "small"), default="llama2_7b")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), help="of memory; default: all that fit")
    parser.add_argument("--blocks", type=int, default=8, help="of 512 tokens in a micro-batch")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps, of which the first is not counted"
    )
    parser.add_argument("--step-tokens", type=int, default=65_536)
    parser.add_argument("--no-baselines", action="store_true", help="leave transformers out")
    parser.add_argument(
        "--start-up", action="store_true", help="also from a checkpoint on disk to a first step"
    )
    parser.add_argument("--profile", type=Path, help="folder for a kernel table and a trace")
    options = parser.parse_args(arguments)
    if options.step_tokens % (options.blocks * CONTEXT):
        parser.error(f"--step-tokens must be a multiple of {options.blocks} blocks of {CONTEXT}")
    return options


def _header(run: Run, arguments: Sequence[str] | None) -> dict:
    import triton

    words = sys.argv[1:] if arguments is None else arguments
    return {
        "device": torch.cuda.get_device_name() if run.cuda else processor(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "command": " ".join(["python -m benchmarks.seven_b", *words]),
        "commit": commit(),
        "date": now(),
    }


def _tell(rows: list[dict], left_out: list[str], start: float | None, job: dict | None) -> None:
    table = Table(title="stages of the job")
    for heading in ("stage", "implementation", "mode"):
        table.add_column(heading)
    for heading in ("tokens/s", "of peak", "peak GB", "first step s"):
        table.add_column(heading, justify="right")
    for row in rows:
        share = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else "-"
        peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-"
        cells = (row["stage"], row["impl"], row["mode"], f"{row['tokens_per_s']:,.0f}", share, peak)
        table.add_row(*cells, f"{row['first_seconds']:.1f}")
    Console().print(table)
    for text in left_out:
        print(f"left out: {text}")
    if start is not None:
        print(f"from a checkpoint on disk to a first step: {start:.1f} s")
    if job is not None:
        print("whole job, minutes: " + ", ".join(f"{key} {value:.1f}" for key, value in job.items()))


if __name__ == "__main__":
    sys.exit(main())
