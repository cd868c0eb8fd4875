"""The benchmark of 8-bit products compares what it says, and a share of labels that is too low is not met."""

import json

import numpy as np
import pytest
from tiny_world import make_world

from benchmarks import fp8, results_page


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    make_world(folder / "world")
    (folder / "world" / "corpus").rename(folder / "world" / "saga")
    words = f"--world {folder}/world --size tiny --blocks 4 --block small --layers fused"
    assert fp8.main([*words.split(), "--json", f"{folder}/r/fp8.json", "--picture", f"{folder}/fp8.png"]) == 0
    assert (folder / "fp8.png").stat().st_size > 10_000
    assert "| label forward | fp8 row-wise |" in results_page.page(folder / "r")
    return json.loads((folder / "r" / "fp8.json").read_text())


def rows(result, what):
    return {row["products"]: row for row in result["rows"] if row["what"] == what}


def test_differences_are_those_of_the_curves(result):
    for stage in ("reinforce", "unlearn"):
        found, curves = rows(result, stage), result["curves"][stage]
        assert set(found) == set(fp8.RUNS) == set(curves)
        assert found["bfloat16"]["largest_difference"] == 0
        for run, row in found.items():
            assert row["last_loss"] == curves[run][-1] and row["text_loss"] > 0
            apart = np.abs(np.subtract(curves[run], curves["bfloat16"]))
            assert row["mean_difference"] == pytest.approx(apart.mean())
            assert run == "bfloat16" or row["mean_difference"] > 0  # each was trained in its own way


def test_labels_are_compared_in_every_way(result):
    forward = rows(result, "label forward")
    assert set(forward) == set(fp8.PRODUCTS) and forward["bfloat16"]["same_as_bfloat16"] == 1
    eight = [row for name, row in forward.items() if name != "bfloat16"]
    assert all(0.3 < row["same_as_bfloat16"] < 1 for row in eight)
    assert len(rows(result, "float32 labels of reinforced")) == len(fp8.RUNS) - 1
    assert len([row for row in result["rows"] if row["tokens_per_s"]]) == len(fp8.PRODUCTS)


@pytest.mark.parametrize(("share", "met"), [(0.9951, True), (0.995, False), (0.9, False)])
def test_what_is_admissible(share, met):
    row = {"what": "label forward", "products": "fp8 row-wise", "same_as_bfloat16": share}
    (found,) = fp8.requirements([row, {**row, "products": "bfloat16"}, {**row, "what": "reinforce"}])
    assert found["met"] is met


def test_without_a_gpu_nothing_is_measured_on_one(capsys, monkeypatch):
    monkeypatch.setattr(fp8.torch.cuda, "is_available", lambda: False)
    assert fp8.main(["--device", "cuda"]) == 2 and "no GPU" in capsys.readouterr().err
