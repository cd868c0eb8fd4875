"""Two processes against one: the same losses and weights, snapshots from one number to another, and what is
told when something is wrong in one of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_runs import CASES, GROUPS, RESUMED, STEPS
from safetensors.torch import load_file
from tiny_training import tiny_model
from tiny_world import arguments, make_world

from whp_fast import train

TESTS = Path(__file__).parent


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that ``distributed_runs.py`` filled."""
    folder = tmp_path_factory.mktemp("runs")
    make_world(folder / "world")
    words = [sys.executable, str(TESTS / "distributed_runs.py"), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def statuses(runs):
    return json.loads((runs / "status.json").read_text())["statuses"]


@pytest.fixture(scope="module")
def checked(runs, statuses):
    """Results of the two processes of the group ``checks``."""
    assert statuses["checks"] == [0, 0], (runs / "checks.0.err").read_text() + (
        runs / "checks.1.err"
    ).read_text()
    return [torch.load(runs / f"checks.{rank}.pt") for rank in (0, 1)]


def errors(runs, group):
    return [(runs / f"{group}.{rank}.err").read_text() for rank in (0, 1)]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------- the same numbers

# Where weights or gradients are rounded to bfloat16 or moments to 8 bits, small gradients may turn round, and
# AdamW makes the same step of a small gradient as of a large one: (losses, weights).
ROUNDED = {
    "bfloat16": (1e-3, 3e-3),
    "bfloat16 gradients": (2e-3, 3e-3),
    "8-bit moments": (1e-6, 3e-4),
    "bitsandbytes": (1e-4, 3e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(checked, case):
    two, one = checked[0]["cases"][case]["two"], checked[0]["cases"][case]["one"]
    losses, weights = ROUNDED.get(case, (1e-6, 1e-6))
    assert len(one["losses"]) > 1 and largest_difference(one["before"], one["after"]) > 1e-3
    assert two["losses"] == pytest.approx(one["losses"], rel=losses, abs=0)
    assert two["norms"] == pytest.approx(one["norms"], rel=max(2e-6, 5 * losses), abs=0)
    assert two["counts"] == one["counts"]
    assert largest_difference(two["after"], one["after"]) < weights
    other = checked[1]["cases"][case]["two"]
    assert other["losses"] == two["losses"] and other["norms"] == two["norms"]
    assert same_bits(other["after"], two["after"])


def test_cases_are_what_they_are_named(checked):
    def counts(case):
        return checked[0]["cases"][case]["one"]["counts"]

    assert sum(tokens for _, tokens in counts("odd last step")) == 103  # 8 and 3 blocks
    assert counts("idle process")[-1][1] in (3, 10)  # one block
    masked = [trained for trained, _ in counts("masked")]
    assert masked.count(0) == 4 and len(masked) == 9


@pytest.mark.parametrize("case", CASES)
def test_shards_are_read_as_the_whole_model_is(checked, case):
    two, one = checked[0]["cases"][case]["two"], checked[0]["cases"][case]["one"]
    assert same_bits(two["before"], one["before"])
    if "narrow" in CASES[case]:
        assert all(torch.equal(one["before"][name], p) for name, p in tiny_model().named_parameters())
    both = [results["cases"][case]["two"]["local"] for results in checked]
    if case in ("adapters", "replicas"):
        assert both == [one["local"]] * 2
    else:
        assert sum(both) == one["local"] and max(both) < 0.52 * one["local"]


@pytest.mark.parametrize("case", ["8-bit moments", "bfloat16", "adapters"])
def test_shards_are_saved_as_the_whole_model_is(checked, runs, case):
    one, two = runs / "one" / case, runs / "two" / case
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert Path("model/model.safetensors") in files
    assert any("adapter" in str(file) for file in files) == (case == "adapters")
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


# --------------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("kind", RESUMED)
def test_a_stopped_training_goes_on_with_the_same_bits(checked, kind):
    for results in checked:
        ways = results["resumed"][kind]
        assert len(ways["2"][0]) == STEPS
        assert ways["2 -> 2"][0] == ways["2"][0]
        assert same_bits(ways["2 -> 2"][1], ways["2"][1])


@pytest.mark.parametrize("kind", [kind for kind in RESUMED if kind != "bitsandbytes"])
def test_a_training_goes_on_in_another_number_of_processes(checked, kind):
    """Two processes to step 2, one to step 4, two to the end."""
    ways = checked[0]["resumed"][kind]
    losses = ways["2 -> 1"][0] + ways["2 -> 1 -> 2"][0]
    assert [len(ways[name][0]) for name in ("2 -> 1", "2 -> 1 -> 2")] == [4, 1]
    rounded = kind.startswith("bfloat16")
    assert losses == pytest.approx(ways["2"][0], rel=5e-3 if rounded else 1e-6)
    assert ways["1"][0] == pytest.approx(ways["2"][0], rel=5e-3 if rounded else 1e-6)
    weights = ways["2 -> 1 -> 2"][1]
    assert largest_difference(weights, ways["2"][1]) < (3e-3 if rounded else 1e-6)


def test_moments_of_bitsandbytes_are_for_as_many_processes(checked):
    """Its blocks run over the rows of a process."""
    ways = checked[0]["resumed"]["bitsandbytes"]
    assert "2 -> 1" not in ways
    assert "step-00000002: the moments of bitsandbytes were saved by another number of" in ways["refused"]
    assert "memory.moments int8" in ways["refused"]


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("memory", ["{}", "{'lora_rank': 2}"])
def test_a_gradient_that_is_not_finite_on_one_process_stops_all(checked, memory):
    for results in checked:
        message = results["refused"][f"gradient {memory}"]
        assert message is not None and "of step 1 is not finite" in message
        assert "the loss (nan)" not in message  # the gradient alone
        assert results["refused"][f"kept {memory}"]


def test_numbers_of_processes_that_do_not_divide(checked):
    for results in checked:
        assert results["refused"]["3 blocks"].startswith(
            "train.accumulate: the 3 blocks of a step do not divide among 2 processes; set"
        )
        assert results["refused"]["3 replicas"].startswith("memory.replicas: 2 processes do not divide")


def test_processes_tell_each_other(checked):
    assert [results["all of"] for results in checked] == [([0, 1], 0)] * 2


@pytest.mark.parametrize(("group", "text"), [("wrong key", "unlearn.lrr"), ("refused", "do not divide")])
def test_what_is_wrong_is_said_once(runs, statuses, group, text):
    assert statuses[group] == [2, 2]
    first, second = errors(runs, group)
    assert first.startswith("error: ") and len(first.splitlines()) == 1 and text in first
    assert second == ""
    assert (runs / f"{group}.1.out").read_text() == ""  # the first process alone speaks


@pytest.mark.parametrize(("group", "dead"), [("killed", 1), ("killed first", 0)])
def test_a_killed_process_is_named_and_ends_the_job(runs, statuses, group, dead):
    assert group in GROUPS
    lines = errors(runs, group)[1 - dead].splitlines()
    (told,) = [line for line in lines if not line.startswith(("[rank", "frame", "Exception", "<")) and line]
    assert statuses[group][dead] == -signal.SIGKILL and statuses[group][1 - dead] == 1
    assert told.startswith(f"error: process {dead}")  # beside what torch writes when its store is gone
    assert "was killed" in told and "start the job again" in told


def test_a_killed_job_goes_on_from_its_snapshot(runs, statuses):
    told = (runs / "killed first.0.out").read_text()
    assert "reinforce: goes on after step 1, from the snapshot made there" in told
    assert [line.split()[1] for line in told.splitlines() if line.split()[0] in ("prepare", "align")] == [
        "complete",
        "complete",
    ]


# ------------------------------------------------------------------------------------------ the whole job


@pytest.fixture(scope="module")
def torchrun_job(tmp_path_factory):
    """A folder with a job of one process, ``one``, and the same of two, ``two``."""
    folder = tmp_path_factory.mktemp("job")
    make_world(folder / "world")
    settings = dict(unlearn__steps=2, unlearn__evaluate_every=1, run__tensorboard="false")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(arguments("one", **settings)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "-m", "whp_fast.train", *arguments("two", **settings)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_job_of_two_processes_ends_as_one_of_one(torchrun_job):
    folder, done = torchrun_job
    for line in ("prepare", "reinforce", "label", "unlearn", "done"):  # each told by one process
        assert sum(row.split()[:1] == [line] for row in done.stdout.splitlines()) == 1, line
    one, two = folder / "one", folder / "two"
    labels = [np.load(run / "label" / "labels_alpha_5.npy") for run in (one, two)]
    np.testing.assert_array_equal(*labels)
    for stage in ("reinforce", "unlearn"):
        rows = [
            [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
            for run in (one, two)
        ]
        losses = [[row["loss"] for row in log] for log in rows]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) > 1
    weights = [load_file(run / "export" / "model.safetensors") for run in (one, two)]
    assert 0 < largest_difference(*weights) < 1e-5
    curves = [json.loads((run / "unlearn" / "curve.json").read_text()) for run in (one, two)]
    assert [point["step"] for point in curves[1]] == [0, 1, 2]
    for point, other in zip(*curves, strict=True):
        assert point["general_perplexity"] == pytest.approx(other["general_perplexity"], rel=1e-5)
    assert [name for name in os.listdir(two) if name.endswith((".partial", ".old", ".snapshots"))] == []
    shutil.rmtree(folder)
