"""What a training writes while it runs: JSON lines, event files for TensorBoard, and the live line."""

import dataclasses
import json

import pytest

from whp_fast import training_log
from whp_fast.engine import StepRecord
from whp_fast.training_log import TrainingLog


def record(step, **changes):
    values = dict(loss=2.5 / step, grad_norm=1.25, lr=1e-6, trained=70, tokens=80, seconds=0.5)
    return StepRecord(step, **{**values, "data_seconds": 0.001, "memory_bytes": 3_000_000_000, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_step(tmp_path):
    file = tmp_path / "log.jsonl"
    with TrainingLog(file, "unlearn", 2) as log:
        log.on_step(record(1))
        log.on_step(record(2))
    assert lines(file) == log.records == [dataclasses.asdict(record(step)) for step in (1, 2)]
    assert lines(file)[0]["loss"] == 2.5 and lines(file)[1]["step"] == 2


def test_a_training_that_goes_on_keeps_its_earlier_lines(tmp_path):
    """The file of the killed start may be gone, or have more lines than the snapshot has steps."""
    file = tmp_path / "log.jsonl"
    with TrainingLog(file, "unlearn", 3) as log:
        for step in (1, 2):
            log.on_step(record(step))
    earlier = log.records[:1]
    with TrainingLog(file, "unlearn", 3, earlier=earlier) as log:
        assert log.records == earlier and log.records is not earlier
        log.on_step(record(2, loss=7.0))
    assert [(row["step"], row["loss"]) for row in lines(file)] == [(1, 2.5), (2, 7.0)]
    assert len(earlier) == 1


def test_lines_stay_when_a_step_fails(tmp_path):
    file = tmp_path / "log.jsonl"
    with pytest.raises(ValueError), TrainingLog(file, "unlearn", 3) as log:
        log.on_step(record(1))
        raise ValueError
    assert len(lines(file)) == 1


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with TrainingLog(None, "unlearn", 1) as log:
        log.on_step(record(1))
    assert log.records == [dataclasses.asdict(record(1))]
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_the_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TrainingLog(None, "unlearn", 2, tensorboard=tmp_path / "events") as log:
        log.on_step(record(1))
        log.on_step(record(2))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    names = "loss grad_norm lr trained memory_bytes data_seconds tokens_per_second".split()
    assert sorted(events.Tags()["scalars"]) == sorted(f"unlearn/{name}" for name in names)
    assert [(e.step, e.value) for e in events.Scalars("unlearn/loss")] == [(1, 2.5), (2, 1.25)]
    assert [e.value for e in events.Scalars("unlearn/tokens_per_second")] == [160, 160]


def shown(monkeypatch, *records, **options):
    """Notes of the live line."""
    import contextlib

    notes = []

    @contextlib.contextmanager
    def follow(title, total):
        assert title == "unlearn" and total == 4
        yield lambda amount, note="": notes.append((amount, note))

    monkeypatch.setattr(training_log, "track", follow)
    with TrainingLog(None, "unlearn", 4, **options) as log:
        for one in records:
            log.on_step(one)
    return notes


def test_the_live_line(monkeypatch):
    notes = shown(monkeypatch, record(1), record(2, data_seconds=0.1), earlier=[{}])
    assert notes == [
        (1, ""),  # the step before this start
        (1, "step 1/4  loss 2.500  norm 1.25  160 tokens/s  3.0 GB"),
        (1, "step 2/4  loss 1.250  norm 1.25  160 tokens/s  3.0 GB  data 20 %"),
    ]


def test_the_share_of_the_peak(monkeypatch):
    """160 tokens a second of 2 GFLOP each are a third of 960 GFLOP/s."""
    (_, (_, note)) = shown(monkeypatch, record(1), flops_per_token=2e9, peak_flops=960e9)
    assert "  33 % of peak  " in note
