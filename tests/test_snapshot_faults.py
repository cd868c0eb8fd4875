"""Faults while a snapshot is written, at every call that changes the disk in turn.

The calls of one snapshot thread go through a Disk, which lets the k-th of them fail: with an error of the
system, as a killed process (no later call of the thread does anything), or with a power cut on top, after
which only what was flushed is there. Whatever happens, the snapshot before or the new one must be read back,
and the next save must succeed. ``keep=1`` leaves no third snapshot to fall back on.
"""

import errno
import os
import shutil
import stat
import threading

import pytest
import torch

from whp_fast.errors import UserError
from whp_fast.snapshots import Rows, Snapshots

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
_CHANGING = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """The process is gone."""


class Disk:
    """Stands between the snapshot thread of a rank and the disk.

    Args:
        root: everything below it is looked after.
        rank: whose thread is to fail; those of others are only watched.
        fail_at: the call that fails, counted from 1; None: only counts.
        fault: "killed", "power cut", or the errno of an error.
    """

    def __init__(self, monkeypatch, root, rank=0, fail_at=None, fault="killed"):
        self.root, self.fail_at, self.fault = root, fail_at, fault
        self.thread = f"snapshot-rank-{rank}"
        self.calls = 0
        self.dead = False
        self.named: list[str] = []
        self._lock = threading.RLock()  # a call and the note of it are one
        self._unflushed_files: set[int] = set()  # inodes
        self._unflushed_entries: list[tuple] = []  # (inode of the folder, name before or None, name after)
        for name in _CHANGING:
            monkeypatch.setattr(os, name, self._guarded(name, getattr(os, name)))

    def _guarded(self, name, real):
        def call(*args, **kwargs):
            thread = threading.current_thread().name
            if not thread.startswith("snapshot-rank-"):
                return None if name == "fsync" else real(*args, **kwargs)
            with self._lock:
                if thread == self.thread:
                    self._count(name, real, args)
                result = None if name == "fsync" else real(*args, **kwargs)
                self._note(name, args)
                return result

        return call

    def _count(self, name, real, args):
        if self.dead:
            raise Killed
        self.calls += 1
        self.named.append(name)
        if self.calls != self.fail_at:
            return
        if name == "write":  # torn: half of it arrives
            self._note(name, args)
            real(args[0], args[1][: len(args[1]) // 2])
        if isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))
        self.dead = True
        raise Killed

    def _note(self, name, args):
        if name == "write":
            self._unflushed_files.add(os.fstat(args[0]).st_ino)
        elif name == "fsync":
            found = os.fstat(args[0])
            if stat.S_ISDIR(found.st_mode):
                self._unflushed_entries = [e for e in self._unflushed_entries if e[0] != found.st_ino]
            self._unflushed_files.discard(found.st_ino)
        elif name == "mkdir" or (name == "open" and args[1] & os.O_CREAT):
            folder, entry = os.path.split(args[0])
            self._unflushed_entries.append((os.stat(folder).st_ino, None, entry))
        elif name == "replace":
            folder, before = os.path.split(args[0])
            assert os.path.dirname(args[1]) == folder
            self._unflushed_entries.append((os.stat(folder).st_ino, before, os.path.basename(args[1])))

    def cut_power(self):
        """Lose what was not flushed: contents to half, new names undone. Removals are taken as durable, which
        is the worse case."""
        where = {self.root.stat().st_ino: str(self.root)}
        for _ in range(2):  # undoing a rename moves what is below
            for folder, folders, files in os.walk(self.root):
                for name in folders + files:
                    where[os.stat(os.path.join(folder, name)).st_ino] = os.path.join(folder, name)
        for inode in self._unflushed_files:
            if inode in where:
                os.truncate(where[inode], os.path.getsize(where[inode]) // 2)
        for inode, before, after in reversed(self._unflushed_entries):
            folder = next((f for f, _, _ in os.walk(self.root) if os.stat(f).st_ino == inode), None)
            path = os.path.join(folder or "", after)
            if folder is None or not os.path.lexists(path):
                continue
            if before is not None:
                if not os.path.lexists(os.path.join(folder, before)):
                    os.rename(path, os.path.join(folder, before))
            elif os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def _tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-128, 128, (6, 40), generator=generator, dtype=torch.int8)
    return {
        "weight": raw.view(torch.bfloat16),
        "moment": raw,
        "bias": torch.randn(6, generator=generator),
    }


def _cut(tensors, rank, world_size):
    cut = {}
    for name, whole in tensors.items():
        size = -(-len(whole) // world_size)
        values = whole[rank * size : (rank + 1) * size]
        cut[name] = Rows(values, rank * size, tuple(whole.shape))
    return cut


def _start(folder, world_size=1, attempt="first", told=None, **settings):
    return [
        Snapshots(
            folder,
            identity="id",
            rank=rank,
            world_size=world_size,
            attempt=attempt,
            keep=1,
            warn=(lambda text: None) if told is None else told.append,
            **settings,
        )
        for rank in range(world_size)
    ]


def _save(ranks, step, seed):
    """Save and wait; the errors of the ranks."""
    for rank, snapshots in enumerate(ranks):
        snapshots.save(step, _cut(_tensors(seed), rank, len(ranks)), {"seed": seed})
    errors = []
    for snapshots in ranks:
        try:
            snapshots.wait()
            errors.append(None)
        except (UserError, Killed) as error:
            errors.append(error)
    return errors


def _seed_of_latest(folder):
    """Which save is read back; it must be whole and of one piece."""
    (reader,) = _start(folder, attempt="reader")
    snapshot = reader.latest()
    if snapshot is None:
        return None
    tensors = _tensors(snapshot.state["seed"])
    assert snapshot.names() == sorted(tensors)
    for name, whole in tensors.items():
        found = snapshot.rows(name, 0, 6)
        assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8)), name
    assert reader.open(snapshot.step).state == snapshot.state
    return snapshot.state["seed"]


def _prepared(tmp_path, world_size, before):
    folder = tmp_path / "run" / "snapshots"
    ranks = _start(folder, world_size)
    if before is not None:
        assert _save(ranks, before, 1) == [None] * world_size
    return folder, ranks


def _calls(monkeypatch, tmp_path, world_size, before, rank=0):
    with monkeypatch.context() as patch:
        root = tmp_path / "count"
        root.mkdir()
        folder, ranks = _prepared(root, world_size, before)
        disk = Disk(patch, root, rank)
        assert _save(ranks, 40, 2) == [None] * world_size
    assert _seed_of_latest(folder) == 2
    return disk


@pytest.mark.parametrize("fault", ["killed", "power cut", errno.EIO, errno.ENOSPC], ids=str)
@pytest.mark.parametrize("before", [None, 20, 40], ids=["first", "next", "again"])
def test_a_fault_at_any_call_leaves_one_whole_snapshot(tmp_path, monkeypatch, before, fault):
    counted = _calls(monkeypatch, tmp_path, 1, before)
    assert set(counted.named) >= set(_CHANGING[:5]) | (set(_CHANGING) if before else set())
    seen = set()
    for k in range(1, counted.calls + 2):
        root = tmp_path / str(k)
        root.mkdir()
        folder, (snapshots,) = _prepared(root, 1, before)
        with monkeypatch.context() as patch:
            disk = Disk(patch, root, 0, k, fault)  # the last k is one call beyond the end: no fault
            (error,) = _save([snapshots], 40, 2)
        if fault == "power cut":
            disk.cut_power()
        found = _seed_of_latest(folder)
        seen.add(found)
        assert found in ((1, 2) if before else (None, 2)), (k, disk.named)
        if isinstance(fault, int):
            if error is None:  # only what is removed may fail without an error, and is named then
                assert found == 2 and ([*disk.named, "none"])[k - 1] in ("replace", "unlink", "rmdir", "none")
            else:
                what = "the disk is full" if fault == errno.ENOSPC else os.strerror(fault)
                assert what in str(error) and "snapshot of step 40" in str(error)
                partial = (
                    [name for name in os.listdir(folder) if "partial" in name] if folder.exists() else []
                )
                assert partial == []  # the space is free again
        later = [snapshots] if isinstance(fault, int) else _start(folder, attempt="second")
        assert _save(later, 60, 3) == [None]
        assert _seed_of_latest(folder) == 3
        assert os.listdir(folder) == ["step-00000060"]
    assert len(seen) == 2  # both outcomes occurred


@pytest.mark.parametrize(
    "victim, fault", [(0, "power cut"), (1, "killed"), (0, errno.ENOSPC), (1, errno.ENOSPC)]
)
def test_a_fault_in_one_of_two_processes(tmp_path, monkeypatch, victim, fault):
    counted = _calls(monkeypatch, tmp_path, 2, 20, victim)
    for k in range(1, counted.calls + 2):
        root = tmp_path / str(k)
        root.mkdir()
        folder, ranks = _prepared(root, 2, 20)
        # a process that tells its error is not waited for; one that is gone is, and here not long
        for snapshots in ranks:
            snapshots._timeout = 30.0 if isinstance(fault, int) else 0.05
        with monkeypatch.context() as patch:
            disk = Disk(patch, root, victim, k, fault)
            errors = _save(ranks, 40, 2)
        if fault == "power cut":
            disk.cut_power()
        found = _seed_of_latest(folder)
        assert found in (1, 2), (k, disk.named)
        if found == 1:
            # no process goes on as if it were whole, unless the power goes with all of them
            assert all(errors) or (fault == "power cut" and errors[victim]), (k, errors)
        if isinstance(fault, int) and errors[victim] and errors[1 - victim]:
            assert str(errors[1 - victim]) == f"process {victim}: {errors[victim]}"
            assert not list(folder.glob(".step-*.partial/rank-*.safetensors"))  # the space is free again
        later = ranks if isinstance(fault, int) else _start(folder, 2, attempt="second")
        assert _save(later, 60, 3) == [None, None]
        assert _seed_of_latest(folder) == 3
        assert os.listdir(folder) == ["step-00000060"]


def test_a_system_that_takes_less_than_it_is_given(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    assert _save(_start(tmp_path), 20, 1) == [None]
    assert _seed_of_latest(tmp_path) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("k", [3, 8, 12, 20, 28])
def test_a_process_that_really_ends(tmp_path, monkeypatch, k):
    folder, (snapshots,) = _prepared(tmp_path, 1, 20)
    child = os.fork()
    if child == 0:
        try:
            disk = Disk(monkeypatch, tmp_path)
            for name in _CHANGING:
                guarded = getattr(os, name)

                def ending(*args, guarded=guarded, **kwargs):
                    if disk.calls == k:
                        os._exit(7)
                    return guarded(*args, **kwargs)

                setattr(os, name, ending)
            snapshots.save(40, _cut(_tensors(2), 0, 1), {"seed": 2}, wait=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert _seed_of_latest(folder) in (1, 2)
    assert _save(_start(folder, attempt="second"), 60, 3) == [None]
    assert os.listdir(folder) == ["step-00000060"]


def test_a_full_disk_is_told_once_at_the_next_call_and_earlier_snapshots_stay(tmp_path, monkeypatch):
    (snapshots,) = _start(tmp_path)
    snapshots.save(20, _cut(_tensors(1), 0, 1), {"seed": 1}, wait=True)
    with monkeypatch.context() as patch:
        Disk(patch, tmp_path, 0, 4, errno.ENOSPC)
        snapshots.save(40, _cut(_tensors(2), 0, 1), {"seed": 2})  # the thread fails, this call does not
        with pytest.raises(UserError) as told:
            snapshots.save(60, _cut(_tensors(3), 0, 1), {"seed": 3})
    assert str(told.value) == (
        f"{tmp_path}: the disk is full while the snapshot of step 40 was written; free some space and start "
        "again (earlier snapshots are kept)."
    )
    snapshots.wait()
    assert os.listdir(tmp_path) == ["step-00000020"] and _seed_of_latest(tmp_path) == 1


def test_a_failed_save_does_not_keep_a_complete_stage_from_removing(tmp_path, monkeypatch):
    told, met = [], []
    (snapshots,) = _start(tmp_path / "s", told=told, barrier=lambda: met.append(1))
    with monkeypatch.context() as patch:
        Disk(patch, tmp_path, 0, 6, errno.ENOSPC)
        snapshots.save(40, _cut(_tensors(2), 0, 1), {"seed": 2})
        snapshots.remove()
    assert len(told) == 1 and "the disk is full" in told[0] and met == [1]
    assert os.listdir(tmp_path) == []


def test_a_process_that_does_not_come_is_named(tmp_path):
    ranks = _start(tmp_path, 3, timeout=30.0)
    ranks[0]._timeout = 0.2
    ranks[1].save(5, {}, {})
    ranks[0].save(5, _cut(_tensors(1), 0, 1), {"seed": 1})
    with pytest.raises(UserError, match=r"nothing came from process 2 of 3 within 0.2 s; look at"):
        ranks[0].wait()
    with pytest.raises(UserError, match="process 0: .* nothing came from process 2 of 3"):
        ranks[1].wait()
    assert ranks[0].latest() is None


def test_files_of_a_killed_start_are_not_taken_for_those_of_this_one(tmp_path):
    old = _start(tmp_path, 2, attempt="old", timeout=0.1)
    old[1].save(40, _cut(_tensors(1), 1, 2), {})  # process 0 of that start is gone
    with pytest.raises(UserError, match="process 0 did not complete it within 0.1 s"):
        old[1].wait()
    new = _start(tmp_path, 2, attempt="new", timeout=0.2)
    new[0].save(40, _cut(_tensors(2), 0, 2), {"seed": 2})
    with pytest.raises(UserError, match="nothing came from process 1 of 2"):
        new[0].wait()
    again = _start(tmp_path, 2, attempt="again")
    assert _save(again, 40, 2) == [None, None]
    assert _seed_of_latest(tmp_path) == 2 and os.listdir(tmp_path) == ["step-00000040"]


def test_what_cannot_be_removed_is_named_and_the_save_stands(tmp_path, monkeypatch):
    told = []
    (snapshots,) = _start(tmp_path, told=told)
    snapshots.save(20, _cut(_tensors(1), 0, 1), {"seed": 1}, wait=True)

    def refuse(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        snapshots.save(40, _cut(_tensors(2), 0, 1), {"seed": 2}, wait=True)
    assert len(told) == 1 and "cannot be removed (Directory not empty)" in told[0]
    assert _seed_of_latest(tmp_path) == 2
    snapshots.save(60, _cut(_tensors(3), 0, 1), {"seed": 3}, wait=True)
    assert os.listdir(tmp_path) == ["step-00000060"] and len(told) == 1
