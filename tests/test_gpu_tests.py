"""What the GPU's test command writes down."""

import json

import torch

from benchmarks import gpu_tests

OUTCOMES = """
import pytest

def test_good(): pass
def test_good_too(): pass
def test_bad(): assert False

@pytest.mark.skip
def test_left_out(): pass

@pytest.fixture
def broken(): raise OSError

def test_with_a_broken_fixture(broken): pass
"""


def test_outcomes_are_counted_by_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file, result = tmp_path / "test_outcomes.py", tmp_path / "out" / "tests.json"
    file.write_text(OUTCOMES)
    words = [str(file), "--json", str(result)]
    assert gpu_tests.main(words) == 1
    found = json.loads(result.read_text())
    (row,) = found["rows"]
    assert {name: row[name] for name in ("passed", "failed", "skipped")} == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
    }
    assert [name.split("::")[1] for name in found["failures"]] == ["test_bad", "test_with_a_broken_fixture"]
    assert found["header"]["device"] == "a GPU" and found["header"]["command"].endswith(" ".join(words))
    assert found["header"]["versions"]["torch"] == torch.__version__


def test_without_a_gpu_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_tests.main(["--json", str(tmp_path / "x.json")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "x.json").exists()
