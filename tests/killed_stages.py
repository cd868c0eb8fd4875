"""Kills a job with SIGKILL at random moments of every stage; run as a process of its own by `test_kills.py`.

What is slow to load is loaded once; every start of the job is a forked process, whose stage tells through a
pipe when it begins and ends. Nothing is computed before a fork, so no thread is lost by it.

Arguments: kills a stage, the run folder to be killed, one for a run that is not disturbed, and the command
line of the job without ``run.dir``. Prints one line of JSON.
"""

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from tiny_world import STAGES
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  slow to load

from whp_fast import artifacts, figures, inputs, job, train
from whp_fast.label import make_aligner

TRIES = 6  # starts for each kill that is wanted: some stages are over before they are killed


class Start:
    """A start of the job in a process of its own, up to the end of one stage.

    Attributes:
        told: what it printed.
        status: exit status, or minus the number of the signal that ended it.
        began, ended: when the stage's work began and when the stage was complete (None: not).
    """

    def __init__(self, words: list[str], stage: str, delay: float | None = None):
        begun, begin = os.pipe()
        read, write = os.pipe()
        self.began = self.ended = None
        self._child = os.fork()
        if not self._child:
            os.dup2(write, 1)
            os.nice(8)  # the parent wakes in time to kill, also on a busy machine
            _run(words, stage, begin)
        os.close(begin)
        os.close(write)
        if os.read(begun, 1) == b"b":
            self.began = time.monotonic()
            if delay is not None:
                if not select.select([begun], [], [], delay)[0]:
                    os.kill(self._child, signal.SIGKILL)
            if os.read(begun, 1):
                self.ended = time.monotonic()
        with open(read, encoding="utf-8") as printed:
            self.told = printed.read()
        os.close(begun)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])


def _run(words: list[str], stage: str, begin: int) -> None:
    """In the forked process: the command line, left after the stage."""
    real = artifacts.RunFolder.stage

    def told(self, name, depends_on, work):
        def begun(folder):
            if name == stage:
                os.write(begin, b"b")
            return work(folder)

        done = real(self, name, depends_on, begun)
        if name == stage:
            os.write(begin, b"e")
        return done

    artifacts.RunFolder.stage = told
    following = STAGES[STAGES.index(stage) + 1 :]
    if following:
        setattr(job.Job, following[0], lambda self, *_: sys.exit(0))
    status = 1
    try:
        status = train.main(words)
    except SystemExit as left:
        status = left.code
    finally:
        sys.stdout.flush()
        os._exit(status)


COSTS = ("seconds", "gpu_seconds", "joules")


def files_of(run: Path, stage: str) -> dict[str, object]:
    """Content of a stage's files, without what holds seconds: parts of the log and of the report."""
    found = {}
    for path in sorted((run / stage).rglob("*")):
        if path.name == "log.jsonl":
            records = map(json.loads, path.read_text().splitlines())
            found[path.name] = [
                [r["step"], r["loss"], r["grad_norm"], r["lr"], r["trained"]] for r in records
            ]
        elif path.name == "metrics.json":
            metrics = json.loads(path.read_text())
            del metrics["settings"]["run"]["dir"]  # the two runs lie in folders of their own
            found[path.name] = {name: metrics[name] for name in metrics if name not in COSTS}
        elif path.is_file() and path.name != "complete.json" and stage != "report":
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def clean(run: Path) -> bool:
    """Whether nothing half-written is left of finished stages."""
    return not any(name.endswith((".partial", ".old", ".snapshots")) for name in os.listdir(run))


def kill_in(stage: str, words: list[str], run: Path, whole: Path, seconds: float, wanted: int) -> dict:
    """Kill starts of a stage again and again, each going on from what the one before left.

    A stage that was complete before its kill is compared with the undisturbed one and removed."""
    moments = random.Random(stage)
    killed = starts = resumed = completed = 0
    same, share = True, 1.0

    def compare() -> bool:
        return clean(run) and files_of(run, stage) == files_of(whole, stage)

    while killed < wanted and starts < TRIES * wanted:
        starts += 1
        start = Start(words, stage, delay=moments.random() * seconds * share)
        resumed += "goes on after step" in start.told
        if start.began is None:  # the stage was whole: the kill before came after its last rename
            same &= start.status == 0 and compare()
        elif start.status == -signal.SIGKILL:
            killed += 1
            share = min(1.0, 1.5 * share)
            continue
        else:
            same &= start.status == 0 and compare()
        completed += 1
        share *= 0.7  # of its duration: it goes on from a snapshot, or the machine was busier before
        with suppress(FileNotFoundError):
            shutil.rmtree(run / stage)
    last = Start(words, stage)
    same &= last.status == 0 and compare()
    return {"killed": killed, "starts": starts, "resumed": resumed, "completed": completed, "same": same}


def main(wanted: int, run: str, whole: str, *words: str) -> None:
    torch.set_num_threads(1)
    for name in ("draw_curve", "draw_next_tokens", "draw_label_page"):
        setattr(figures, name, lambda path, *args, **kwargs: Path(path).write_bytes(b"picture") and [])
    words = list(words)
    train.parse_config(words)
    inputs.load_model("world/base", device="meta")
    make_aligner(inputs.load_dictionary("world/anchors.json"), inputs.load_tokenizer("world/base"))
    found = {}
    for stage in STAGES:
        # what is not disturbed has the same duration only if it is measured as the killed ones are
        start = Start([*words, "--run.dir", whole], stage)
        assert start.status == 0, start.told
        seconds = start.ended - start.began
        found[stage] = kill_in(stage, [*words, "--run.dir", run], Path(run), Path(whole), seconds, wanted)
        found[stage]["seconds"] = round(seconds, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
