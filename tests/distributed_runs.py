"""What ``test_distributed.py`` looks at: groups of two processes, forked from this one, which loads once what
is slow to load.

    python distributed_runs.py FOLDER

leaves in FOLDER, for each group, ``GROUP.RANK.out`` and ``.err``, and in ``status.json`` the exit statuses;
the group ``checks`` leaves its results in ``checks.RANK.pt``. FOLDER holds a tiny ``world``.
"""

import functools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny_training import CPU, DEFAULTS, corpus, fit, label_objective, masters, tiny_model
from tiny_world import arguments

from whp_fast import processes, quantised, train
from whp_fast.checkpoint import save_model
from whp_fast.config import MemoryConfig, UnlearnConfig
from whp_fast.engine import Keeping
from whp_fast.errors import UserError
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.processes import Processes
from whp_fast.snapshots import Snapshots
from whp_fast.stopping import Stopped
from whp_fast.trainee import Trainee

WIDE = dict(hidden_size=64, intermediate_size=96)  # matrices of 4,096 elements: 8-bit moments
MODELS = {"narrow": {}, "wide": WIDE, "tied": {"tie_word_embeddings": True}}


def masked_corpus():
    """Blocks of which most have no label: some steps have none at all, some none for one process."""
    blocks, labels = corpus()
    labels = labels.copy()
    for number in (0, 2, 3, 5, 6, 8):
        labels[number * 10 : (number + 1) * 10] = -100
    return blocks, labels


def next_tokens():
    return [Objective(corpus()[0], LabelTargets(corpus()[0], None))]


def one(**changes):
    return lambda: [label_objective(corpus(**changes))]


# name: (model, memory, dtype, objectives, settings)
CASES = {
    "short last step": ("narrow", {}, "float32", one(), dict(steps=0, epochs=2.0, batch_blocks=2)),
    "odd last step": ("narrow", {}, "float32", one(n_blocks=11), dict(steps=0, epochs=1.0)),
    "idle process": ("narrow", {}, "float32", one(), dict(steps=0, epochs=1.0, clip_grad_norm=0.05)),
    "accumulated": ("narrow", {}, "float32", next_tokens, dict(batch_blocks=1, accumulate=8, steps=2)),
    "masked": (
        "narrow",
        {},
        "float32",
        lambda: [label_objective(masked_corpus())],
        dict(steps=9, batch_blocks=2, accumulate=1),
    ),
    "two objectives": (
        "narrow",
        {},
        "float32",
        lambda: [label_objective(), label_objective(corpus(seed=1), weight=0.3)],
        {},
    ),
    "tied": ("tied", {}, "float32", one(), dict(steps=2)),
    "replicas": ("narrow", {"replicas": 2}, "float32", one(), {}),
    "checkpointing": ("narrow", {"checkpointing": "full"}, "float32", one(), dict(steps=2)),
    "adapters": ("narrow", {"lora_rank": 2}, "float32", one(), dict(clip_grad_norm=0.05)),
    "bfloat16": ("narrow", {}, "bfloat16", one(), dict(batch_blocks=1, accumulate=8)),
    "bfloat16 gradients": ("narrow", {"gradients": "bfloat16"}, "bfloat16", one(), {}),
    "8-bit moments": ("wide", {"moments": "int8"}, "float32", one(), {}),
    "bitsandbytes": ("wide", {"optimizer": "bitsandbytes"}, "float32", one(), {}),
}
# what is stopped, and goes on in other numbers of processes
RESUMED = {
    "float32": ("narrow", {}, "float32"),
    "bfloat16, 8-bit moments": ("wide", {"moments": "int8"}, "bfloat16"),
    "adapters": ("narrow", {"lora_rank": 2}, "float32"),
    "replicas": ("narrow", {"replicas": 2}, "float32"),
    "bitsandbytes": ("wide", {"optimizer": "bitsandbytes"}, "float32"),
}


def load(folder, model, memory, dtype, group, **settings):
    """A trainee of a saved model; ``group`` is of this process alone or of both."""
    return Trainee.load(
        Path(folder, model),
        UnlearnConfig(**{**DEFAULTS, **settings}),
        MemoryConfig(**memory),
        compute_dtype=getattr(torch, dtype),
        device=CPU,
        processes=group,
    )


def trained(folder, case, group):
    """Losses, norms and counts of a case, its exact weights before and after, and the loaded trainee."""
    model, memory, dtype, objectives, settings = CASES[case]
    trainee = load(folder, model, memory, dtype, group, **settings)
    before = masters(trainee)
    records = fit(trainee, objectives(), processes=group, **settings)
    return {
        "losses": [r.loss for r in records],
        "norms": [r.grad_norm for r in records],
        "counts": [(r.trained, r.tokens) for r in records],
        "before": before,
        "after": masters(trainee),
        "local": sum(
            t.numel() for t in (getattr(p, "to_local", lambda p=p: p)() for p in trainee.trained.values())
        ),
    }


STEPS = 5


def part(folder, kind, group, snapshots, stop=0):
    """Train from the newest snapshot on, up to the end or a stop; (losses, exact weights).

    The signal comes to the last process alone: all of them save and leave."""
    model, memory, dtype = RESUMED[kind]
    settings = dict(steps=STEPS, schedule="linear", warmup_steps=1)
    trainee = load(folder, model, memory, dtype, group, **settings)
    keeper = Snapshots(
        Path(snapshots),
        identity=kind,
        rank=group.rank,
        world_size=group.world_size,
        attempt=group.from_first(os.urandom(4).hex()),
        barrier=group.wait,
    )
    found = keeper.latest() if group.first else None
    step = group.from_first(found.step if found else None)
    if step is not None and not group.first:
        found = keeper.open(step)
    done = []

    def after_step(step):
        if stop and step == stop and group.rank == group.world_size - 1:
            signal.raise_signal(signal.SIGTERM)

    keeping = Keeping(keeper, found, minutes=0, state=lambda: {"losses": len(done)})
    try:
        fit(
            trainee,
            [label_objective()],
            done=done,
            processes=group,
            keeping=keeping,
            after_step=after_step,
            **settings,
        )
        assert not stop
    except Stopped:
        assert stop
    return [r.loss for r in done], masters(trainee)


def resumptions(folder, kind, group):
    """Name -> (losses, weights) of ways through the same training."""
    alone = Processes()

    def copied(one, other):
        group.wait()
        if group.first:
            shutil.copytree(one, other)
        group.wait()
        return other

    here = Path(folder, "snapshots", kind)
    result = {"2": part(folder, kind, group, here / "none")}
    first, _ = part(folder, kind, group, here / "a", stop=2)
    copied(here / "a", here / "b")
    losses, weights = part(folder, kind, group, here / "a")
    result["2 -> 2"] = first + losses, weights
    if group.first:
        try:
            second, weights = part(folder, kind, alone, here / "b", stop=4)
            result["2 -> 1"] = first + second, weights
        except UserError as error:
            result["refused"] = str(error)
    if group.from_first("2 -> 1" in result):
        third, weights = part(folder, kind, group, here / "b")
        result["2 -> 1 -> 2"] = third, weights
    if group.first:
        result["1"] = part(folder, kind, alone, here / "one")
    group.wait()
    return result


class PoisonedTargets(LabelTargets):
    """A finite loss with a gradient that is not, on one process."""

    def loss(self, hidden, *args, **kwargs):
        hidden.register_hook(lambda gradient: gradient * float("inf"))
        return super().loss(hidden, *args, **kwargs)


def refusals(folder, group):
    """Messages of what every process refuses, and the weights that stay as they were."""
    told = {}

    def refused(name, work):
        try:
            work()
            told[name] = None
        except UserError as error:
            told[name] = str(error)

    blocks, labels = corpus()
    kind = PoisonedTargets if group.rank == 1 else LabelTargets
    for memory in ({}, {"lora_rank": 2}):
        trainee = load(folder, "narrow", memory, "float32", group)
        before = masters(trainee)
        refused(
            f"gradient {memory}",
            lambda t=trainee: fit(t, [Objective(blocks, kind(blocks, labels))], processes=group),
        )
        after = masters(trainee)
        told[f"kept {memory}"] = all(torch.equal(before[name], after[name]) for name in before)
    trainee = load(folder, "narrow", {}, "float32", group)
    odd = dict(batch_blocks=3, accumulate=1)
    refused("3 blocks", lambda: fit(trainee, [label_objective()], processes=group, **odd))
    refused("3 replicas", lambda: load(folder, "narrow", {"replicas": 3}, "float32", group))
    return told


def checks(folder):
    """All that needs no command line."""
    torch.set_num_threads(1)
    seconds, results = {}, {"cases": {}, "resumed": {}}
    with processes.join_processes("cpu") as group:
        if group.first:
            for name, changes in MODELS.items():
                model = tiny_model(**changes)
                save_model(model, Path(folder, name), dtype=torch.float32)
        group.wait()
        alone = Processes()
        for case in CASES:
            began = time.monotonic()
            both = trained(folder, case, group)
            results["cases"][case] = {
                "two": both,
                "one": trained(folder, case, alone) if group.first else None,
            }
            group.wait()
            seconds[case] = time.monotonic() - began
        for case in ("8-bit moments", "bfloat16", "adapters"):
            model, memory, dtype, *_ = CASES[case]
            load(folder, model, memory, dtype, group).save(made(Path(folder, "two", case), group), "base")
            if group.first:
                load(folder, model, memory, dtype, alone).save(made(Path(folder, "one", case), alone), "base")
        for kind in RESUMED:
            began = time.monotonic()
            results["resumed"][kind] = resumptions(folder, kind, group)
            seconds[f"resumed {kind}"] = time.monotonic() - began
        results["refused"] = refusals(folder, group)
        results["all of"] = group.all_of(group.rank), group.from_first(group.rank)
    results["seconds"] = seconds
    torch.save(results, Path(folder, f"checks.{os.environ['RANK']}.pt"))
    return 0


def made(folder, group):
    if group.first:
        folder.mkdir(parents=True)
    group.wait()
    return folder


def deadly(owner, name, call):
    """Kill this process at a call of a function."""
    real, calls = getattr(owner, name), 0

    @functools.wraps(real)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def job(*words, dies=None):
    """The command line in the folder of the world."""

    def work(folder):
        os.chdir(folder)
        processes.BEAT_SECONDS, processes.SILENT_SECONDS = 0.2, 4.0
        if dies is not None and os.environ["RANK"] == str(dies):
            deadly(Trainee, "update", 2)
        return train.main([*arguments(evaluation=False, run__snapshot_steps=1), *words])

    return work


GROUPS = {
    "checks": checks,
    "wrong key": job("--unlearn.lrr", "1"),
    "killed": job(dies=1),
    "killed first": job(dies=0),  # goes on in the same run folder
    "refused": job("--memory.replicas", "3"),
}


def start(folder, name, rank, port):
    """Fork one process of a group."""
    if child := os.fork():
        return child
    status = 1
    try:
        for stream, ending in ((1, "out"), (2, "err")):
            file = os.open(Path(folder, f"{name}.{rank}.{ending}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        status = GROUPS[name](folder)
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def main(folder):
    quantised._bitsandbytes()
    statuses, seconds, names = {}, {}, list(GROUPS)
    for name in names:
        began, port = time.monotonic(), free_port()
        children = {start(folder, name, rank, port): rank for rank in (0, 1)}
        ended = {}
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                ended[children.pop(child)] = os.waitstatus_to_exitcode(status)
                if name.startswith("killed"):  # as torchrun does when a process ended badly
                    time.sleep(0.3)
                    for other in children:
                        os.kill(other, signal.SIGTERM)
            elif time.monotonic() - began > 200:
                for child in children:
                    os.kill(child, signal.SIGKILL)
            else:
                time.sleep(0.02)
        statuses[name] = [ended[rank] for rank in (0, 1)]
        seconds[name] = time.monotonic() - began
    Path(folder, "status.json").write_text(json.dumps({"statuses": statuses, "seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
