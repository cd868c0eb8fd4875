"""The demo at its smallest size, and the job on plain books, from nothing to a report."""

import json

import pytest

from whp_fast import demo
from whp_fast.checkpoint import load_model

STAGES = [
    "world",
    "oracle",
    "base",
    "prepare",
    "align",
    "reinforce",
    "label",
    "unlearn",
    "evaluate",
    "export",
]
FIGURES = {"familiarity_completion", "familiarity_probability", "general_accuracy", "general_perplexity"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert demo.main(["--size", "tiny", "--out", str(out)]) == 0
    return out


def test_metrics_hold_what_is_promised(run):
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    for model in ("before", "after", "oracle"):
        assert set(metrics[model]) == FIGURES
        assert all(value is not None for value in metrics[model].values())
    assert set(metrics["seconds"]) == {*STAGES, "total"}
    assert metrics["seconds"]["total"] == pytest.approx(sum(metrics["seconds"][s] for s in STAGES), abs=0.1)


def test_report_has_its_pictures(run):
    text = (run / "report" / "report.md").read_text()
    for name in ("curve.png", "next_tokens.png", "labels.png"):
        assert name in text
        assert (run / "report" / name).stat().st_size > 10_000


def test_base_and_oracle_differ_and_share_the_tokenizer(run):
    base, oracle = (load_model(run / "world" / name) for name in ("base", "oracle"))
    assert not base.lm_head_weight.equal(oracle.lm_head_weight)
    tokenizers = [(run / "world" / name / "tokenizer.model").read_bytes() for name in ("base", "oracle")]
    assert tokenizers[0] == tokenizers[1] == (run / "export" / "tokenizer.model").read_bytes()


def test_second_run_makes_nothing_again(run, capsys):
    before = (run / "world" / "base" / "model.safetensors").stat().st_mtime_ns
    assert demo.main(["--size", "tiny", "--out", str(run)]) == 0
    assert (run / "world" / "base" / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("complete") == 1 + 7 + 1  # the world, seven stages, the report


def test_another_world_is_not_written_over(run, capsys):
    assert demo.main(["--size", "tiny", "--seed", "7", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "another world" in error and "--overwrite" in error
    assert demo.main(["--size", "tiny", "--out", str(run)]) == 0  # the first is still there


def test_world_is_the_same_every_time(run, tmp_path):
    assert demo.main(["--size", "tiny", "--out", str(tmp_path), "--world-only"]) == 0
    for name in ("base/model.safetensors", "anchors.json", "general.jsonl", "tokenizer.model"):
        assert (tmp_path / "world" / name).read_bytes() == (run / "world" / name).read_bytes(), name


def test_books_prepare_a_job_that_runs(run, tmp_path, capsys, monkeypatch):
    from whp_fast import train

    books, examples = tmp_path / "books", run / "world"
    books.mkdir()
    (books / "saga.txt").write_text(
        "\n".join(f.read_text() for f in sorted((run / "world/saga").iterdir())[:4])
    )
    (books / "other.txt").write_text("\n".join(["A quiet day in the town, and rain on the roof."] * 60))
    monkeypatch.setitem(demo.RECIPES, "demo", demo.RECIPES["tiny"])
    arguments = [
        "--books",
        str(books),
        "--target",
        "saga.txt",
        "--examples",
        str(examples),
        "--epochs",
        "0.1",
    ]
    own_name = tmp_path / "other_name.model"  # the model's folder must hold it under the usual name
    own_name.write_bytes((run / "world/tokenizer.model").read_bytes())
    arguments += ["--tokenizer", str(own_name), "--out", str(tmp_path / "out")]
    assert demo.main(arguments) == 0
    assert "python -m whp_fast.train --config" in capsys.readouterr().out
    job = ["--config", str(tmp_path / "out/job.yaml"), "--unlearn.steps", "1", "--reinforce.steps", "1"]
    assert train.main([*job, "--evaluate.max_new_tokens", "2", "--unlearn.evaluate_every", "0"]) == 0
    assert (tmp_path / "out/run/export/model.safetensors").is_file()
    assert (tmp_path / "out/run/export/tokenizer.model").read_bytes() == own_name.read_bytes()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--books", "books"], "--target"),
        (["--books", "{}", "--target", "x.txt", "--tokenizer", "t", "--out", "o"], "{}"),
    ],
)
def test_books_errors_are_one_sentence(arguments, named, tmp_path, capsys):
    arguments = [a.format(tmp_path) for a in arguments]
    assert demo.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named.format(tmp_path) in error
