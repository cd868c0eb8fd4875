"""The benchmarks run, and a wrong result makes them fail."""

import json

import numpy as np
import pytest

from benchmarks import prepare
from whp_fast.alignment import Aligner


def test_prepare_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "peak_memory", lambda copies: float(copies))
    monkeypatch.setattr(
        "sys.argv", ["prepare", "--tokens", "0.05", "--json", str(tmp_path / "out" / "row.json")]
    )
    prepare.main()
    result = json.loads((tmp_path / "out" / "row.json").read_text())
    (row,) = result["rows"]
    assert row["tokens"] >= 50_000 and row["occurrences"] > 1000
    assert row["align_mtokens_per_s"] == pytest.approx(row["tokens"] / row["align_seconds"] / 1e6, rel=0.1)
    assert set(result["peak_mib_by_copies_of_the_saga"]) == {"20", "200"}


def test_prepare_fails_on_a_wrong_alignment(monkeypatch):
    text, anchors, tokenizer = prepare.saga_case()
    align = Aligner.align

    def wrong(self, blocks, **options):
        result = align(self, blocks, **options)
        np.asarray(result.index_map)[3] += 1
        return result

    monkeypatch.setattr(Aligner, "align", wrong)
    with pytest.raises(SystemExit, match="differs"):
        prepare.measure(text[:20_000], anchors, tokenizer, 10_000, repeats=1)


def test_plans_of_the_smallest_models_are_what_is_measured(tmp_path, capsys):
    from benchmarks import plan

    assert plan.main(["--sizes", "tiny", "--check", "--json", str(tmp_path / "plan.json")]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert {row["mode"] for row in rows} == set(plan.MODES)
    measured = {row["mode"]: row["measured_mb"] for row in rows}
    assert measured["8-bit moments, bfloat16 gradients"] < 0.9 * measured["bfloat16 and remainder"]


def test_a_plan_that_is_off_fails(monkeypatch, capsys):
    from benchmarks import plan

    monkeypatch.setattr(plan, "measure", lambda *_: 1_000_000)
    monkeypatch.setattr(plan, "planned", lambda *_: 1_101_000)
    assert plan.main(["--sizes", "tiny", "--check"]) == 1 and "off by more" in capsys.readouterr().err
    monkeypatch.setattr(plan, "planned", lambda *_: 1_099_000)
    assert plan.main(["--sizes", "tiny", "--check"]) == 0


def test_stages_of_a_job_are_measured(tmp_path, capsys):
    from benchmarks import seven_b

    words = "--device cpu --preset small --step-tokens 2048 --blocks 2 --steps 2 --start-up"
    file = tmp_path / "seven_b.json"
    assert seven_b.main([*words.split(), "--json", str(file), "--profile", str(tmp_path / "profile")]) == 0
    result = json.loads(file.read_text())
    found = {(row["stage"], row["impl"]) for row in result["rows"]}
    assert found >= {("reinforce", "whp_fast"), ("unlearn", "whp_fast"), ("label", "whp_fast")}
    assert ("reinforce", "transformers") in found
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(1024 * row["blocks"] / row["seconds"][-1], rel=0.02) or (
            row["stage"] == "label"
        )
    minutes = result["job_minutes"]
    best = max(
        r["tokens_per_s"]
        for r in result["rows"]
        if r["stage"] == "reinforce" and r["impl"] == "whp_fast" and "fp8" not in r["mode"]
    )
    modes = {(r["stage"], r["mode"]) for r in result["rows"]}
    assert {("reinforce", "8-bit moments, fp8"), ("label", "two models in bfloat16, fp8 tensorwise")} <= modes
    assert minutes["reinforce"] == pytest.approx(9_300_000 / best / 60)
    assert minutes["in all"] == pytest.approx(sum(v for k, v in minutes.items() if k != "in all"))
    assert (tmp_path / "profile" / "trace.json").stat().st_size > 1000


def test_losses_that_cannot_be_make_it_fail(monkeypatch):
    from benchmarks import seven_b

    options = seven_b._options(
        ["--device", "cpu", "--preset", "small", "--step-tokens", "2048", "--blocks", "2"]
    )
    run = seven_b.Run(options)
    with pytest.raises(SystemExit, match="wrong"):
        seven_b._check_losses(run, [6.9, float("nan")])
    with pytest.raises(SystemExit, match="wrong"):
        seven_b._check_losses(run, [0.1])
    seven_b._check_losses(run, [6.9])


def test_results_page_shows_every_file_and_requirement(tmp_path):
    from benchmarks import results_page

    row = {"op": "a|b", "total_ms": 1.23456, "seconds": [1, 2], "hidden": None}
    content = {
        "header": {"command": "python -m x", "device": "D", "versions": {"torch": "2.13"}},
        "rows": [row],
        "requirements": [{"what": "fast", "found": "2x", "met": False}],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    assert results_page.main(["--folder", str(tmp_path), "--out", str(tmp_path / "R.md")]) == 0
    text = (tmp_path / "R.md").read_text()
    assert "| a\\|b | 1.235 | – |" in text and "torch 2.13" in text and "**not met**: fast: 2x" in text


def test_results_page_in_the_repository_is_that_of_the_files():
    from benchmarks import results_page

    assert (results_page.HERE / "RESULTS.md").read_text() == results_page.page(results_page.HERE / "results")
