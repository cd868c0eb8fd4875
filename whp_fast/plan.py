"""What a job will take, before a weight is read: memory of one GPU part by part, FLOP, time, and what to
change.

    python -m whp_fast.plan --config CONFIG [--section.key value ...]     the settings of the job
        [--gpu NAME] [--gpus N]     a GPU of the table (else the one at hand) and their number
        [--preset NAME]             the shape of a known model, where its folder is not there
        [--tokens N]                size of the corpus, where it is not there
        [--json FILE]               the plan as JSON too; - for the terminal instead of the table
    python -m whp_fast.plan --table     Markdown: which mode for which GPU, for Llama 2 7B and the paper's job

Leaves with status 0 if everything fits, 3 if a stage does not, 2 for what is wrong with the settings.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from whp_fast.checkpoint import load_config
from whp_fast.config import JobConfig, parse_config
from whp_fast.corpus import corpus_files, tokenise_corpus
from whp_fast.errors import UserError, exit_status
from whp_fast.model_config import LlamaConfig
from whp_fast.plan_gpus import Gpu, device_at_hand, find_gpu
from whp_fast.plan_job import Change, StagePlan, plan_job
from whp_fast.plan_setup import parameter_count
from whp_fast.progress import console, say
from whp_fast.tokens import load_tokenizer

DOES_NOT_FIT = 3
"""Exit status."""

PRESETS = {
    "llama2_7b": LlamaConfig(32000, 4096, 11008, 32, 32),
    "llama2_13b": LlamaConfig(32000, 5120, 13824, 40, 40),
    "llama3_8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, rope_theta=500000.0),
    "llama3_1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, rope_theta=500000.0, tie_word_embeddings=True),
    "tinyllama": LlamaConfig(32000, 2048, 5632, 22, 32, 4, max_position_embeddings=2048),
    "mistral_7b": LlamaConfig(32000, 4096, 14336, 32, 32, 8, model_type="mistral", sliding_window=4096),
    "qwen2_7b": LlamaConfig(152064, 3584, 18944, 28, 28, 4, model_type="qwen2"),
}
"""Shapes of published models."""

_UNNAMED = "unnamed"  # in the place of files that a plan does not read
_COUNTED_BYTES = 8 << 20  # a corpus up to this size is tokenised, which takes a few seconds
_BYTES_PER_TOKEN = 4.0  # English prose under a vocabulary of 32,000


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    plans: list[StagePlan] = []
    status = exit_status(lambda: plans.extend(_run(arguments)), debug="--debug" in arguments)
    return DOES_NOT_FIT if status == 0 and not all(plan.fits for plan in plans) else status


def _run(arguments: list[str]) -> list[StagePlan]:
    options, rest = _options(arguments)
    if options.table:
        from whp_fast.plan_table import mode_table

        print(mode_table())
        return []
    config, shape = job_and_shape(rest, options.preset)
    _refuse_missing_bitsandbytes(config)
    if options.gpus < 1:
        raise UserError(f"--gpus: {options.gpus} is no number of GPUs; give 1 or more.")
    gpu = find_gpu(options.gpu) if options.gpu else device_at_hand()
    tokens, how = corpus_tokens(config, options.tokens)
    plans = plan_job(config, shape, tokens, gpu, options.gpus)
    written = json.dumps(plan_json(plans, shape, gpu, options.gpus, tokens), indent=2)
    if options.json == "-":
        print(written)
        return plans
    if options.json:
        Path(options.json).write_text(written + "\n", encoding="utf-8")
    _tell(plans, shape, gpu, options.gpus, f"{tokens:,} tokens ({how})")
    return plans


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"command line: {message}; see --help.")


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the rest, which is the job's."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu", default="")
    parser.add_argument("--gpus", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument("--preset", default="")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--json", default="")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser.parse_known_args(arguments)


def job_and_shape(arguments: Sequence[str], preset: str = "") -> tuple[JobConfig, LlamaConfig]:
    """The job of a command line, and the shape of its model: that of the folder, or of the preset.

    With a preset the files that a job needs may be left unnamed.

    Raises:
        UserError: an unknown preset (with the nearest name), and what ``parse_config`` and ``load_config``
        refuse.
    """
    if not preset:
        config = parse_config(arguments)
        folder = Path(config.model.path)
        if not folder.is_dir():
            raise UserError(
                f"model.path: {folder} is no folder; name the model's, or plan for a known shape with "
                f"--preset ({', '.join(PRESETS)})."
            )
        return config, load_config(folder)
    if preset not in PRESETS:
        nearest = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"--preset: there is no shape {preset!r}; did you mean {nearest!r}?")
    unnamed = [
        word for key in ("model.path", "data.corpus", "anchors.path") for word in (f"--{key}", _UNNAMED)
    ]
    return parse_config([*unnamed, *arguments]), PRESETS[preset]


def corpus_tokens(config: JobConfig, given: int = 0) -> tuple[int, str]:
    """(tokens of the corpus, how they were found): as given, counted where that takes seconds, or estimated.

    Raises:
        UserError: there is no corpus, or a number below 1.
    """
    if given:
        if given < 1:
            raise UserError(f"--tokens: {given} is no size of a corpus; give 1 or more.")
        return given, "as given"
    if config.data.corpus == [_UNNAMED]:
        raise UserError("--tokens: no corpus is named; give its number of tokens, or --data.corpus.")
    files = corpus_files(config.data.corpus)
    size = sum(file.stat().st_size for file in files)
    source = Path(config.data.tokenizer or config.model.path)
    if size > _COUNTED_BYTES or not source.exists():
        tokens = max(1, round(size / _BYTES_PER_TOKEN))
        return tokens, f"estimated: {_BYTES_PER_TOKEN:g} bytes of the files a token"
    counter = _Counter()
    tokenise_corpus(
        files,
        load_tokenizer(source),
        counter,
        text_field=config.data.text_field,
        errors=config.data.encoding_errors,
        reference_chunks=config.anchors.reference_rules,
    )
    return counter.count, "counted"


class _Counter:
    """Counts what a ``TokenWriter`` would write."""

    def __init__(self) -> None:
        self.count = 0
        self.document_starts: list[int] = []

    def append(self, ids: Sequence[int] | np.ndarray) -> None:
        self.count += len(ids)


def _refuse_missing_bitsandbytes(config: JobConfig) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    memory = config.memory
    for key, value, instead in (
        ("optimizer", memory.optimizer == "bitsandbytes", "whp with memory.moments int8"),
        ("frozen", memory.frozen in ("nf4", "int8"), "bfloat16"),
    ):
        if value:
            raise UserError(
                f"memory.{key}: bitsandbytes is not installed; pip install bitsandbytes, or set {instead}."
            )


# What a person sees -----------------------------------------------------------------------------------------


def plan_json(plans: list[StagePlan], shape: LlamaConfig, gpu: Gpu, gpus: int, tokens: int) -> dict:
    """The plan as JSON types; bytes, seconds and FLOP as plain numbers."""
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "assumed": {"share_of_peak": gpu.share, "peak": gpu.bfloat16, "bandwidth": gpu.bandwidth},
        "parameters": parameter_count(shape),
        "corpus_tokens": tokens,
        "fits": all(plan.fits for plan in plans),
        "stages": {
            plan.stage: {
                "bytes": plan.parts,
                "total": plan.total,
                "static": plan.static,
                "host": plan.host,
                "capacity": plan.capacity,
                "fits": plan.fits,
                "tokens": plan.tokens,
                "steps": plan.steps,
                "flops": plan.flops,
                "seconds": plan.seconds,
                "changes": list(plan.changes),
            }
            for plan in plans
        },
    }


def _tell(plans: list[StagePlan], shape: LlamaConfig, gpu: Gpu, gpus: int, corpus: str) -> None:
    large = max(plan.total for plan in plans) >= 1e9
    divisor, unit, digits = (1e9, "GB", 2) if large else (1e6, "MB", 1)

    def size(n: float) -> str:
        return f"{n / divisor:,.{digits}f}" if n else "-"

    table = Table(title=f"{unit} on one GPU, at the highest point", title_justify="left")
    table.add_column("part")
    for plan in plans:
        table.add_column(plan.stage, justify="right")
    for name in plans[0].parts:
        if any(plan.parts[name] for plan in plans):
            table.add_row(name, *(size(plan.parts[name]) for plan in plans))
    table.add_section()
    table.add_row("in all", *(size(plan.total) for plan in plans), style="bold")
    table.add_row("there is", *(size(plan.capacity) for plan in plans))
    verdicts = ("[green]yes[/green]" if plan.fits else "[red]no[/red]" for plan in plans)
    table.add_row("fits", *verdicts)
    if any(plan.host for plan in plans):
        table.add_row("host memory", *(size(plan.host) for plan in plans))
    table.add_section()
    table.add_row("tokens", *(f"{plan.tokens:,}" for plan in plans))
    table.add_row("steps", *(f"{plan.steps:,}" if plan.steps else "-" for plan in plans))
    table.add_row("FLOP", *(f"{plan.flops:.2e}" for plan in plans))
    table.add_row("time", *(duration(plan.seconds) for plan in plans))

    say(f"{parameter_count(shape):,} parameters, corpus of {corpus}, {gpus} x {escape(gpu.name)}")
    console.print(table)
    if gpu.bfloat16:
        say(
            f"Times assume {gpu.share:.0%} of {gpu.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16; loading, "
            "evaluation and writing come on top."
        )
    else:
        say("No times: the speed of this device is not in the table; name a GPU with --gpu.")
    for plan in plans:
        if not plan.fits:
            say(f"[red]{plan.stage} does not fit.[/red] {escape(advice(plan))}")


def advice(plan: StagePlan) -> str:
    """What to change so that the stage fits: the first change, and those that must follow."""
    if not plan.changes:
        return "No setting makes it fit; take a GPU with more memory, or a smaller model."
    first, *others = (_spelled(change) for change in plan.changes)
    text = f"First set {first}"
    return f"{text}; then {', then '.join(others)}." if others else f"{text}; that is enough."


def _spelled(change: Change) -> str:
    words = []
    for key, value in change.items():
        if key == "gpus":
            words.append(f"torchrun --nproc-per-node {value}")
        else:
            words.append(f"--{key} {str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


def duration(seconds: float | None) -> str:
    """12 s, 3.4 min or 1.2 h; - where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
