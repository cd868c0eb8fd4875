"""``kill -9`` at random moments of every stage, signals, damaged snapshots and full disks: the same bits.

Each stage is killed four times, or twenty with WHP_FAST_ALL_KILLS=1.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import STAGES, arguments, ask_to_stop, contents, make_world, without_pictures

from whp_fast import snapshots, train

KILLS = 20 if os.environ.get("WHP_FAST_ALL_KILLS") else 4
STEPS = 6
SAVED_STEPS = dict(reinforce__steps=STEPS, unlearn__steps=STEPS, run__snapshot_steps=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("kills") / "world")


def test_kills_at_random_moments_of_every_stage_change_no_bit(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    words = arguments(run__dir=None, **SAVED_STEPS)
    script = Path(__file__).with_name("killed_stages.py")
    done = subprocess.run(
        [sys.executable, str(script), str(KILLS), "killed", "whole", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert set(found) == set(STAGES)
    for stage, figures in found.items():
        assert figures["same"], (stage, figures)
        assert figures["killed"] == KILLS, (stage, figures)  # inside the stage's work
    for stage in ("reinforce", "unlearn"):
        assert found[stage]["resumed"] >= KILLS // 3, found[stage]  # or nothing was gained by snapshots


# Signals, damage, full disks: in this process
# -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world):
    """The folder of the world, beside which `run` was made without a disturbance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.parent)
        without_pictures(patch)
        assert train.main(words()) == 0
    return world.parent


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A world in the current folder; draws no pictures."""
    shutil.copytree(whole / "world", tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)


def words(**settings) -> list[str]:
    return arguments(evaluation=False, **{**SAVED_STEPS, **settings})


def run(capfd, *more: str, **settings) -> tuple[int, str, str]:
    """Exit status and what was printed, also by signal handlers."""
    capfd.readouterr()
    status = train.main([*words(**settings), *more])
    printed = capfd.readouterr()
    return status, printed.out, printed.err


def snapshots_of(stage: str) -> list[str]:
    folder = Path(f"run/.{stage}.snapshots")
    return sorted(os.listdir(folder)) if folder.is_dir() else []


@pytest.mark.parametrize("stage", ["reinforce", "unlearn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_training_saves_and_leaves(here, whole, capfd, monkeypatch, stage, number):
    ask_to_stop(monkeypatch, stage, 2, number)
    status, out, err = run(capfd, run__snapshot_steps=0)
    assert status == 130
    assert err.splitlines() == [
        "stopping: this step is finished and saved (once more leaves at once)",
        "stopped; finished stages are kept, the same command goes on from there",
    ]
    assert snapshots_of(stage) == ["step-00000002"]
    assert not Path("run", stage).exists() and not Path(f"run/.{stage}.partial").exists()
    status, out, err = run(capfd, run__snapshot_steps=0)
    assert (status, err) == (0, "")
    assert f"{stage}: goes on after step 2" in out
    assert contents("run") == contents(whole / "run")
    assert len(Path("run", stage, "log.jsonl").read_text().splitlines()) == STEPS
    assert not Path(f"run/.{stage}.snapshots").exists()  # the stage is complete


def test_a_signal_at_the_last_step_of_a_training_leaves_too(here, whole, capfd, monkeypatch):
    ask_to_stop(monkeypatch, "reinforce", STEPS)
    status, out, err = run(capfd)
    assert status == 130 and "stopping" in err
    assert not Path("run/label").exists()  # nothing was begun any more
    status, out, err = run(capfd)
    assert (status, err) == (0, "")
    assert contents("run") == contents(whole / "run")


@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_a_damaged_newest_snapshot_is_named_and_the_one_before_used(here, whole, capfd, monkeypatch, damage):
    ask_to_stop(monkeypatch, "unlearn", 3)
    assert run(capfd)[0] == 130
    assert len(snapshots_of("unlearn")) == 2
    newest = Path("run/.unlearn.snapshots", snapshots_of("unlearn")[-1])
    file = next(newest.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    status, out, err = run(capfd)
    assert (status, err) == (0, "")
    told = " ".join(out.split())
    assert "warning:" in told and newest.name in told and "step 2 is used instead" in told
    assert "unlearn: goes on after step 2" in told
    assert contents("run") == contents(whole / "run")


def test_overwrite_begins_anew(here, whole, capfd, monkeypatch):
    ask_to_stop(monkeypatch, "reinforce", 3)
    assert run(capfd)[0] == 130
    assert snapshots_of("reinforce")
    status, out, _ = run(capfd, "--overwrite")
    assert status == 0 and "goes on" not in out
    assert contents("run") == contents(whole / "run")


def test_a_snapshot_of_other_inputs_is_not_used(here, capfd, monkeypatch):
    ask_to_stop(monkeypatch, "reinforce", 3)
    assert run(capfd)[0] == 130
    with open("world/corpus/one.txt", "a", encoding="utf-8") as file:
        file.write("Orrin was old.\n")
    status, out, _ = run(capfd)
    assert status == 0 and "goes on" not in out and "the training starts anew" in " ".join(out.split())


def test_snapshots_are_gone_when_the_job_is_done(whole):
    left = [name for name in os.listdir(whole / "run") if name.endswith((".snapshots", ".partial", ".old"))]
    assert left == []


@pytest.mark.parametrize("stage", ["reinforce", "unlearn"])
def test_a_full_disk_while_a_snapshot_is_written(here, whole, capfd, monkeypatch, stage):
    real = snapshots.write_file

    def full(path, pieces):
        if f".{stage}.snapshots" in str(path) and "0003" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "write_file", full)
        status, _, err = run(capfd)
    assert status == 2
    assert err.startswith(f"error: run/.{stage}.snapshots/") and err.count("\n") == 1
    for told in ("the disk is full", "snapshot of step 3", "free some space and start again"):
        assert told in err
    assert not Path(f"run/.{stage}.partial").exists()
    status, out, err = run(capfd)
    assert (status, err) == (0, "")
    assert f"{stage}: goes on after step 2" in out
    assert contents("run") == contents(whole / "run")
