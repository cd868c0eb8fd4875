"""Methods of forgetting side by side, on the demo's world with its oracle.

    python -m benchmarks.methods [--json FILE] [--pictures FOLDER] [--seed N] [--folder FOLDER]
                                 [--world runs/demo/world] [--methods NAME,...] [--continue] [--markdown]
                                 [--quick] [--threads N]

Every method trains the same base with the same optimizer, schedule, number of steps and blocks of the target
a step (the demo's unlearn settings); methods with a retain loss read as many blocks of general text beside.
Each has the hyper-parameters it was published with (``benchmarks.methods_list``) and the same search over
learning rates, the task vector over as many strengths. All trainings are scored on one half of prompts,
questions and texts by one rule (``benchmarks.methods_search``); the best is reported on the other half, with
95 % bootstrap intervals in the JSON:

    the four figures of the demo, KL(oracle || model) on the target and on general text,
    the four figures after relearning a tenth of the target, familiarity with 4-bit weights

The world, its dictionary and the number of steps were made for the demo of WHP, before the other methods were
tried on it. The JSON is written anew after each method; ``--continue`` does the missing ones. The base must
know the text (completion of 0.5 or more), else nothing is measured and the status is 1. ``--quick`` runs
everything at the smallest size, to see that it runs: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import methods_table
from benchmarks.header import commit, now, processor
from benchmarks.methods_list import METHODS, Method
from benchmarks.methods_measure import (
    NAMES,
    RELEARN_BATCH,
    RELEARN_LR,
    RELEARN_SHARE,
    RELEARN_STEPS,
    Report,
    bitsandbytes_version,
    figures,
)
from benchmarks.methods_search import DIVERGED, best, finite, score, unlearnt
from benchmarks.methods_world import World, make_world
from whp_fast.artifacts import write_json
from whp_fast.errors import UserError, exit_status
from whp_fast.evaluate import FIGURES
from whp_fast.evaluation.bootstrap import Figure
from whp_fast.model import Llama
from whp_fast.progress import say


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        size: of the demo's world.
        rates: learning rates that are tried.
        strengths: of the task vector.
        steps: of a training; 0: as many as the demo's.
        least_familiarity: completion of the base from which on the world counts as learnt.
    """

    size: str = "demo"
    rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
    strengths: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
    steps: int = 0
    least_familiarity: float = 0.5


FULL = Plan()
QUICK = Plan("tiny", rates=(1e-4, 1e-3), strengths=(1.0, 2.0), steps=3, least_familiarity=0.0)
_REPORT_WORTH = 3  # trainings that a report takes the time of, for the time that is left


def measure(world: World, plan: Plan, methods: Sequence[Method], keep: Results) -> None:
    """Everything; ``keep`` takes the rows as they come, and holds those that are there already."""
    base = figures(world.base, world, world.search).figures
    if base["familiarity_completion"] < plan.least_familiarity:
        raise SystemExit(
            f"wrong: the base completes {base['familiarity_completion']:.2f} of the prompts, below "
            f"{plan.least_familiarity}; the world was not learnt and nothing can be forgotten."
        )
    keep.header["base_on_search_half"] = base
    report = Report(world)
    for name, model in (("base", world.base), ("oracle", world.oracle)):
        if name not in keep.done:
            found = figures(model, world, world.search).figures
            keep.add(_row(name, report(model), score=score(found, base)), [])
    left = [method for method in methods if method.name not in keep.done]
    clock = _Clock(sum(len(_settings(method, plan)) + _REPORT_WORTH for method in left))
    for method in left:
        rows, model = _searched(world, plan, method, base, clock)
        number = best(rows)
        common = {"retain_text": method.retain, "extra": method.extra, "needs": _needs(method)}
        if number is None:
            keep.add(_row(method.name, {}, status=DIVERGED, **common), rows)
            clock.advance(_REPORT_WORTH)
            continue
        taken = rows[number]
        tried = sorted(_settings(method, plan))
        row = _row(
            method.name,
            report(model),
            setting=taken["setting"],
            at_edge=taken["setting"] in (tried[0], tried[-1]),
            score=taken["score"],
            train_seconds=taken["train_seconds"],
            **common,
        )
        keep.add(row, rows)
        clock.advance(_REPORT_WORTH)
        say(f"  [bold]{method.name:<18}[/bold] {taken['setting']:g} is taken; {clock.left()}")


def _searched(
    world: World, plan: Plan, method: Method, base: dict, clock: _Clock
) -> tuple[list[dict[str, Any]], Llama | None]:
    """A row for each setting, and the best one's model."""
    rows: list[dict[str, Any]] = []
    kept = None
    for setting in _settings(method, plan):
        model, seconds = unlearnt(world, method, setting)
        row: dict[str, Any] = {"method": method.name, "setting": setting, "status": "trained"}
        found = dict.fromkeys(FIGURES)
        if model is None:
            row |= {"status": DIVERGED, "score": 0.0}
        else:
            found = figures(model, world, world.search).figures
            row |= {"score": score(found, base)}
        rows.append(row | found | {"train_seconds": round(seconds, 3)})
        if best(rows) == len(rows) - 1:
            kept = model
        clock.advance(1)
        told = "diverged" if model is None else _told(found)
        say(f"  {method.name:<18} {setting:<8g} {told}  score {row['score']:.3f}; {clock.left()}")
    return rows, kept


def _told(found: dict[str, float | None]) -> str:
    perplexity = found["general_perplexity"]
    told = f"familiarity {found['familiarity_completion']:.3f} and {found['familiarity_probability']:.3f}"
    told += f", accuracy {found['general_accuracy']:.3f}, perplexity "
    return told + ("inf" if perplexity is None else f"{perplexity:.4g}")


def _settings(method: Method, plan: Plan) -> tuple[float, ...]:
    return plan.strengths if method.objectives is None else plan.rates


def _needs(method: Method) -> str:
    """What a method needs beside the base and the target, in words."""
    needs = {"retain text": bool(method.retain), "reinforced model": method.reinforced}
    needs["dictionary"] = method.dictionary
    return ", ".join(name for name, needed in needs.items() if needed)


def _row(name: str, report: dict[str, Figure | None], **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "status": "measured", "needs": "", "retain_text": ""}
    row |= {"extra": False, "setting": None, "at_edge": False, "score": None, "train_seconds": None} | values
    row |= {key: None if report.get(key) is None else finite(report[key].value) for key in NAMES}
    row["intervals"] = {key: [finite(f.low), finite(f.high)] for key, f in report.items() if f is not None}
    return row


class Results:
    """The rows so far, and their file.

    Args:
        path: of the JSON; None: kept in memory alone.
        header: of the file.
        earlier: what a file to be continued holds.
    """

    def __init__(self, path: Path | None, header: dict[str, Any], earlier: dict[str, Any] | None = None):
        self.path, self.header = path, header
        self.rows: list[dict[str, Any]] = list(earlier["rows"]) if earlier else []
        self.search: list[dict[str, Any]] = list(earlier["search"]) if earlier else []
        self._before = earlier["header"]["seconds"] if earlier else 0.0
        self._began = time.monotonic()

    @property
    def done(self) -> set[str]:
        """Names of the rows."""
        return {row["method"] for row in self.rows}

    def add(self, row: dict[str, Any], search: Sequence[dict[str, Any]]) -> None:
        """A method's row with those of its search."""
        self.rows.append(row)
        self.search += search
        self.write()

    def write(self) -> None:
        """The file, whole or as it was."""
        self.header["seconds"] = round(self._before + time.monotonic() - self._began, 1)
        if self.path is not None:
            write_json(self.path, {"header": self.header, "rows": self.rows, "search": self.search})


class _Clock:
    """How much time is left, from what the work so far took."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount

    def left(self) -> str:
        spent = time.monotonic() - self._began
        minutes = spent / max(1, self._done) * (self._total - self._done) / 60
        return f"{100 * self._done / self._total:.0f} %, about {minutes:.1f} min left"


def _header(options: argparse.Namespace, plan: Plan, given: Sequence[str]) -> dict[str, Any]:
    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bitsandbytes": bitsandbytes_version(),
        },
        "commit": commit(),
        "command": " ".join(["python -m benchmarks.methods", *given]),
        "date": now(),
        "settings": {
            "seed": options.seed,
            "plan": json.loads(json.dumps(asdict(plan))),
            "relearn": {
                "steps": RELEARN_STEPS,
                "lr": RELEARN_LR,
                "batch_blocks": RELEARN_BATCH,
                "share": RELEARN_SHARE,
            },
        },
    }


def _of_world(world: World) -> dict[str, Any]:
    """For the header: how large the world is, and how the methods train."""
    halves = {"search": world.search, "report": world.report}
    names = ("familiarity", "probability", "choices", "texts")
    return {
        "parameters": sum(p.numel() for p in world.base.parameters()),
        "target_tokens": world.target.n_tokens,
        "retain_tokens": world.retain.n_tokens,
        "halves": {half: {n: len(getattr(data, n)) for n in names} for half, data in halves.items()},
        "training": asdict(world.training),
        "world_seconds": {name: round(value, 2) for name, value in world.seconds.items()},
    }


def _earlier(options: argparse.Namespace, header: dict[str, Any]) -> dict[str, Any] | None:
    if not options.go_on:
        return None
    if options.json is None:
        raise UserError("--continue: there is nothing to go on with; give --json FILE too.")
    if not options.json.is_file():
        return None
    try:
        earlier = json.loads(options.json.read_text(encoding="utf-8"))
        same = earlier["header"]["settings"] == header["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--json: {options.json} is no file of this benchmark; name another.") from None
    if not same:
        raise UserError(f"--continue: {options.json} was measured with other settings; leave it out.")
    return earlier


def _chosen(names: str | None) -> list[Method]:
    """Raises UserError for a name that is none."""
    if names is None:
        return list(METHODS)
    known = {method.name: method for method in METHODS}
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in known:
            raise UserError(f"--methods: there is no {name!r}; choose from {', '.join(known)}.")
    return [known[name] for name in asked]


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else FULL
    methods = _chosen(options.methods)
    header = _header(options, plan, given)
    earlier = _earlier(options, header)
    keep = Results(options.json, header, earlier)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    folder = options.folder or Path("runs") / f"methods_{plan.size}_{options.seed}"
    world = make_world(folder, plan.size, options.seed, options.world)
    if plan.steps:
        world.training = replace(world.training, steps=plan.steps)
    header |= _of_world(world) | {"world_reused": options.world is not None}
    try:
        measure(world, plan, methods, keep)
    except KeyboardInterrupt:
        if options.json is not None and keep.rows:
            say(f"{options.json} holds what was measured so far; --continue goes on from there")
        raise
    keep.write()
    (Console() if sys.stdout.isatty() else Console(width=170)).print(methods_table.terminal(keep.rows))
    for note in methods_table.notes(header["settings"], header["world_seconds"]):
        say(f"  {note}")
    if options.markdown:
        print(methods_table.markdown(keep.rows))
    if options.pictures is not None:
        from benchmarks.methods_pictures import draw

        for path in draw(options.pictures, {"header": header, "rows": keep.rows, "search": keep.search}):
            say(f"  {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 1 where the world was not learnt, 2 for what the user can mend."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    return exit_status(lambda: _run(options, given), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description="Methods of forgetting side by side."
    )
    parser.add_argument("--json", type=Path, help="write header, rows and all trainings of the search here")
    parser.add_argument("--pictures", type=Path, help="draw into this folder")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of every training")
    parser.add_argument("--folder", type=Path, help="for world, labels and caches (runs/methods_SIZE_SEED)")
    parser.add_argument("--world", type=Path, help="a finished world of the demo, in the place of a new one")
    parser.add_argument("--methods", help="names, with commas between; the default is all")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="do what --json lacks")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README too")
    parser.add_argument("--quick", action="store_true", help="the smallest size: does it run")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
