"""How much of what AdamW intends arrives in the weights at learning rates of 1e-6 and 3e-6.

    python -m benchmarks.small_updates [--json FILE] [--picture FILE]

Weights N(0, 0.02), each with a gradient of constant sign plus as much noise, the sizes of the gradients
log-normal over rows and columns. The same gradients train float64 weights with float64 moments; their move is
what is intended. Of every other way,

    share   <move, intended move> / |intended move|^2     1 is right, 0: nothing has arrived
    error   |move - intended move| / |intended move|      root mean square; 0 is right

both for the weights that are trained and, where these have a hidden part (a remainder, a compensation), for
the bfloat16 weights that the matrix products see. Rounding what is seen costs every way with bfloat16
weights the same; it does not add up from step to step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from whp_kernels.optim import AdamW

from benchmarks.header import now, processor

BETAS, EPS = (0.9, 0.95), 1e-8
RUNS = ((1e-6, 120), (3e-6, 72))  # learning rate, steps
SHAPE = (256, 1024)
NOISE = 1.0


class Weights(NamedTuple):
    """
    Attributes:
        trained: with the hidden part, float64.
        seen: what matrix products see, float64.
    """

    trained: Tensor
    seen: Tensor


class Adam:
    """Moments in a dtype of torch, rounded to nearest; the step in the dtype of the gradient."""

    def __init__(self, weights: Tensor, dtype: torch.dtype):
        self._first = torch.zeros_like(weights, dtype=dtype)
        self._second = torch.zeros_like(weights, dtype=dtype)
        self._step = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        """What is to be subtracted from the weights, over the learning rate."""
        self._step += 1
        beta1, beta2 = BETAS
        first = beta1 * self._first.to(gradient.dtype) + (1 - beta1) * gradient
        second = beta2 * self._second.to(gradient.dtype) + (1 - beta2) * gradient.square()
        self._first.copy_(first)
        self._second.copy_(second)
        root = (second / (1 - beta2**self._step)).sqrt()
        return first / (1 - beta1**self._step) / (root + EPS)


Way = Callable[[Tensor, Iterator[Tensor], float], Weights]


def intended(start: Tensor, gradients: Iterator[Tensor], lr: float) -> Weights:
    weights = start.to(torch.float64)
    adam = Adam(weights, torch.float64)
    for gradient in gradients:
        weights -= lr * adam(gradient.to(torch.float64))
    return Weights(weights, weights)


def to_nearest(start: Tensor, gradients: Iterator[Tensor], lr: float) -> Weights:
    weights = start.to(torch.bfloat16)
    adam = Adam(weights, torch.float32)
    for gradient in gradients:
        weights = (weights.float() - lr * adam(gradient)).bfloat16()
    return Weights(weights.double(), weights.double())


def stochastic(start: Tensor, gradients: Iterator[Tensor], lr: float) -> Weights:
    weights = start.to(torch.bfloat16)
    adam = Adam(weights, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for gradient in gradients:
        bits = (weights.float() - lr * adam(gradient)).view(torch.int32)
        bits += torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
        weights = (bits & -(1 << 16)).view(torch.float32).bfloat16()
    return Weights(weights.double(), weights.double())


def kahan(start: Tensor, gradients: Iterator[Tensor], lr: float) -> Weights:
    """The compensation is bfloat16, as in AnyPrecisionAdamW."""
    weights = start.to(torch.bfloat16)
    compensation = torch.zeros_like(weights)
    adam = Adam(weights, torch.float32)
    for gradient in gradients:
        compensation = (compensation.float() - lr * adam(gradient)).bfloat16()
        before = weights
        weights = weights + compensation
        compensation = compensation + (before - weights)
    return Weights(weights.double() + compensation.double(), weights.double())


def nearest_moments(start: Tensor, gradients: Iterator[Tensor], lr: float) -> Weights:
    """A float32 master, but bfloat16 moments rounded to nearest."""
    weights = start.clone()
    adam = Adam(weights, torch.bfloat16)
    for gradient in gradients:
        weights -= lr * adam(gradient)
    return Weights(weights.double(), weights.bfloat16().double())


def ours(moments: str) -> Way:
    def run(start: Tensor, gradients: Iterator[Tensor], lr: float) -> Weights:
        weights = torch.nn.Parameter(start.to(torch.bfloat16))
        weights.grad_dtype = torch.float32
        optimizer = AdamW([weights], lr, BETAS, EPS, moments=moments)
        for gradient in gradients:
            weights.grad = gradient
            optimizer.step()
        return Weights(optimizer.master(weights).double(), weights.detach().double())

    return run


WAYS: dict[str, Way] = {
    "bfloat16, to nearest": to_nearest,
    "bfloat16, stochastic rounding": stochastic,
    "bfloat16, Kahan": kahan,
    "float32 master, bfloat16 moments to nearest": nearest_moments,
    "whp_kernels, float32 moments": ours("float32"),
    "whp_kernels, bfloat16 moments": ours("bfloat16"),
    "whp_kernels, int8 moments": ours("int8"),
}


class Problem:
    """Start and gradients: the same for every way."""

    def __init__(self, shape: tuple[int, int], seed: int = 0):
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        # every way starts from the same bfloat16 numbers
        self.start = (torch.randn(shape, generator=generator) * 0.02).bfloat16().float()
        sizes = [torch.randn(n, generator=generator).exp() for n in shape]
        self._sizes = sizes[0][:, None] * sizes[1][None, :] * 1e-5
        self._signs = torch.randn(shape, generator=generator).sign()

    def gradients(self, steps: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed + 1)
        for _ in range(steps):
            noise = torch.randn(self.start.shape, generator=generator)
            yield self._sizes * (self._signs + NOISE * noise)


def measure(shape: tuple[int, int], runs: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
    """One row for each way, learning rate and number of steps."""
    problem = Problem(shape)
    rows = []
    for lr, steps in runs:
        start = problem.start.double()
        aim = intended(problem.start, problem.gradients(steps), lr).trained - start
        for name, way in WAYS.items():
            found = way(problem.start, problem.gradients(steps), lr)
            row: dict[str, Any] = {"way": name, "lr": lr, "steps": steps}
            for kind, weights in found._asdict().items():
                move = weights - start
                row[f"share_{kind}"] = float((move * aim).sum() / aim.square().sum())
                row[f"error_{kind}"] = float((move - aim).norm() / aim.norm())
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    found = Table(title="share of the intended move, and error over its size", title_justify="left")
    found.add_column("weights")
    for lr, steps in dict.fromkeys((row["lr"], row["steps"]) for row in rows):
        for heading in (f"lr {lr:g}, {steps} steps", "error", "as seen", "error"):
            found.add_column(heading, justify="right")
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for row in (row for row in rows if row["way"] == way):
            for kind in ("trained", "seen"):
                cells += [f"{100 * row[f'share_{kind}']:.1f} %", f"{row[f'error_{kind}']:.3f}"]
        found.add_row(way, *cells)
    return found


def draw(path: Path, rows: Sequence[dict[str, Any]], note: str) -> None:
    """Bars of the share that arrives in the trained weights, the error beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from whp_fast.figures import BLUE, DPI, GREY, INK, RULE, STYLE

    runs = list(dict.fromkeys((row["lr"], row["steps"]) for row in rows))
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            1, len(runs), figsize=(10.5, 3.6), sharey=True, squeeze=False, layout="constrained"
        )
        title = "How much of AdamW's intended move arrives in the weights"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
        for axis, (lr, steps) in zip(axes[0], runs):
            group = [row for row in rows if (row["lr"], row["steps"]) == (lr, steps)]
            own = [row["way"].startswith("whp_kernels") for row in group]
            shares = [100 * row["share_trained"] for row in group]
            colours = [BLUE if mine else "#8A8A8A" for mine in own]
            axis.barh(range(len(group)), shares, 0.66, color=colours, linewidth=0)
            for at, row in enumerate(group):
                text = f"{shares[at]:.1f} %   error {row['error_trained']:.3f}"
                axis.annotate(text, (max(shares[at], 0), at), (5, 0), textcoords="offset points", va="center")
            axis.set_title(f"learning rate {lr:g}, {steps} steps", fontsize=10)
            axis.set_yticks(range(len(group)), [row["way"] for row in group])
            for label, mine in zip(axis.get_yticklabels(), own):
                label.set_color(INK if mine else GREY)
            axis.set_xlim(0, 174)
            axis.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
            axis.set_ylim(len(group) - 0.4, -0.6)
            axis.grid(axis="x", color=RULE, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(length=0)
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8.5, color=GREY)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_updates", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="write header and rows here")
    parser.add_argument("--picture", type=Path, help="draw the shares here (PNG)")
    options = parser.parse_args(arguments)
    rows = measure(SHAPE, RUNS)
    given = sys.argv[1:] if arguments is None else list(arguments)
    header = {
        "device": processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python -m benchmarks.small_updates", *given]),
        "date": now(),
        "shape": list(SHAPE),
        "betas": list(BETAS),
        "noise": NOISE,
    }
    (Console() if sys.stdout.isatty() else Console(width=160)).print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    if options.picture:
        draw(options.picture, rows, f"{SHAPE[0] * SHAPE[1]:,} weights, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
