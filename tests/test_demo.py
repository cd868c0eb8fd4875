"""The demo at its smallest size, and the job on plain books, from nothing to a report."""

import json
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest

from whp_fast import books, demo, train
from whp_fast.checkpoint import load_model
from whp_fast.config import parse_config

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
    "attack",
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
    assert capsys.readouterr().out.count("complete") == 1 + 8 + 1  # the world, eight stages, the report


def test_another_world_is_not_written_over(run, capsys):
    assert demo.main(["--size", "tiny", "--seed", "7", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "another world" in error and "--overwrite" in error
    assert demo.main(["--size", "tiny", "--out", str(run)]) == 0  # the first is still there


def test_world_is_the_same_every_time(run, tmp_path):
    assert demo.main(["--size", "tiny", "--out", str(tmp_path), "--world-only"]) == 0
    for name in ("base/model.safetensors", "anchors.json", "general.jsonl", "tokenizer.model"):
        assert (tmp_path / "world" / name).read_bytes() == (run / "world" / name).read_bytes(), name


@pytest.fixture
def shelf(run, tmp_path, monkeypatch):
    """Two small books, of which saga.txt can be forgotten, and a base that is trained in a second."""
    monkeypatch.setattr(books, "BOOKS", replace(demo.RECIPES["tiny"], repeat_target=2))
    folder = tmp_path / "books"
    folder.mkdir()
    chapters = [f.read_text() for f in sorted((run / "world/saga").iterdir())[:8]]
    (folder / "saga.txt").write_text("\n".join(chapters))
    stories = [json.loads(line)["text"] for line in (run / "world/general.jsonl").open()]
    (folder / "other.txt").write_text("\n".join(stories)[:20_000])
    return [
        *("--books", str(folder), "--target", "saga.txt", "--examples", str(run / "world")),
        *("--epochs", "0.1", "--out", str(tmp_path / "out")),
    ]


def test_books_prepare_a_job_that_runs(run, shelf, tmp_path, capsys):
    own_name = tmp_path / "other_name.model"  # the model's folder must hold it under the usual name
    own_name.write_bytes((run / "world/tokenizer.model").read_bytes())
    anchors = run / "world/anchors.json"
    assert demo.main([*shelf, "--tokenizer", str(own_name), "--anchors", str(anchors)]) == 0
    assert "python -m whp_fast.train --config" in capsys.readouterr().out
    job = ["--config", str(tmp_path / "out/job.yaml"), "--unlearn.steps", "1", "--reinforce.steps", "1"]
    assert train.main([*job, "--evaluate.max_new_tokens", "2", "--unlearn.evaluate_every", "0"]) == 0
    assert (tmp_path / "out/run/export/model.safetensors").is_file()
    assert (tmp_path / "out/run/export/tokenizer.model").read_bytes() == own_name.read_bytes()


def test_books_bring_their_own_tokenizer_and_dictionary(shelf, tmp_path):
    assert demo.main(shelf) == 0
    job = parse_config(["--config", str(tmp_path / "out/job.yaml")])
    assert load_model(Path(job.model.path)).config.vocab_size == demo.RECIPES["tiny"].vocab_size
    anchors = json.loads(Path(job.anchors.path).read_text())
    saga = (tmp_path / "books/saga.txt").read_text()
    assert len(anchors) >= 5 and all(expression in saga for expression in anchors)
    passages = [
        [json.loads(line)["text"] for line in Path(path).open()]
        for path in (*job.unlearn.retain, job.evaluate.general_text)
    ]
    other = (tmp_path / "books/other.txt").read_text()
    pairs = zip_longest(*passages, fillvalue="")
    assert len(passages[1]) >= 2 and "".join(one + two for one, two in pairs) == other


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--books", "books"], "--target"),
        (["--books", "{}", "--target", "x.txt", "--out", "o"], "{}"),
    ],
)
def test_books_errors_are_one_sentence(arguments, named, tmp_path, capsys):
    arguments = [a.format(tmp_path) for a in arguments]
    assert demo.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named.format(tmp_path) in error
