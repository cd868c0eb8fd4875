"""The layers of a Llama against transformers', torch's and Liger-Kernel's: time, memory, error.

    python -m benchmarks.layers --device cpu|cuda --json FILE [--pictures FOLDER]

Of each layer and dtype: milliseconds of the forward and the backward pass (medians; all ways take turns in
every round), MB (10^6 bytes) that autograd keeps for the backward pass beside inputs, weights and tables, on
a GPU the allocator's peak, and the error of results and of gradients against float64, relative to its norm.
Where ours is further from float64 than twice the best of the others that compute eagerly, it is wrong and
makes it fail (exit 1).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.header import commit, now, processor
from benchmarks.layer_cases import CASES, SEED, SIZES, TITLES, Case, Way, make_cases
from benchmarks.loss_measure import last_level_cache, peak_memory
from whp_fast.progress import console, say, track

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOOR = {"float32": 1e-6, "bfloat16": 5e-4}
LEAST_ROUNDS = 3


class Bench:
    """What all cases share, and what was found so far."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.rounds, self.seconds = options.repeats, options.seconds
        self.compile_seconds = options.compile_seconds
        size = 1 << 16 if options.quick else 2 * last_level_cache(self.device)
        self._flushed = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.wrong: list[str] = []

    def measure(self, case: Case, dtype: str) -> None:
        """All ways of one case: error and memory first, then the rounds of timing."""
        torch._dynamo.reset()
        figures: dict[str, dict[str, Any]] = {}
        ways: list[Way] = []
        for way in case.ways:
            try:
                figures[way.name] = self._look(case, way)
                ways.append(way)
            except Exception as error:
                why = f"{type(error).__name__}: {(str(error) or 'no message').strip().splitlines()[0]}"
                self.left_out.append({"layer": case.name, "dtype": dtype, "impl": way.name, "reason": why})
                if way.ours:
                    self.wrong.append(f"{case.name}, {dtype}: {way.name} raised {why}")
        self._judge(case, dtype, ways, figures)
        times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
        gc.collect()
        for done in range(self.rounds):
            for way in ways[done % len(ways) :] + ways[: done % len(ways)]:
                spent = sum(map(sum, times[way.name])) / 1e3
                if len(times[way.name]) < LEAST_ROUNDS or spent < self.seconds:
                    times[way.name].append(self._time(case, way))
        for way in ways:
            self.rows.append(self._row(case, dtype, way, figures[way.name], times[way.name]))

    def _look(self, case: Case, way: Way) -> dict[str, Any]:
        """Error and memory, after a first run."""
        if way.compiled and self.compile_seconds <= 0:
            raise TimeoutError("no time is left for compiling")
        began = time.perf_counter()
        self._run(case, way)
        if way.compiled:
            self.compile_seconds -= time.perf_counter() - began
        kept = _kept_bytes(case, way)
        peak = None
        if self.device.type == "cuda":
            peak = peak_memory(self.device, lambda: self._run(case, way))[0].allocator / 1e6
        values = self._run(case, way)
        count = len(case.upstream)
        errors = [_error(value, exact) for value, exact in zip(values, case.truth, strict=True)]
        return {
            "kept_mb": round(kept / 1e6, 2),
            "peak_mb": None if peak is None else round(peak, 1),
            "out_err": max(errors[:count]),
            "grad_err": max(errors[count:]),
            "errors": errors,
        }

    def _run(self, case: Case, way: Way) -> list[Tensor]:
        """Results and gradients."""
        leaves = list(case.leaves.values())
        with way.chosen():
            results = way.run(*leaves)
            gradients = torch.autograd.grad(results, [*leaves, *way.weights], case.upstream)
        return [value.detach() for value in (*results, *gradients)]

    def _time(self, case: Case, way: Way) -> tuple[float, float]:
        leaves = list(case.leaves.values())
        clock = self._events if self.device.type == "cuda" else _seconds
        self._flushed.add_(1)
        gc.disable()
        try:
            with way.chosen():
                return clock(
                    lambda: way.run(*leaves),
                    lambda made: torch.autograd.grad(made, [*leaves, *way.weights], case.upstream),
                )
        finally:
            gc.enable()

    def _events(self, forward: Callable, backward: Callable) -> tuple[float, float]:
        began, between, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        began.record()
        made = forward()
        between.record()
        backward(made)
        ended.record()
        torch.cuda.synchronize(self.device)
        return began.elapsed_time(between), between.elapsed_time(ended)

    def _judge(self, case: Case, dtype: str, ways: Sequence[Way], figures: dict[str, dict]) -> None:
        """Each result and gradient of ours by those of the other eager ways."""
        names = [f"result {k}" for k in range(len(case.upstream))]
        names += [f"gradient of {name}" for name in case.leaves]
        names += [f"gradient of weight {k}" for k in range(len(case.truth) - len(names))]
        for way in ways:
            others = [w for w in ways if w.name != way.name and not w.compiled and w.name != "liger"]
            if not way.ours or not others:
                continue
            for k, name in enumerate(names):
                best = min(figures[other.name]["errors"][k] for other in others)
                allowed = 2 * best + FLOOR[dtype]
                if not figures[way.name]["errors"][k] <= allowed:  # a NaN is wrong too
                    self.wrong.append(
                        f"{case.name}, {dtype}: {way.name} is wrong, its {name} differs from float64 by "
                        f"{figures[way.name]['errors'][k]:.2g}, allowed is {allowed:.2g}"
                    )

    def _row(self, case: Case, dtype: str, way: Way, figures: dict, times: list) -> dict[str, Any]:
        return {
            "layer": case.name,
            "dtype": dtype,
            "impl": way.name,
            "label": way.label,
            "ours": way.ours,
            "fwd_ms": round(statistics.median(pair[0] for pair in times), 3),
            "bwd_ms": round(statistics.median(pair[1] for pair in times), 3),
            "total_ms": round(statistics.median(map(sum, times)), 3),
            "range_ms": [round(f(map(sum, times)), 3) for f in (min, max)],
            "rounds": len(times),
        } | {key: value for key, value in figures.items() if key != "errors"}


def _seconds(forward: Callable, backward: Callable) -> tuple[float, float]:
    began = time.perf_counter()
    made = forward()
    between = time.perf_counter()
    backward(made)
    return 1e3 * (between - began), 1e3 * (time.perf_counter() - between)


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _kept_bytes(case: Case, way: Way) -> int:
    """What autograd saves of a forward pass, each storage once, without what is there in any case."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used again
        return tensor

    with way.chosen(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = way.run(*case.leaves.values())
    there = {t.untyped_storage().data_ptr() for t in (*case.leaves.values(), *case.shared)}
    kept = sum(t.untyped_storage().nbytes() for address, t in found.items() if address not in there)
    del results
    return kept


# -------------------------------------------------------------------------------------------- what is printed


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a row, a section for each layer and dtype."""
    columns = ("fwd ms", "bwd ms", "total ms", "× ours", "kept MB", "peak MB", "error", "of gradients")
    drawn = Table(title="layers", title_justify="left", title_style="bold", pad_edge=False)
    drawn.add_column("implementation", no_wrap=True)
    for name in columns:
        drawn.add_column(name, justify="right", no_wrap=True)
    for group in grouped(rows):
        drawn.add_section()
        drawn.add_row(f"[dim]{group[0]['layer']}, {group[0]['dtype']}[/]")
        for row in group:
            drawn.add_row(
                "  " + row["label"],
                f"{row['fwd_ms']:.2f}",
                f"{row['bwd_ms']:.2f}",
                f"{row['total_ms']:.2f}",
                f"{row['total_ms'] / group[0]['total_ms']:.2f}",
                f"{row['kept_mb']:.1f}",
                "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                f"{row['out_err']:.1e}",
                f"{row['grad_err']:.1e}",
                style="bold green" if row["ours"] else "",
            )
    return drawn


def grouped(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows by layer and dtype, in the order in which they came."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["dtype"]), []).append(row)
    return list(groups.values())


def header(options: argparse.Namespace, arguments: Sequence[str], sizes) -> dict[str, Any]:
    """Where, when and with what the figures were measured."""
    packages = ("torch", "triton", "transformers", "liger-kernel")
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "threads": torch.get_num_threads() if options.device == "cpu" else None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "cuda": torch.version.cuda if options.device == "cuda" else None,
        "command": " ".join(["python -m benchmarks.layers", *arguments]),
        "commit": commit(),
        "date": now(),
        "sizes": str(sizes),
        "seed": SEED,
        "kept_mb": "saved for the backward pass beside inputs, weights and tables",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def draw(folder: Path, found: dict[str, Any], device: str) -> Path:
    """``layers_DEVICE.png``: time and memory of every way, beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.loss_pictures import draw_memory, draw_times
    from whp_fast.figures import DPI, GREY, INK, STYLE

    groups = grouped(found["rows"])
    heights = [0.27 * len(group) + 0.75 for group in groups]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(groups), 2, figsize=(10.5, sum(heights) + 0.95), height_ratios=heights,
            width_ratios=(1.25, 1), squeeze=False, layout="constrained",
        )  # fmt: skip
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.04)
        figure.suptitle("Layers of a Llama", x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
        for (time_axis, memory_axis), group in zip(axes, groups):
            draw_times(time_axis, group, f"{TITLES[group[0]['layer']]}, {group[0]['dtype']}")
            draw_memory(memory_axis, group, "kept_mb", "kept for the backward pass, MB")
        where = found["header"]["device"]
        if found["header"]["threads"]:
            where += f", {found['header']['threads']} threads"
        note = f"{where}, torch {found['header']['versions']['torch']}; {found['header']['sizes']}.\n"
        note += "Dark: forward pass, light: backward pass.  ×: time divided by that of the first bar."
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8.5, color=GREY)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"layers_{device}.png"
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)
    return path


# ------------------------------------------------------------------------------------------------ the command


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write header and rows here")
    parser.add_argument("--pictures", type=Path, help="draw a picture into this folder")
    parser.add_argument("--layers", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most (default 15)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of a way; then no further round (default 1)"
    )
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--compile-backend", choices=("inductor", "aot_eager", "none"), default="inductor")
    parser.add_argument("--compile-seconds", type=float, default=45.0, help="then nothing more is compiled")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.repeats = 1
    bench, sizes = Bench(options), SIZES["quick" if options.quick else options.device]
    with track("layers", len(options.layers) * len(options.dtypes)) as advance:
        for dtype in options.dtypes:
            made = make_cases(options.layers, sizes, DTYPES[dtype], bench.device, options.compile_backend)
            for case in made:
                bench.measure(case, dtype)
                advance(1, f"{case.name} {dtype}")
    found = {"header": header(options, given, sizes), "rows": bench.rows}
    found |= {"left_out": bench.left_out, "wrong": bench.wrong}
    # a table that is piped or redirected is not to be squeezed into 80 columns
    (console if console.is_terminal else Console(width=120)).print(table(bench.rows))
    for left in bench.left_out:
        say(f"left out: {left['layer']} {left['dtype']} {left['impl']}: {left['reason']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.pictures:
        say(str(draw(options.pictures, found, options.device)))
    for line in bench.wrong:
        say(f"WRONG {line}")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
