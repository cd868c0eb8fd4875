"""benchmarks.engine runs all it says it runs, and a wrong loss makes it fail."""

import json

import pytest
import torch

import whp_fast.model
from benchmarks import engine


def run(folder, *arguments):
    path = folder / "out" / "rows.json"
    try:
        engine.main([*"--quick --threads 1 --rounds 1 --steps 2 --json".split(), str(path), *arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(path.read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    code, found = run(folder, "--picture", str(folder / "pictures" / "engine.png"))
    return code, found, folder / "pictures" / "engine.png"


def test_every_training_is_measured_in_both_dtypes(everything):
    code, found, _ = everything
    assert (code, found["wrong"], found["requirements"]) == (0, [], [])
    assert {(row["impl"], row["dtype"]) for row in found["rows"]} == {
        (impl, dtype) for impl in ("engine", "trainer", "loop") for dtype in ("bfloat16", "float32")
    }


def test_rows_hold_what_the_table_shows(everything):
    _, found, _ = everything
    header = found["header"]
    assert header["steps"] == 3 and header["steps_not_counted"] == 1 and header["tokens_a_step"] == 128
    assert header["threads"] == 1 and "--quick" in header["command"]
    for row in found["rows"]:
        low, high = row["range_tokens_per_s"]
        assert 0 < low <= row["tokens_per_s"] <= high and row["rounds"] == 1
        work = header["matrix_gflop_a_step"] / header["tokens_a_step"]
        share = row["tokens_per_s"] * work / row["matrix_gflops"]
        assert row["share"] == pytest.approx(share, rel=0.01, abs=1e-3)
        assert row["peak_mb"] is None or row["peak_mb"] >= 0
        assert len(row["losses"]) == 3 and row["losses"][0] == pytest.approx(4.56, abs=0.15)  # log(96)


def test_all_train_the_same(everything):
    """In float32 to five digits; and the loss falls, so that an update that is missing would be seen."""
    _, found, _ = everything
    losses = {row["impl"]: row["losses"] for row in found["rows"] if row["dtype"] == "float32"}
    assert losses["engine"] == pytest.approx(losses["loop"], abs=2e-4)
    assert losses["trainer"] == pytest.approx(losses["loop"], abs=2e-4)
    assert len({round(loss, 3) for loss in losses["engine"]}) == 3


def test_a_picture(everything):
    _, _, path = everything
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_threads_are_given_back(everything, monkeypatch):
    monkeypatch.setattr(engine, "measure", lambda *_: {"rows": [], "requirements": [], "wrong": []})
    monkeypatch.setattr(engine, "table", lambda rows: "")
    engine.main(["--threads", "3"])
    assert torch.get_num_threads() == 1


def test_a_wrong_result_fails(tmp_path, monkeypatch, capsys):
    right = whp_fast.model.swiglu
    monkeypatch.setattr(whp_fast.model, "swiglu", lambda gate, up: right(gate, up) * 1.5)
    code, found = run(tmp_path, "--dtypes", "float32")
    assert code == 1 and len(found["wrong"]) == 1
    assert "float32: the loss of whp_fast.engine at step" in found["wrong"][0]
    assert "WRONG" in capsys.readouterr().out


def test_a_missing_update_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.Trainee, "update", lambda self, scale: self.drop_gradients())
    code, found = run(tmp_path, "--dtypes", "float32")
    assert code == 1 and "whp_fast.engine" in found["wrong"][0]


def rows(**speeds):
    return [
        {"dtype": dtype, "impl": impl, "tokens_per_s": speed, "share": share}
        for dtype, share in (("bfloat16", 0.6), ("float32", 0.3))
        for impl, speed in speeds.items()
    ]


@pytest.mark.parametrize(
    "speeds, met",
    [
        ({"engine": 150, "trainer": 100, "loop": 100}, [True] * 5),
        ({"engine": 149, "trainer": 100, "loop": 90}, [False, True, True, True, True]),
        ({"engine": 100, "trainer": 101, "loop": 60}, [False, True, False, True, True]),
        ({"engine": 300, "trainer": 100}, [True, False, True, False, True]),
        ({"trainer": 100, "loop": 100}, [False] * 5),
    ],
)
def test_requirements(speeds, met):
    assert [line.met for line in engine.requirements(rows(**speeds))] == met


def test_the_share_of_products_is_required():
    found = rows(engine=300, trainer=100, loop=100)
    found[0]["share"] = 0.49
    assert [line.what for line in engine.requirements(found) if not line.met] == [
        "bfloat16: at least 50% of the rate of matrix products"
    ]
    assert engine.requirements(found)[-1].found == "49%"


def test_a_requirement_that_is_not_met_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "FASTER", {"float32": 1e9})
    code, found = run(tmp_path, "--dtypes", "float32", "--check")
    assert code == 1 and found["wrong"] == [] and "FAIL" in capsys.readouterr().out


def test_work_of_a_step():
    """Each weight of a matrix is met three times by every token, a product and a sum each time."""
    sizes = engine.Sizes()
    world = engine.World(engine.QUICK, 1, 1)
    weights = sum(p.numel() for n, p in world.model.named_parameters() if p.ndim > 1 and "embed" not in n)
    assert engine.QUICK.matrix_flops() == 6 * 128 * weights
    assert sizes.tokens == 2048 and 4.5e6 < sizes.matrix_flops() / 6 / 2048 + 1536 * 256 < 5.5e6


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--steps", "0"], ["--dtypes", "float16"]])
def test_wrong_options(arguments):
    with pytest.raises(SystemExit) as stop:
        engine.read_options(arguments)
    assert stop.value.code == 2
