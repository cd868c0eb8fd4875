"""Snapshots within a stage: what is read back is what was saved, and a fault leaves the one before whole.

The tests of damage are here; those of faults while a snapshot is written are in test_snapshot_faults.py.
"""

import json
import os
import re
import shutil
import threading

import pytest
import torch

from whp_fast.errors import UserError
from whp_fast.snapshots import Rows, Snapshots

_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _tensors(seed=0, rows=7):
    """One tensor of every dtype with every bit pattern possible, and one-dimensional and empty ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for dtype in _DTYPES:
        size = (rows, 3 * dtype.itemsize)
        high = 2 if dtype == torch.bool else 256
        raw = torch.randint(0, high, size, generator=generator, dtype=torch.uint8)
        tensors[f"matrix.{dtype}"] = raw.view(dtype)
    tensors["vector"] = torch.randn(rows, generator=generator)
    tensors["cube"] = torch.randn(rows, 2, 3, generator=generator)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["narrow"] = torch.zeros(rows, 0)
    return tensors


def _cut(tensors, rank, world_size):
    """The rows of a process as torch.chunk cuts them: the last ones may have none."""
    cut = {}
    for name, whole in tensors.items():
        size = -(-len(whole) // world_size)
        first = min(rank * size, len(whole))
        cut[name] = Rows(whole[first : first + size], first, tuple(whole.shape))
    return cut


def _whole(tensors):
    return _cut(tensors, 0, 1)


def _save(folder, world_size, step, tensors, state=None, keep=2, attempt="a"):
    ranks = [
        Snapshots(folder, identity="id", rank=rank, world_size=world_size, attempt=attempt, keep=keep)
        for rank in range(world_size)
    ]
    for rank, snapshots in enumerate(ranks):
        snapshots.save(step, _cut(tensors, rank, world_size), {**(state or {}), "rank": rank})
    for snapshots in ranks:
        snapshots.wait()
    return ranks


def _reader(folder, told=None, identity="id"):
    """Reads as a new process would; warnings fail the test unless a list takes them."""
    return Snapshots(folder, identity=identity, warn=pytest.fail if told is None else told.append)


def _assert_same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def _assert_holds(snapshot, tensors):
    assert snapshot.names() == sorted(tensors)
    for name, expected in tensors.items():
        assert snapshot.dtype(name) == expected.dtype and snapshot.shape(name) == tuple(expected.shape)
        _assert_same(snapshot.rows(name, 0, len(expected)), expected)


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """The disk of the tests is not worth waiting for; what flushing is good for, the Disk below plays."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_every_row_range_is_read_back_whatever_wrote_it(tmp_path, world_size):
    tensors = _tensors()
    _save(tmp_path / "s", world_size, 40, tensors, {"loss": 0.1, "names": ["ä"]})
    snapshot = _reader(tmp_path / "s").latest()
    assert snapshot.step == 40
    assert snapshot.state == {"loss": 0.1, "names": ["ä"], "rank": 0}
    _assert_holds(snapshot, tensors)
    for first in range(8):
        for last in range(first, 8):
            for name in ("vector", "cube", "matrix.torch.bfloat16", "matrix.torch.float8_e4m3fn"):
                _assert_same(snapshot.rows(name, first, last), tensors[name][first:last])
    files = {path.name.partition(".")[2] for path in (tmp_path / "s" / "step-00000040").iterdir()}
    assert files == {"safetensors", "json"}


def test_shards_of_two_processes_are_recut_for_one_and_for_three(tmp_path):
    tensors = _tensors(1)
    _save(tmp_path, 2, 10, tensors)
    for step, world_size in ((20, 1), (30, 3), (40, 2)):
        ranks = [
            Snapshots(tmp_path, identity="id", rank=rank, world_size=world_size, attempt=str(step))
            for rank in range(world_size)
        ]
        for rank, snapshots in enumerate(ranks):
            before = snapshots.open(step - 10)
            rows = {}
            for name, cut in _cut(tensors, rank, world_size).items():
                last = cut.first + len(cut.values)
                rows[name] = Rows(before.rows(name, cut.first, last), cut.first, before.shape(name))
            snapshots.save(step, rows, {})
        for snapshots in ranks:
            snapshots.wait()
        _assert_holds(_reader(tmp_path).latest(), tensors)


def test_replicas_without_tensors_and_with_the_same_rows(tmp_path):
    tensors = _tensors(2)
    ranks = [Snapshots(tmp_path, identity="id", rank=rank, world_size=3, attempt="a") for rank in range(3)]
    same = _cut(tensors, 0, 2)
    for snapshots, rows in zip(
        ranks, (same, {}, {**_cut(tensors, 1, 2), "vector": _whole(tensors)["vector"]})
    ):
        snapshots.save(5, rows, {})
    for snapshots in ranks:
        snapshots.wait()
    assert not (tmp_path / "step-00000005" / "rank-00001-of-00003.safetensors").exists()
    _assert_holds(_reader(tmp_path).latest(), tensors)


def test_what_is_changed_right_after_save_does_not_show(tmp_path, monkeypatch):
    go_on = threading.Event()
    mkdir = os.mkdir

    def waiting(path, *args):
        assert go_on.wait(20)
        mkdir(path, *args)

    tensors = _tensors(3)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    state = {"step": 1, "list": [1]}
    snapshots = Snapshots(tmp_path / "s", identity="id")
    monkeypatch.setattr(os, "mkdir", waiting)
    snapshots.save(1, _whole(tensors), state)  # returns although nothing can be written yet
    for tensor in tensors.values():
        tensor.view(torch.uint8).fill_(1)
    state["list"].append(2)
    assert snapshots.latest() is None
    go_on.set()
    snapshots.wait()
    found = _reader(tmp_path / "s").latest()
    _assert_holds(found, expected)
    assert found.state == {"step": 1, "list": [1]}


def test_rows_read_back_are_memory_of_their_own(tmp_path):
    tensors = _tensors()
    _save(tmp_path, 1, 1, tensors)
    snapshot = _reader(tmp_path).latest()
    snapshot.rows("cube", 0, 7).fill_(5.0)
    snapshot.close()
    _assert_holds(snapshot, tensors)


def test_a_save_in_flight_is_waited_for_and_the_last_two_are_kept(tmp_path):
    snapshots = Snapshots(tmp_path, identity="id")
    for step in (10, 20, 30, 40):
        snapshots.save(step, _whole(_tensors(step)), {"at": step})
    snapshots.wait()
    assert sorted(os.listdir(tmp_path)) == ["step-00000030", "step-00000040"]
    assert _reader(tmp_path).latest().state == {"at": 40}
    _assert_holds(_reader(tmp_path).open(30), _tensors(30))


def test_steps_passed_over_and_other_identities_go_when_a_new_one_is_whole(tmp_path):
    _save(tmp_path, 1, 60, _tensors())
    Snapshots(tmp_path, identity="other").save(40, {}, {}, wait=True)
    assert os.listdir(tmp_path) == ["step-00000040"]  # 60 is of another, and later
    _save(tmp_path, 1, 50, _tensors())
    assert os.listdir(tmp_path) == ["step-00000050"]
    _save(tmp_path, 1, 50, _tensors(1))  # the same step again
    assert os.listdir(tmp_path) == ["step-00000050"]
    _assert_holds(_reader(tmp_path).latest(), _tensors(1))


def test_nothing_there(tmp_path):
    assert _reader(tmp_path / "none").latest() is None
    (tmp_path / "step-00000001.partial").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert _reader(tmp_path).latest() is None
    with pytest.raises(UserError, match="step-00000007: there is no snapshot of this step; all processes"):
        _reader(tmp_path).open(7)


def test_remove_takes_all_snapshots_and_nothing_else(tmp_path):
    folder = tmp_path / "s"
    _save(folder, 1, 1, _tensors())
    (folder / ".step-00000009.dead-3.partial").mkdir()
    (folder / "notes.txt").write_text("mine")
    met = []
    snapshots = Snapshots(folder, identity="id", barrier=lambda: met.append(1))
    snapshots.save(2, _whole(_tensors()), {})
    snapshots.remove()
    assert met == [1] and os.listdir(folder) == ["notes.txt"]
    (folder / "notes.txt").unlink()
    snapshots.remove()
    assert not folder.exists()
    snapshots.remove()


def _truncate(folder):
    path = folder / "rank-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def _flip(name, at):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 4
        (folder / name).write_bytes(content)

    return damage


def _lose(name):
    return lambda folder: (folder / name).unlink()


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


def _rename(folder):
    os.rename(folder, folder.with_name("step-00000041"))


def _turn_into_folder(folder):
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()


@pytest.mark.parametrize(
    "damage, what",
    [
        (_truncate, r"step-00000040: rank-00001-of-00002.safetensors has \d+ bytes, and \d+ were written"),
        (_flip("rank-00000-of-00002.safetensors", 9), "rank-00000-of-00002.safetensors has another checksum"),
        (
            _flip("rank-00001-of-00002.safetensors", -1),
            "rank-00001-of-00002.safetensors has another checksum",
        ),
        (_flip("rank-00000-of-00002.json", 40), "rank-00000-of-00002.json has another checksum"),
        (_flip("state.json", 3), "state.json has another checksum"),
        (_flip("complete.json", 1), "complete.json is damaged"),
        (_flip("complete.json", 30), "complete.json is damaged"),
        (_lose("rank-00000-of-00002.safetensors"), "rank-00000-of-00002.safetensors is missing"),
        (_lose("rank-00001-of-00002.json"), "rank-00001-of-00002.json is missing"),
        (_lose("state.json"), "state.json is missing"),
        (_lose("complete.json"), "there is no complete.json in it"),
        (_empty, "there is no complete.json in it"),
        (_rename, "step-00000041: it is of step 40, and its name says 41"),
        (_turn_into_folder, "state.json"),
    ],
)
def test_a_damaged_snapshot_is_named_and_the_one_before_used(tmp_path, damage, what):
    before = _tensors(20)
    _save(tmp_path, 2, 20, before)
    _save(tmp_path, 2, 40, _tensors(40))
    damage(tmp_path / "step-00000040")
    told = []
    snapshot = _reader(tmp_path, told).latest()
    assert snapshot.step == 20
    _assert_holds(snapshot, before)
    assert len(told) == 1 and told[0].startswith(str(tmp_path / "step-0000004"))
    assert told[0].endswith("; step 20 is used instead.") and "\n" not in told[0]
    assert re.search(what, told[0]), told[0]

    _save(tmp_path, 1, 30, _tensors(30))  # the training goes on from 20
    _assert_holds(_reader(tmp_path).latest(), _tensors(30))
    left = sorted(name for name in os.listdir(tmp_path) if not name.endswith(".removed"))
    assert left == ["step-00000020", "step-00000030"]


def test_every_flipped_byte_of_the_marker_is_noticed(tmp_path):
    _save(tmp_path, 1, 40, {"vector": torch.zeros(2)})
    path = tmp_path / "step-00000040" / "complete.json"
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 7)
        path.write_bytes(flipped)
        told = []
        if _reader(tmp_path, told).latest() is not None:
            assert json.loads(flipped) == json.loads(content)  # one kind of white space for another
        else:
            assert len(told) == 1 and told[0].endswith("; the training starts anew.")


def test_another_identity_is_named_and_not_used(tmp_path):
    _save(tmp_path, 1, 20, _tensors())
    told = []
    assert _reader(tmp_path, told, identity="other").latest() is None
    assert told == [
        f"{tmp_path}/step-00000020: it was made with other settings, inputs or weights; "
        "the training starts anew."
    ]
    with pytest.raises(UserError, match="made with other settings"):
        _reader(tmp_path, identity="other").open(20)


def test_rows_that_no_process_has_are_refused_when_saving(tmp_path):
    tensors = {"vector": torch.arange(6.0)}
    _save(tmp_path, 2, 1, tensors)
    ranks = [Snapshots(tmp_path, identity="id", rank=rank, world_size=2, attempt="b") for rank in range(2)]
    ranks[0].save(2, {"vector": Rows(torch.arange(2.0), 0, (6,))}, {})
    ranks[1].save(2, {"vector": Rows(torch.arange(3.0), 3, (6,))}, {})
    with pytest.raises(ValueError, match="row 2 of vector is in none of the files"):
        ranks[0].wait()
    with pytest.raises(UserError, match="process 0: row 2 of vector"):
        ranks[1].wait()
    ranks[0].save(3, {"vector": Rows(torch.arange(3.0), 0, (6,))}, {})
    ranks[1].save(3, {"vector": Rows(torch.arange(3.0).int(), 3, (6,))}, {})
    with pytest.raises(ValueError, match=r"process 1 has vector as int32 \[6\], another as float32 \[6\]"):
        ranks[0].wait()
    _assert_holds(_reader(tmp_path).latest(), tensors)


@pytest.mark.parametrize(
    "name, rows, what",
    [
        ("x", Rows(torch.tensor(1.0), 0, ()), r"values of shape \[\] are no rows of \[\]"),
        ("x", Rows(torch.zeros(2, 3), 0, (2, 4)), "are no rows of"),
        ("x", Rows(torch.zeros(2), 3, (4,)), "rows 3 to 5 are not within its 4"),
        ("x", Rows(torch.zeros(2), -1, (4,)), "rows -1 to 1"),
        ("x", Rows(torch.zeros(2, dtype=torch.complex64), 0, (2,)), "cannot hold torch.complex64"),
        ("__metadata__", Rows(torch.zeros(2), 0, (2,)), "cannot be the name"),
    ],
)
def test_what_could_not_be_read_back_is_refused(tmp_path, name, rows, what):
    snapshots = Snapshots(tmp_path, identity="id")
    with pytest.raises(ValueError, match=what):
        snapshots.save(1, {name: rows}, {})
    with pytest.raises(TypeError, match="JSON"):
        snapshots.save(1, {}, {"tensor": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def test_wrong_questions_are_refused(tmp_path):
    _save(tmp_path, 1, 1, _tensors())
    snapshot = _reader(tmp_path).latest()
    with pytest.raises(KeyError, match="no tensor other"):
        snapshot.rows("other", 0, 1)
    for first, last in ((0, 8), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="not within its 7"):
            snapshot.rows("vector", first, last)
    with pytest.raises(ValueError, match="attempt"):
        Snapshots(tmp_path, identity="id", rank=1, world_size=2)
    with pytest.raises(ValueError, match="attempt"):
        Snapshots(tmp_path, identity="id", attempt="a/b")
    with pytest.raises(ValueError, match="out of range"):
        Snapshots(tmp_path, identity="id", rank=2, world_size=2, attempt="a")
    shutil.rmtree(snapshot.folder)
    with pytest.raises(UserError, match="cannot be read"):
        _ = [snapshot.close(), snapshot.rows("vector", 0, 1)]


def test_there_is_no_pickle_and_other_libraries_read_the_tensors(tmp_path):
    from safetensors.torch import load_file

    tensors = _tensors(4)
    _save(tmp_path, 1, 1, tensors)
    folder = tmp_path / "step-00000001"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    loaded = load_file(folder / "rank-00000-of-00001.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, expected in tensors.items():
        _assert_same(loaded[name], expected)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
