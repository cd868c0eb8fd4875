"""The losses against eager torch, torch.compile, torch's and others' fused losses: time, memory, error.

    python -m benchmarks.loss --device cpu --json FILE [--pictures FOLDER] [--check]
    python -m benchmarks.loss --device cuda --json FILE [--pictures FOLDER]

A result of ours that is wrong makes it fail (exit 1); with ``--check`` so does a requirement that is not met.
All implementations of an operation are run in turn, once a round (slow ones in fewer rounds); figures are
medians. Where the gradient is formed in the forward pass, ``fwd_ms`` says so; ``bwd_ms`` is what is left.
MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's notes about itself
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.table import Table
from whp_kernels import backends

from benchmarks.header import commit, now, processor
from benchmarks.loss_cases import ALPHA, OPS, SEED, Op, Sizes, make_inputs
from benchmarks.loss_checks import requirements
from benchmarks.loss_implementations import Choices, Implementation, LeftOut, implementations
from benchmarks.loss_measure import Clock, Desk, peak_memory, run
from benchmarks.loss_truth import allowed_error, find_truth
from whp_fast.progress import console, say, track

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST_ROUNDS = 3


class Case(NamedTuple):
    op: Op
    sizes: Sizes
    dtype: str


class Session:
    """What all cases share: the device, the clock, how long to measure, and what was found so far."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.choices = Choices(self.device, options.impl, options.compile_backend, options.chunk_mib)
        self.clock = Clock(self.device, flush_bytes=1 << 16 if options.quick else None)
        self.rounds, self.seconds = options.repeats, options.seconds
        megabytes = 1 if options.quick else {"cpu": 500, "cuda": 4000}[self.device.type]
        self.bandwidth = self.clock.copy_bandwidth(megabytes)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def leave_out(self, case: Case, left: LeftOut) -> None:
        self.left_out.append({"op": case.op.name, "dtype": case.dtype} | left._asdict())

    def measure(self, case: Case, desk: Desk, advance) -> None:
        """All implementations of one case: error and memory first, then the rounds of timing."""
        op, dtype = case.op, DTYPES[case.dtype]
        torch._dynamo.reset()
        gc.collect()
        gc.freeze()  # or each later collection would walk through all of torch
        candidates, left_out = implementations(op, dtype, self.choices)
        step = 1 / (len(candidates) * (1 + self.rounds))
        for left in left_out:
            self.leave_out(case, left)
        truth = find_truth(op, desk.inputs)
        figures: dict[Implementation, dict[str, Any]] = {}
        times: dict[Implementation, list[tuple[float, float]]] = {}
        for candidate in candidates:
            try:
                figures[candidate], once = self.look(case, candidate, desk, truth)
                # a run of many seconds is not repeated: neither caches nor the profiler matter to it
                times[candidate] = [once] if self.device.type == "cpu" and self.enough([once]) else []
            except Exception as error:
                why = f"{type(error).__name__}: {(str(error) or 'no message').strip().splitlines()[0]}"
                self.leave_out(case, LeftOut(candidate.name, why))
                if candidate.ours:
                    self.wrong.append(f"{op.name}, {case.dtype}: {candidate.name} raised {why}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            advance(step, f"{op.name} {case.dtype} {candidate.name}")
        self.judge(case, truth.rounding, figures)
        del truth
        if not figures:
            return
        turn = list(figures)
        for done in range(self.rounds):
            for candidate in turn[done % len(turn) :] + turn[: done % len(turn)]:
                if not self.enough(times[candidate]):
                    times[candidate].append(self.clock.time(candidate, op, desk.fresh()))
                advance(step, f"{op.name} {case.dtype} {candidate.name}")
        advance((len(candidates) - len(turn)) * step * self.rounds)
        if not desk.unharmed():
            self.wrong.append(f"{op.name}, {case.dtype}: an implementation wrote into a teacher or a head")
        self.rows += [self.row(case, candidate, figures[candidate], times[candidate]) for candidate in turn]

    def enough(self, times: list[tuple[float, float]]) -> bool:
        """Whether an implementation has had its share of time: slow ones are run less often."""
        spent = sum(map(sum, times)) / 1e3
        return spent > (self.seconds if len(times) >= LEAST_ROUNDS else LEAST_ROUNDS * self.seconds)

    def look(self, case: Case, candidate: Implementation, desk: Desk, truth):
        """Error and peak memory of one implementation, and how long that run took; after one in which code is
        loaded and compiled."""
        whole = candidate.compiled or self.device.type == "cuda"
        run(candidate, case.op, desk.fresh(None if whole else min(64, case.sizes.tokens)))
        inputs = desk.fresh()
        peak, outputs = peak_memory(self.device, lambda: run(candidate, case.op, inputs))
        error, loss_error = None, None
        if not candidate.floor:
            error, loss_error = truth.errors(outputs, cross_entropy=candidate.cross_entropy_loss)
        figures = {
            "peak_extra_mb": round(peak.bytes / 1e6, 1),
            "peak_allocator_mb": round(peak.allocator / 1e6, 1),
            "peak_resident_mb": None if peak.resident is None else round(peak.resident / 1e6, 1),
            "rel_err": error,
            "loss_err": loss_error,
        }
        return figures, outputs.milliseconds

    def judge(self, case: Case, rounding: float, figures: dict[Implementation, dict[str, Any]]) -> None:
        """Note the results of ours that are further from float64 than is allowed."""
        base = next((figures[candidate] for candidate in figures if candidate.baseline), {})
        allowed = {
            "rel_err": allowed_error(rounding, base.get("rel_err")),
            "loss_err": allowed_error(0.0, base.get("loss_err")),
        }
        for candidate, found in figures.items():
            if not candidate.ours:
                continue
            found["allowed_err"] = allowed["rel_err"]
            for name, limit in allowed.items():
                if found[name] is not None and not found[name] <= limit:  # a NaN is wrong too
                    what = {"rel_err": "gradient" if case.op.gradient else "labels", "loss_err": "loss"}[name]
                    self.wrong.append(
                        f"{case.op.name}, {case.dtype}: {candidate.name} is wrong, its {what} differs from "
                        f"float64 by {found[name]:.2g}, allowed is {limit:.2g}"
                    )

    def row(self, case: Case, candidate: Implementation, figures: dict[str, Any], times) -> dict[str, Any]:
        op, sizes = case.op, case.sizes
        totals = sorted(sum(pair) for pair in times)
        total = statistics.median(totals)
        share = None
        if not op.linear:
            tensors = 2 * op.gradient + 2 * op.teachers  # each logits tensor is read, the gradient written
            least = tensors * sizes.tokens * sizes.vocab * DTYPES[case.dtype].itemsize
            share = round(100 * least / (total / 1e3) / (self.bandwidth * 1e9), 1)
        return {
            "op": op.name,
            "impl": candidate.name,
            "label": candidate.label,
            "ours": candidate.ours,
            "dtype": case.dtype,
            "tokens": sizes.tokens,
            "vocab": sizes.vocab,
            "hidden": sizes.hidden,
            "fwd_ms": round(statistics.median(pair[0] for pair in times), 3),
            "bwd_ms": round(statistics.median(pair[1] for pair in times), 3),
            "total_ms": round(total, 3),
            "range_ms": [round(totals[0], 3), round(totals[-1], 3)],
            "rounds": len(times),
            "pct_of_bandwidth": share,
        } | figures


# -------------------------------------------------------------------------------------------- what is printed


def table(op: Op, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of one operation; a section for each dtype and size."""
    drawn = Table(title=f"{op.name} · {op.title}", title_justify="left", title_style="bold", pad_edge=False)
    share = "× products" if op.linear else "% of copy"
    columns = ("fwd ms", "bwd ms", "total ms", "× ours", share, "peak MB", "error")
    drawn.add_column("implementation", no_wrap=True)
    for name in columns:
        drawn.add_column(name, justify="right", no_wrap=True)
    for key, group in grouped(rows).items():
        first = next((row["total_ms"] for row in group if row["ours"]), None)
        floor = next((row["total_ms"] for row in group if row["impl"] == "bare_gemms"), None)
        drawn.add_section()
        drawn.add_row(f"[dim]{key}[/]")
        for row in group:
            part = row["total_ms"] / floor if op.linear and floor else None
            style = "bold green" if row["ours"] else "dim" if row["impl"] == "bare_gemms" else ""
            drawn.add_row(
                "  " + row["label"],
                f"{row['fwd_ms']:.1f}",
                f"{row['bwd_ms']:.1f}" if op.gradient else "–",
                f"{row['total_ms']:.1f}",
                f"{row['total_ms'] / first:.2f}" if first else "–",
                (f"{part:.2f}" if part else "–") if op.linear else f"{row['pct_of_bandwidth']:.0f}",
                f"{row['peak_extra_mb']:.0f}",
                "–" if row["rel_err"] is None else f"{row['rel_err']:.1e}" if row["rel_err"] else "0",
                style=style,
            )
    return drawn


def grouped(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by dtype and size, in the order in which they came."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = f"{row['dtype']}, {Sizes(row['tokens'], row['vocab'], row['hidden'])}"
        groups.setdefault(key, []).append(row)
    return groups


def header(options: argparse.Namespace, arguments: Sequence[str], bandwidth: float) -> dict[str, Any]:
    """Where, when and with what the figures were measured."""
    packages = ("torch", "triton", "whp_fast", "liger-kernel", "cut-cross-entropy")
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    return {
        "device": device,
        "threads": torch.get_num_threads() if options.device == "cpu" else None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "cuda": torch.version.cuda if options.device == "cuda" else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backends": backends(),
        "command": " ".join(["python -m benchmarks.loss", *arguments]),
        "commit": commit(),
        "date": now(),
        "copy_gb_per_s": round(bandwidth, 1),
        "alpha": ALPHA,
        "seed": SEED,
        "peak_extra_mb": "highest memory of forward and backward above the start, gradients included",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------ the command


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write header and rows here")
    parser.add_argument("--pictures", type=Path, help="draw one picture an operation into this folder")
    parser.add_argument("--check", action="store_true", help="exit 1 unless the requirements are met")
    parser.add_argument(
        "--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP", help=", ".join(OPS)
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="default: float32 (not of linear ops) and bfloat16"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="several: one for each of --vocab")
    parser.add_argument("--vocab", nargs="+", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--repeats", type=int, help="rounds at most (default 7)")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="of an implementation; then no further round (default 1.5)"
    )
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--impl", default="auto", help="implementation of ours (default auto)")
    parser.add_argument("--chunk-mib", type=int, help="of the losses from hidden states (default: theirs)")
    parser.add_argument("--compile-backend", choices=("inductor", "aot_eager", "none"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    options.repeats = options.repeats or (2 if options.quick else 7)
    options.compile_backend = options.compile_backend or ("aot_eager" if options.quick else "inductor")
    if options.tokens and options.vocab and 1 < len(options.tokens) != len(options.vocab) > 1:
        parser.error(f"--tokens has {len(options.tokens)} values and --vocab {len(options.vocab)}")
    return options


def plan(options: argparse.Namespace) -> list[Case]:
    """The cases in the order in which they are measured: those with the same inputs one after another."""
    cases = []
    for linear in (False, True):
        if options.quick:
            tokens, vocab, hidden = [24], [301], 16
        elif options.device == "cpu":
            tokens, vocab, hidden = [2048 if linear else 1024], [32_000], 1024
        else:
            tokens, vocab, hidden = [4096, 8192], [32_000, 128_256], 4096
        # products in float32 take minutes on a CPU
        dtypes = ["bfloat16"] if linear and not options.quick else ["float32", "bfloat16"]
        tokens, vocab = options.tokens or tokens, options.vocab or vocab
        count = max(len(tokens), len(vocab))
        if len(tokens) != len(vocab):  # one value beside several
            tokens, vocab = (tokens * count)[:count], (vocab * count)[:count]
        for n, v in zip(tokens, vocab):
            sizes = Sizes(n, v, (options.hidden or hidden) if linear else None)
            for dtype in options.dtypes or dtypes:
                cases += [Case(OPS[name], sizes, dtype) for name in options.ops if OPS[name].linear == linear]
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = read_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    session = Session(options)
    found = {"header": header(options, arguments, session.bandwidth)}
    say(f"[bold]{found['header']['device']}[/], torch {torch.__version__}, copy {session.bandwidth:.0f} GB/s")
    cases = plan(options)
    made, desk = None, None
    try:
        with track("measuring", len(cases)) as advance:
            for case in cases:
                if made != (case.sizes, case.dtype):
                    desk = None  # free the old inputs before the new ones are made
                    desk = Desk(make_inputs(case.sizes, DTYPES[case.dtype], session.device))
                    made = (case.sizes, case.dtype)
                session.measure(case, desk, advance)
    finally:
        gc.unfreeze()
    wide = Console(highlight=False, width=max(console.width, 116))
    for name in dict.fromkeys(case.op.name for case in cases):
        say()
        drawn = table(OPS[name], [row for row in session.rows if row["op"] == name])
        wide.print(drawn)
    left_out = {(left["impl"], left["reason"]): None for left in session.left_out}
    for impl, reason in left_out:
        say(f"[dim]left out: {impl}: {reason}[/]")
    met = requirements(session.rows, options.ops) if options.check else []
    found |= {"rows": session.rows, "left_out": session.left_out, "wrong": session.wrong}
    found["requirements"] = [dataclasses.asdict(requirement) for requirement in met]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.pictures:
        from benchmarks.loss_pictures import draw

        for path in draw(options.pictures, found, options.device):
            say(f"[dim]{path}[/]")
    for requirement in met:
        colour = "green" if requirement.met else "bold red"
        say(f"[{colour}]{'PASS' if requirement.met else 'FAIL'}[/]  {requirement.what}: {requirement.found}")
    for line in session.wrong:
        say(f"[bold red]WRONG[/] {line}")
    if session.wrong or not all(requirement.met for requirement in met):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
