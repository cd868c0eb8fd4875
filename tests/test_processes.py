"""One process alone, the environment of a group, and what heartbeats tell. Groups of two are looked at in
``test_distributed.py``."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from whp_fast import processes
from whp_fast.errors import UserError
from whp_fast.processes import Processes, join_processes

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of torchrun; those that are not named are not there."""

    def put(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    put()
    return put


def test_one_process_needs_no_group(environment):
    with join_processes("cpu") as alone:
        assert alone == Processes(0, 1, 0) and alone.first and not alone.several
        values = torch.tensor([1.5, 2.0])
        assert alone.add(values) is values and values.tolist() == [1.5, 2.0]
        assert alone.from_first({"a": 1}) == {"a": 1} and alone.from_first() is None
        assert alone.all_of("x") == ["x"]
        alone.wait()
        assert not dist.is_initialized()
    alone.close()
    assert not Processes(1, 2).first and Processes(1, 2).several


def test_errors_of_one_process_are_its_own(environment):
    environment(WORLD_SIZE="1", RANK="0")
    with pytest.raises(RuntimeError, match="of the work"), join_processes("cpu"):
        raise RuntimeError("of the work")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_a_number_that_is_none(environment, name):
    environment(**{"WORLD_SIZE": "2", "RANK": "0", name: "two"})
    with pytest.raises(UserError, match=f"{name}: 'two' is no number.*torchrun"), join_processes("cpu"):
        pass


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_group_without_a_meeting_point(environment, missing):
    values = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    environment(**{name: value for name, value in values.items() if name != missing})
    with (
        pytest.raises(UserError, match="MASTER_ADDR: the 2 processes did not find each other.*torchrun"),
        join_processes("cpu"),
    ):
        pass
    assert not dist.is_initialized()


# --------------------------------------------------------------------------------------------- heartbeats


@pytest.fixture
def watches(monkeypatch):
    """Makes watches of one group in this process, over one store, with quick heartbeats."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.15)
    monkeypatch.setattr(processes, "SILENT_SECONDS", 1000.0)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: server)
    made = []

    def make(rank, world_size):
        made.append(processes._Watch(rank, world_size))
        return made[-1]

    make.server = server
    yield make
    for watch in made:
        watch.leave("")
        assert not watch._thread.is_alive()


def beating(watch):
    return watch._thread.is_alive()


def test_nobody_is_gone_while_all_hearts_beat(watches):
    one, other = watches(0, 2), watches(1, 2)
    assert one.gone(patience=0.6) == "" and other.gone(patience=0.1) == ""
    assert beating(one) and beating(other)
    assert one.lowest_here() == other.lowest_here() == 0


def test_a_process_that_falls_silent_is_named(watches):
    one, other = watches(0, 3), watches(1, 3)
    watches(2, 3)
    other._left.set()  # as one that is killed: nothing is said
    other._thread.join()
    began = time.monotonic()
    told = one.gone(patience=5.0)
    assert 0.3 < time.monotonic() - began < 4  # four beats
    assert told.startswith(f"process 1 ({other._where}) has stopped answering: it was killed")
    assert "start the job again, it goes on from the last snapshot" in told


def test_a_process_that_never_came(watches):
    assert watches(0, 2).gone(patience=2.0).startswith("process 1 has stopped answering")


def test_a_process_that_left_with_a_reason_is_quoted(watches):
    one, other = watches(0, 2), watches(1, 2)
    other.leave("the disk is full | really")
    assert one.gone(patience=1.0) == (
        f"process 1 ({other._where}) could not go on: the disk is full | really"
    )


def test_a_good_end_is_no_loss(watches):
    one, other = watches(0, 2), watches(1, 2)
    other.leave("")
    assert one.gone(patience=0.8) == ""


def test_the_lowest_that_is_left_speaks(watches):
    first, second, third = (watches(rank, 3) for rank in range(3))
    assert third.gone(patience=0.3) == "" and third.lowest_here() == 0
    first.leave("a reason")
    third.gone(patience=0.3)
    second.gone(patience=0.3)
    assert third.lowest_here() == second.lowest_here() == 1


def test_the_same_reason_is_said_by_the_first_alone(watches):
    first, second = watches(0, 2), watches(1, 2)
    assert not second.said_by_first("a reason", patience=0.3)  # it is still there
    threading.Timer(0.2, first.leave, ["a reason"]).start()
    assert second.said_by_first("a reason", patience=5.0)
    assert not second.said_by_first("another reason", patience=0.3)
    long = "x" * 3000
    third = watches(0, 2)
    third.leave(long)
    assert second.said_by_first(long, patience=1.0)


def test_the_first_waits_until_the_others_have_read_its_reason(watches):
    first, second = watches(0, 2), watches(1, 2)
    first.leave("a reason")
    began = time.monotonic()
    first.await_others(patience=0.5)
    assert time.monotonic() - began > 0.4
    threading.Timer(0.2, second.leave, ["a reason"]).start()
    began = time.monotonic()
    first.await_others(patience=20.0)
    assert 0.1 < time.monotonic() - began < 10


def test_a_store_that_is_gone_is_the_end_of_the_first(watches):
    class Gone:
        def check(self, *_):
            raise dist.DistNetworkError("Connection was likely closed")

        set = get = check

    second = watches(1, 2)
    second._left.set()
    second._thread.join()
    second._store = Gone()
    told = second.gone(patience=1.0)
    assert told.startswith("process 0, or the torchrun that started it, is gone: it was killed")
    assert second.lowest_here() == 1  # so it is this one that speaks
    assert not second.said_by_first("a reason", patience=0.2)
    second.leave("nobody hears it")


def test_a_thread_ends_a_process_that_waits_for_a_dead_one(watches, monkeypatch, capfd):
    """The main thread may hang in a collective; so the thread that hears nothing ends the process."""
    statuses = []

    def leave(status):
        statuses.append(status)
        watch._left.set()

    monkeypatch.setattr(processes.os, "_exit", leave)
    monkeypatch.setattr(processes, "SILENT_SECONDS", 0.5)
    watch = watches(0, 2)  # process 1 never comes
    watch._thread.join(timeout=20)
    assert statuses == [1]
    assert capfd.readouterr().err.startswith("error: process 1 has stopped answering")
