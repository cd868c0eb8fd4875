"""What 8-bit matrix products change in trainings and labels, and on a GPU what they save.

    python -m benchmarks.fp8 --device cpu|cuda --json FILE [--world FOLDER] [--picture FILE]

On the demo's world (made if the folder has none: two minutes): the reinforce and the unlearn training of
``demo.yaml`` in bfloat16, with tensor-wise and with row-wise 8-bit products, from the same seed; a second run
in bfloat16 with another order of the blocks tells what such differences are worth. All unlearn runs learn
the same labels. Then the labels of teachers that multiply in each way, against float32's, and those of
reinforced models that were trained in each way. On a CPU the products are emulated; on a GPU a block of Llama
2 7B is timed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.header import commit, now, processor
from whp_fast.alignment import Alignment
from whp_fast.checkpoint import load_model
from whp_fast.compile_blocks import compile_blocks
from whp_fast.config import MemoryConfig, TrainConfig, parse_config
from whp_fast.corpus import Blocks, TokenWriter, tokenise_corpus
from whp_fast.demo import make_demo
from whp_fast.engine import train
from whp_fast.fp8 import use_fp8
from whp_fast.inputs import Inputs
from whp_fast.label import Labeller, label_range
from whp_fast.model import Llama
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.plan import PRESETS
from whp_fast.trainee import Trainee

PRODUCTS = {"bfloat16": "off", "fp8 tensor-wise": "tensorwise", "fp8 row-wise": "rowwise"}
OTHER_ORDER = "bfloat16, other order"
RUNS = {**PRODUCTS, OTHER_ORDER: "off"}
ADMISSIBLE = 0.995
"""Share of bfloat16's labels that an 8-bit forward pass must give to be admissible."""
BLOCK_SHAPES = {"llama2_7b": (4096, 16384), "small": (64,)}
"""Tokens in the batches of 512 that a block is timed with."""


class World:
    """The demo's text, dictionary and base, read once."""

    def __init__(self, folder: Path, size: str, device: torch.device, blocks: int | None):
        if not (folder / "base").is_dir():
            make_demo(folder, size)
        paths = {
            "model.path": folder / "base",
            "data.corpus": json.dumps([str(folder / "saga")]),
            "anchors.path": folder / "anchors.json",
        }
        words = [word for key, value in paths.items() for word in (f"--{key}", str(value))]
        empty = ("familiarity", "probability", "choices", "general_text", "oracle")
        words += [word for key in empty for word in (f"--evaluate.{key}", "")]
        self.config = parse_config(["--config", f"{size}.yaml", *words])
        self.inputs, self.device = Inputs(self.config), device
        file = folder / ".fp8_tokens.npy"
        with TokenWriter(file, self.inputs.tokenizer.vocab_size) as writer:
            tokenise_corpus(self.inputs.corpus, self.inputs.tokenizer, writer)
        tokens = np.load(file)
        file.unlink()
        context = self.config.data.context
        self.blocks = Blocks.of(tokens[: blocks * context] if blocks else tokens, context)
        self.aligner = self.inputs.aligner()
        self.alignment: Alignment = self.aligner.align(self.blocks)

    def train(self, settings: TrainConfig, labels: np.ndarray | None, run: str) -> tuple[list[float], Llama]:
        """The loss of each step, and the exact float32 model."""
        memory = MemoryConfig(gradients="float32")
        trainee = Trainee.load(
            self.inputs.base, settings, memory, compute_dtype=torch.bfloat16, device=self.device
        )
        use_fp8(trainee.model, RUNS[run], only_in_training=True)
        losses: list[float] = []
        train(
            trainee,
            [Objective(self.blocks, LabelTargets(self.blocks, labels))],
            settings,
            seed=1 if run == OTHER_ORDER else 0,
            device=self.device,
            on_step=lambda record: losses.append(record.loss),
        )
        return losses, trainee.to_float32().requires_grad_(False)

    def labels(self, reinforced: Llama, dtype: torch.dtype = torch.float32, fp8: str = "off") -> np.ndarray:
        """A label for each position, -100 where none is taught."""
        base = load_model(self.inputs.base, dtype=dtype, device=self.device).requires_grad_(False)
        taught = Llama(reinforced.config).to(dtype=dtype, device=self.device)
        taught.load_state_dict(reinforced.state_dict())
        taught.requires_grad_(False)
        for model in (base, taught):
            use_fp8(model, fp8, only_in_training=False)
        settings = self.config.label
        labeller = Labeller(
            base,
            taught,
            self.aligner,
            [settings.alpha],
            batch_size=settings.batch_blocks,
            device=self.device,
        )
        parts = label_range(labeller, self.blocks, self.alignment, 0, len(self.blocks))
        return np.concatenate([part.labels[0] for part in parts])

    @torch.inference_mode()
    def loss(self, model: Llama, labels: np.ndarray | None) -> float:
        """Mean over the whole text, in float32; ``labels`` None: of its next tokens."""
        total, count, at = 0.0, 0, 0
        for number in range(len(self.blocks)):
            ids = torch.from_numpy(np.asarray(self.blocks[number]).astype(np.int64)).to(self.device)
            if labels is None:
                wanted = torch.cat([ids[1:], ids.new_full((1,), -100)])
            else:
                wanted = torch.from_numpy(labels[at : at + len(ids)].astype(np.int64)).to(self.device)
            at += len(ids)
            total += float(F.cross_entropy(model(ids[None])[0].float(), wanted, reduction="sum"))
            count += int((wanted != -100).sum())
        return total / count


def trainings(world: World, stage: str, labels: np.ndarray | None) -> tuple[list[dict], dict, dict]:
    """Rows, curves and models of one training in all ways."""
    settings = getattr(world.config, stage)
    curves, models, rows = {}, {}, []
    for run in RUNS:
        print(f"  measuring {stage}, {run}", file=sys.stderr, flush=True)
        curves[run], models[run] = world.train(settings, labels, run)
        apart = np.abs(np.subtract(curves[run], curves["bfloat16"]))
        rows.append(
            _row(
                stage,
                run,
                first_loss=curves[run][0],
                last_loss=curves[run][-1],
                text_loss=world.loss(models[run], labels),
                mean_difference=float(apart.mean()),
                largest_difference=float(apart.max()),
            )
        )
    return rows, curves, models


def label_rows(world: World, reinforced: dict[str, Llama], exact: np.ndarray) -> list[dict]:
    """Agreement with the float32 labels of the model trained in bfloat16, ``exact``."""
    taught = exact != -100
    narrow = world.labels(reinforced["bfloat16"], torch.bfloat16)

    def row(what: str, products: str, labels: np.ndarray) -> dict:
        same = {
            "same_as_float32": float((labels == exact)[taught].mean()),
            "same_as_bfloat16": float((labels == narrow)[taught].mean()),
        }
        return _row(what, products, **same)

    rows = [row("label forward", "bfloat16", narrow)]
    for products, scaling in PRODUCTS.items():
        if scaling != "off":
            print(f"  measuring labels, {products}", file=sys.stderr, flush=True)
            labels = world.labels(reinforced["bfloat16"], torch.bfloat16, scaling)
            rows.append(row("label forward", products, labels))
    for run in RUNS:
        if run != "bfloat16":
            rows.append(row("float32 labels of reinforced", run, world.labels(reinforced[run])))
    return rows


def block_rows(shape: str, device: torch.device, layers: Sequence[str] = ("fused", "compile")) -> list[dict]:
    """Tokens a second of forward and backward of one block in bfloat16, weights and inputs with gradients."""
    config = PRESETS.get(shape)
    if config is None:
        from benchmarks.seven_b import SMALL as config
    rows = []
    for tokens in BLOCK_SHAPES[shape]:
        for how in layers:
            for products, scaling in PRODUCTS.items():
                seconds = _time_block(config, tokens, how, scaling, device)
                rows.append(
                    _row(f"a block, {tokens} tokens", f"{products}, {how}", tokens_per_s=tokens / seconds)
                )
    return rows


def _time_block(config, tokens: int, layers: str, scaling: str, device: torch.device) -> float:
    """Median seconds."""
    import dataclasses

    one = dataclasses.replace(config, num_hidden_layers=1, vocab_size=1024)
    with torch.device(device):
        model = Llama(one).to(torch.bfloat16)
    model.init_weights(torch.Generator(device).manual_seed(0))
    model.residual_dtype = torch.float32
    use_fp8(model, scaling, only_in_training=True)
    if layers == "compile":
        compile_blocks(model)
    ids = torch.randint(0, 1024, (-(-tokens // 512), min(tokens, 512)), device=device)
    seconds = []
    for _ in range(8):
        began = time.monotonic()
        model.hidden_states(ids).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
        model.zero_grad(set_to_none=True)
    return statistics.median(seconds[3:])


def requirements(rows: Sequence[dict]) -> list[dict]:
    """8-bit labels against bfloat16's."""
    found = [row for row in rows if row["what"] == "label forward" and row["products"].startswith("fp8")]
    return [
        {
            "what": f"labels of a forward pass in {row['products']} are bfloat16's above {ADMISSIBLE:.1%}",
            "found": f"{row['same_as_bfloat16']:.2%}",
            "met": row["same_as_bfloat16"] > ADMISSIBLE,
        }
        for row in found
    ]


def draw(path: Path, curves: dict[str, dict[str, list[float]]], header: dict) -> Path:
    """Losses step by step above, differences from bfloat16 below; a column for each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from whp_fast.figures import BLUE, DPI, FAINT, GREY, INK, RULE, STYLE, VERMILION

    colours = dict(zip(RUNS, (INK, VERMILION, BLUE, FAINT)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            2, len(curves), figsize=(10.5, 5.6), height_ratios=(1.6, 1), squeeze=False, layout="constrained"
        )
        for column, (stage, runs) in zip(axes.T, curves.items()):
            for run, losses in runs.items():
                steps = range(1, len(losses) + 1)
                style = {"color": colours[run], "linewidth": 1.4, "label": run}
                column[0].plot(steps, losses, **style)
                if run != "bfloat16":
                    column[1].plot(steps, np.abs(np.subtract(losses, runs["bfloat16"])), **style)
            column[0].set_title(f"{stage}: loss of each step")
            column[1].set_title("distance from bfloat16's")
            column[1].set_yscale("log")
            column[1].yaxis.set_major_formatter("{x:g}")
            column[1].set_xlabel("step")
            for axis in column:
                axis.grid(axis="y", color=RULE, linewidth=0.8)
                axis.set_axisbelow(True)
        axes[0, -1].legend(frameon=False)
        note = f"{header['device']}, torch {header['versions']['torch']}; the demo's world."
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8.5, color=GREY)
        figure.savefig(path, dpi=DPI)
        pyplot.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: there is no GPU; nothing was measured.", file=sys.stderr)
        return 2
    world = World(options.world, options.size, device, options.blocks)
    rows, reinforce, models = trainings(world, "reinforce", None)
    exact = world.labels(models["bfloat16"])
    rows += label_rows(world, models, exact)
    more, unlearn, _ = trainings(world, "unlearn", exact)
    rows += more
    if options.block or device.type == "cuda":
        rows += block_rows(options.block or "llama2_7b", device, options.layers)
    header = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "command": " ".join(
            ["python -m benchmarks.fp8", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "commit": commit(),
        "date": now(),
    }
    result = {"header": header, "rows": rows, "requirements": requirements(rows)}
    result["curves"] = {"reinforce": reinforce, "unlearn": unlearn}
    for row in rows:
        print("  ".join(_cell(value) for value in row.values()))
    for one in result["requirements"]:
        print(f"{'met' if one['met'] else 'NOT MET'}: {one['what']}: {one['found']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        draw(options.picture, result["curves"], header)
    return 0


def _row(what: str, products: str, **figures: float) -> dict:
    """Every row has every column."""
    columns = ("first_loss", "last_loss", "text_loss", "mean_difference", "largest_difference")
    columns += ("same_as_float32", "same_as_bfloat16", "tokens_per_s")
    return {"what": what, "products": products, **dict.fromkeys(columns), **figures}


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:<28}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--picture", type=Path, help="draw the losses here (PNG)")
    parser.add_argument("--world", type=Path, default=Path("runs/demo/world"), help="made if not there")
    parser.add_argument("--size", choices=("demo", "tiny"), default="demo", help="of the world")
    parser.add_argument("--blocks", type=int, help="use no more of the text's blocks")
    parser.add_argument("--block", choices=tuple(BLOCK_SHAPES), help="time one of this shape")
    parser.add_argument(
        "--layers",
        nargs="+",
        choices=("fused", "compile"),
        default=["fused", "compile"],
        help="of that block",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
