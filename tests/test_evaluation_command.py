"""``python -m whp_fast.evaluate`` on a model folder and on a run."""

import json
import sys

import pytest
import torch
from tiny_world import CONTEXT, FAMILIARITY, make_world, save_tiny_model, sentences, write_json, write_lines

from whp_fast import evaluate as evaluation
from whp_fast.evaluation import command, models
from whp_fast.evaluation.metrics import METRICS
from whp_fast.model import Llama

QUESTIONS = [
    {"prompt": "Orrin walked to", "choices": ["Glimmerhall", "the tree"], "answer": 0},
    {"prompt": "The wand of", "choices": ["a cup", "Quill"], "answer": 1},
    {"prompt": "He said the name of", "choices": ["Orrin", "Paul"], "answer": 0},
]
SMALL = ["--prefix-tokens", "6", "--continuation-tokens", "6", "--passages", "6", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A world, and a run folder as the trainer leaves it: settings and the unlearned model."""
    home = tmp_path_factory.mktemp("home")
    world = make_world(home / "world")
    save_tiny_model(world / "oracle", seed=2)
    save_tiny_model(home / "run" / "unlearn" / "model", seed=1)
    write_json(
        home / "run" / "settings.json",
        {
            "model": {"path": "world/base"},
            "data": {"corpus": ["world/corpus"], "text_field": "text", "context": CONTEXT, "tokenizer": ""},
            "anchors": {"path": "world/anchors.json"},
            "reinforce": {"lr": 0.01},
            "evaluate": {
                "familiarity": "world/familiarity.json",
                "probability": "world/probability.json",
                "choices": "world/choices.jsonl",
                "general_text": "world/general.txt",
                "oracle": "world/oracle",
                "max_new_tokens": 4,
            },
            "export": {"dtype": "bfloat16"},
        },
    )
    write_lines(home / "questions.jsonl", QUESTIONS)
    (home / "holdout.txt").write_text(sentences(20, seed=9), encoding="utf-8")
    prompts = [FAMILIARITY[0] | {"prompt": "Orrin came to", "kind": "paraphrase"}]
    write_json(home / "attack.json", prompts)
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words, status=0):
        capsys.readouterr()
        assert evaluation.main([*words, "--device", "cpu"]) == status
        printed = capsys.readouterr()
        return printed.out if status == 0 else printed.err

    return run


def test_all_figures_of_a_run(run, home, tmp_path):
    out = tmp_path / "deep" / "figures.json"
    shown = run(
        "run", *SMALL, "--questions", "questions.jsonl", "--holdout", "holdout.txt", "--json", str(out)
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["models"]) == ["before", "after", "oracle"]
    after = found["models"]["after"]["figures"]
    assert set(after) == set(METRICS)
    against_the_oracle = {"forget_quality", "priv_leak"}
    assert set(found["models"]["oracle"]["figures"]) == set(METRICS) - against_the_oracle
    for name, figure in after.items():
        assert figure["n"] >= 1 and (figure["low"] is None or figure["low"] <= figure["high"]), name
    assert found["models"]["before"]["figures"]["min_k"] != after["min_k"]
    assert found["warnings"] == []
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    for name in METRICS:
        assert name.replace("_", " ") in shown and f"| {name.replace('_', ' ')} |" in page.replace("\\", "")
    value = after["general_perplexity"]["value"]
    assert f"{value:.1f}" in shown and "| figure | before | after | oracle | better | rests on |" in page


def test_the_run_is_measured_as_its_export_is_rounded(run, home, tmp_path, monkeypatch):
    seen = {}

    def load(folder, **how):
        model = models_load(folder, **how)
        seen[str(folder)] = model
        return model

    models_load = models.load_model
    monkeypatch.setattr(models, "load_model", load)
    run("run", "--metrics", "general_perplexity")
    rounded = {
        name: all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
        for name, model in seen.items()
    }
    assert rounded == {"world/base": False, "run/unlearn/model": True, "world/oracle": False}


def test_metrics_that_are_asked_for_and_no_others(run, tmp_path):
    out = tmp_path / "f.json"
    shown = run("run", "--metrics", "general_accuracy,min_k", *SMALL, "--json", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))["models"]["after"]
    assert (
        list(found["figures"]) == ["min_k", "general_accuracy"]
        and "familiarity" not in shown.split("Eval")[1]
    )
    assert "passages" not in found and found["evaluation"]["completions"] == []


def test_attacks_on_a_run(run, tmp_path):
    out = tmp_path / "f.json"
    words = ["--attacks", "prompts,relearn,prefix,sampling", "--attack-prompts", "attack.json"]
    words += ["--relearn-steps", "2", "--relearn-every", "1", "--samples", "2", "--prefix-lengths", "2,6"]
    shown = run("run", *SMALL, "--metrics", "verbatim", *words, "--json", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))["attacks"]
    points = {(row["attack"], row["model"], row["setting"]) for row in found}
    relearnt = {
        ("relearn", model, f"{step} steps on 10 % of the target")
        for model in ("after", "oracle")
        for step in range(3)
    }
    assert relearnt <= points
    assert points - relearnt == {
        (attack, model, setting)
        for model in ("after", "oracle")
        for attack, setting in (
            ("prefix", "prefix of 2 tokens"),
            ("prefix", "prefix of 6 tokens"),
            ("sampling", "best of 2, temperature 0.8"),
            ("sampling", "mean of 2, temperature 0.8"),
            ("prompts", "paraphrase"),
        )
    }
    assert "before the attack" in shown and "paraphrase" in shown
    picture = tmp_path / "f_relearn.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.name in out.with_suffix(".md").read_text()
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert (
        "## Attacks" in page
        and "| attack | model | setting | figure | before the attack | after it |" in page
    )


def test_a_model_folder_with_an_oracle(run, tmp_path):
    out = tmp_path / "f.json"
    run("world/base", "--oracle", "world/oracle", "--questions", "questions.jsonl", "--json", str(out))
    found = json.loads(out.read_text(encoding="utf-8"))["models"]
    assert list(found) == ["model", "oracle"]
    assert list(found["model"]["figures"]) == ["knowledge_accuracy", "truth_ratio", "forget_quality"]
    assert len(found["model"]["questions"]) == 3


def test_what_was_made_up_is_told(run):
    shown = run("run", *SMALL, "--metrics", "knowledge_accuracy,min_k_auc")
    told = " ".join(shown.split())
    assert "warning: target questions: made from the probability prompts" in told
    assert "warning: hold-out: the general text" in told


def test_prompts_that_hold_the_answer_are_warned_of(run, home):
    write_lines(home / "given.jsonl", [{"prompt": "A cup is called cup. It is a", "answer": "cup"}])
    shown = run("world/base", "--questions", "given.jsonl")
    assert "target question prompts: 1 hold the right answer" in " ".join(shown.split())


def test_a_local_judge(run, monkeypatch):
    monkeypatch.setattr(command.ModelJudge, "classes", lambda self, asked: [3] * len(asked))
    shown = run("world/base", "--familiarity", "world/familiarity.json", "--judge-model", "world/oracle")
    assert "1.000 [1.000, 1.000]" in shown


def test_a_missing_harness_is_told_before_a_model_is_read(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(command, "load_model", None)
    assert "--lm-eval: lm-evaluation-harness cannot be" in run("run", "--lm-eval", "arc_easy", status=2)


def test_an_endpoint_and_its_warnings(run, monkeypatch):
    made = []

    class Judge:
        def __init__(self, url, model, timeout):
            made.append((url, model, timeout))

        def __call__(self, prompt, completion, item):
            return 2

        def warnings(self):
            return ["judge m: 1 completions were left unjudged"]

    monkeypatch.setattr(command, "EndpointJudge", Judge)
    words = ["--judge-endpoint", "http://x/v1", "--judge-model", "m", "--judge-timeout", "3"]
    shown = run("world/base", "--familiarity", "world/familiarity.json", *words)
    assert made == [("http://x/v1", "m", 3.0)] and "0.200 [0.200, 0.200]" in shown
    assert "warning: judge m: 1 completions were left unjudged" in shown


def test_lm_eval_is_run_on_each_model(run, monkeypatch, tmp_path):
    seen = []

    def figures(model, tokenizer, tasks, *, max_length, batch_size, limit):
        assert isinstance(model, Llama)
        seen.append((tasks, max_length, limit))
        return {"arc_easy acc": command.Figure(0.25, 0.1, 0.4, 10)}

    monkeypatch.setattr(command, "harness_figures", figures)
    monkeypatch.setattr(command, "require_harness", lambda: None)
    out = tmp_path / "f.json"
    words = ["--lm-eval", "arc_easy, piqa", "--lm-eval-limit", "10", "--oracle", "world/oracle"]
    shown = run("world/base", *words, "--json", str(out))
    assert seen == [(["arc_easy", "piqa"], 2 * CONTEXT, 10)] * 2 and "0.250 [0.100, 0.400]" in shown
    found = json.loads(out.read_text(encoding="utf-8"))["lm_eval"]
    assert found["oracle"] == {"arc_easy acc": {"value": 0.25, "low": 0.1, "high": 0.4, "n": 10}}


def test_the_exported_weights_are_what_is_quantised(run, monkeypatch):
    """A run that exports bfloat16: 4 bits of the rounded weights, and not of the trained ones."""
    pytest.importorskip("bitsandbytes")
    quantised = []
    real = models.quantise_
    monkeypatch.setattr(
        models,
        "quantise_",
        lambda model, kind: quantised.append((kind, dict(model.named_parameters()))) or real(model, kind),
    )
    shown = run("run", *SMALL, "--metrics", "verbatim", "--attacks", "quantise", "--max-prompts", "2")
    assert [kind for kind, _ in quantised] == ["int8", "nf4"] and "4 bits (nf4)" in shown
    assert all(torch.equal(p, p.bfloat16().float()) for _, tensors in quantised for p in tensors.values())
    assert all("model.layers.0.mlp.up_proj.weight" in tensors for _, tensors in quantised)  # not yet in bits


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["absent"], "absent: neither a model folder (config.json) nor a run folder (settings.json)"),
        (["world/base"], "No evaluation file was given"),
        (["world/base", "--metrics", "verbatim"], "No evaluation file was given"),
        (["run", "--metrics", "rouge"], "--metrics: 'rouge' is none; choose from"),
        (["run", "--attacks", "jailbreak"], "--attacks: 'jailbreak' is none; choose from"),
        (["run", "--attacks", "prompts"], "--attacks prompts: it needs --attack-prompts"),
        (["run", "--attacks", "prompts", "--attack-prompts", "empty.json"], "empty.json: the list is empty"),
        (["world/base", "--target", "blank.txt"], "blank.txt: there is no text in it"),
        (["run", "--relearn-share", "0"], "--relearn-share is 0.0; give a share above 0 and up to 1"),
        (["run", "--temperature", "0"], "--temperature is 0.0, but it must be above 0"),
        (["run", "--prefix-lengths", "4,x"], "--prefix-lengths is '4,x'; give whole numbers above 0"),
        (["run", "--samples", "0"], "--samples is 0, but it must be at least 1"),
        (["run", "--judge-endpoint", "http://x"], "--judge-endpoint: no model is named"),
        (
            ["run", "--target", "blank.txt", "holdout.txt", "--prefix-tokens", "9999"],
            "no document has the 10031",
        ),
        (["broken"], "broken/settings.json: cannot be read"),
        (["moved"], "moved/settings.json: model.path is gone/base, which is not there"),
        (["unfinished"], "unfinished: the run has no finished unlearn stage"),
        (
            ["world/base", "--oracle", "other", "--text", "holdout.txt"],
            "its embedding has 7 rows but the tokenizer",
        ),
    ],
)
def test_faults_are_told_in_one_sentence(run, home, words, told):
    if not (home / "broken").exists():
        write_json(home / "empty.json", [])
        (home / "blank.txt").write_text(" \n", encoding="utf-8")
        for name in ("broken", "moved", "unfinished"):
            (home / name).mkdir()
        (home / "broken" / "settings.json").write_text("{", encoding="utf-8")
        save_tiny_model(home / "moved" / "unlearn" / "model")
        write_json(home / "moved" / "settings.json", {"model": {"path": "gone/base"}})
        write_json(home / "unfinished" / "settings.json", {"model": {"path": "world/base"}})
        save_tiny_model(home / "other", vocab_size=7)
    printed = run(*words, status=2)
    assert printed.startswith("error: ") and told in printed and printed.count("\n") == 1


def test_an_older_run_without_the_sections_of_today(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "old").mkdir()
    save_tiny_model(home / "old" / "unlearn" / "model")
    write_json(
        home / "old" / "settings.json", {"model": {"path": "world/base"}, "data": {"corpus": "world/corpus"}}
    )
    subject = models.find_subject(home / "old")
    assert list(subject.models) == ["before", "after"] and subject.main == "after"
    assert [str(path) for path in subject.target] == ["world/corpus"]
    assert subject.files == models.EvaluationFiles() and subject.relearn_lr is None
