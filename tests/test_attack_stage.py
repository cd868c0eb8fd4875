"""The attacks as a stage of the job: what it writes, what it goes on with, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_world import FAMILIARITY, STAGES, arguments, command, make_world, save_tiny_model, write_json

from whp_fast import evaluate, job, train
from whp_fast.evaluation import attacks as attacks_module
from whp_fast.report import write_report

ATTACKS = {
    "evaluate__attacks": ["relearn", "prefix", "sampling", "prompts"],
    "evaluate__attack_prompts": "world/attack.json",
    "evaluate__attack_limit": 2,
    "evaluate__relearn_steps": 2,
    "evaluate__relearn_every": 1,
    "evaluate__prefix_lengths": [2, 6],
    "evaluate__samples": 2,
    "evaluate__oracle": "world/oracle",
    "unlearn__evaluate_every": 0,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with `world` and a finished `run` with attacks; not to be changed."""
    folder = tmp_path_factory.mktemp("attacked")
    save_tiny_model(make_world(folder / "world") / "oracle", seed=2)
    write_json(
        folder / "world" / "attack.json", [FAMILIARITY[0] | {"prompt": "Came to", "kind": "paraphrase"}]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seen = []
        patch.setattr(
            job, "write_report", lambda to, data: (seen.append(data), (to / "report.md").write_text("-"))
        )
        assert train.main(arguments(**ATTACKS)) == 0
    return folder, seen[0]


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of the finished run, as the current folder; draws no pictures."""
    shutil.copytree(finished[0], tmp_path / "job")
    monkeypatch.chdir(tmp_path / "job")
    monkeypatch.setattr(job, "write_report", lambda folder, data: (folder / "report.md").write_text("-"))


def rows_of(run="run"):
    return json.loads(Path(run, "attack", "attacks.json").read_text(encoding="utf-8"))["attacks"]


def test_rows_are_those_of_the_command(here, tmp_path):
    out = tmp_path / "f.json"
    words = ["run", "--metrics", "general_perplexity", "--json", str(out), "--device", "cpu"]
    words += ["--attacks", "relearn,prefix,sampling,prompts", "--attack-prompts", "world/attack.json"]
    words += ["--relearn-steps", "2", "--relearn-every", "1", "--prefix-lengths", "2,6", "--samples", "2"]
    assert evaluate.main([*words, "--max-prompts", "2"]) == 0
    theirs = json.loads(out.read_text(encoding="utf-8"))["attacks"]
    assert theirs == rows_of()


def test_every_figure_has_an_interval_and_the_oracle_stands_beside(finished):
    folder, data = finished
    rows = rows_of(folder / "run")
    assert {row["model"] for row in rows} == {"after", "oracle"}
    for row in rows:
        for side in ("before", "after"):
            figure = row[side]
            assert figure["n"] == 1 or figure["low"] <= figure["value"] <= figure["high"], row
    by_model = [
        [(r["attack"], r["setting"], r["metric"]) for r in rows if r["model"] == m]
        for m in ("after", "oracle")
    ]
    assert by_model[0] == by_model[1]
    assert not (folder / "run" / ".attack.snapshots").exists()
    assert data.settings["evaluate"]["relearn_steps"] == 2 and data.settings["run"]["threads"] == 1


def test_curve_and_cost_of_the_run(finished):
    folder, data = finished
    assert set(data.gpus.values()) == {0} and set(data.gpus) == {*STAGES[:-1], "attack"}
    assert list(data.seconds)[-3:] == ["evaluate", "export", "attack"]


def test_other_attacks_on_a_finished_run_make_nothing_else_again(here, capsys):
    outcome = command(
        capsys, arguments(**ATTACKS | {"evaluate__attacks": ["sampling"], "evaluate__samples": 3})
    )
    assert outcome.status == 0, outcome.err
    assert outcome.ran() == ["report"] and len(outcome.skipped()) == 7
    assert {row["setting"] for row in rows_of()} == {
        "best of 3, temperature 0.8",
        "mean of 3, temperature 0.8",
    }
    outcome = command(capsys, arguments(**ATTACKS | {"evaluate__attacks": None}))
    assert outcome.ran() == ["report"] and "attack " not in outcome.out


def test_finished_attacks_are_not_made_again_after_a_stop(here, capsys, monkeypatch):
    shutil.rmtree("run/attack")
    made, real = [], attacks_module.run_attack
    stop_at = [3]

    def attack(name, attacked):
        made.append((attacked.name, name))
        if len(made) == stop_at[0]:
            raise KeyboardInterrupt
        return real(name, attacked)

    monkeypatch.setattr("whp_fast.attack_stage.run_attack", attack)
    assert command(capsys, arguments(**ATTACKS)).status == 130
    assert not Path("run/attack").exists() and Path("run/.attack.snapshots/rows.json").is_file()
    stop_at[0] = 0
    assert command(capsys, arguments(**ATTACKS)).status == 0
    order = [(model, name) for model in ("after", "oracle") for name in ATTACKS["evaluate__attacks"]]
    assert made == order[:3] + order[2:]
    assert not Path("run/.attack.snapshots").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attacks": ["jailbreak"]}, "evaluate.attacks: 'jailbreak' is none; choose from relearn"),
        ({"attack_prompts": None}, "evaluate.attacks prompts: it needs evaluate.attack_prompts; give"),
        ({"attack_prompts": "world/empty.json"}, "world/empty.json: the list is empty"),
        ({"familiarity": None}, "evaluate.attacks sampling: it needs evaluate.familiarity; give"),
        ({"relearn_text": ["world/absent"]}, "evaluate.relearn_text"),
        ({"relearn_share": 1.5}, "evaluate.relearn_share: 1.5 is no share"),
        ({"prefix_lengths": [0]}, "evaluate.prefix_lengths: [0] are no lengths"),
        (
            {"prefix_lengths": [5000]},
            "evaluate.prefix_lengths: no document of the corpus has the 5032 tokens",
        ),
        ({"temperature": 0}, "evaluate.temperature: 0.0 is not positive"),
        ({"chat_template": "true"}, "evaluate.chat_template: world/base has none"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_any_work(here, capsys, monkeypatch, changes, told):
    write_json(Path("world/empty.json"), [])
    monkeypatch.setattr(job.Job, "prepare", None)
    words = arguments("other", **ATTACKS | {f"evaluate__{name}": value for name, value in changes.items()})
    outcome = command(capsys, words)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and told in outcome.err, outcome.err


def test_prompts_that_hold_their_answer_are_warned_of(here, capsys, monkeypatch):
    given = {"prompt": "Orrin came to Glimmerhall with", "references": ["Glimmerhall", "Quill"]}
    write_json(Path("world/familiarity.json"), [given])
    monkeypatch.setattr(job.Job, "prepare", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    outcome = command(capsys, arguments("other"))
    assert "warning: familiarity prompts: 1 hold one of their references" in outcome.out
    assert "'Orrin came to Glimmerhall with'" in outcome.out


def test_documents_too_short_for_passages_leave_that_figure_out(here, capsys, monkeypatch):
    for file in Path("world/corpus").rglob("*.*"):
        file.unlink()
    Path("world/corpus/short.txt").write_text("Orrin said that the wand was old.\n", encoding="utf-8")
    changes = {"evaluate__attacks": ["relearn"], "evaluate__relearn_every": 2}
    outcome = command(capsys, arguments("other", **ATTACKS | changes))
    assert outcome.status == 0, outcome.err
    assert "too short for whole passages" in " ".join(outcome.out.split())
    assert {row["metric"] for row in rows_of("other")} == {
        "familiarity_completion",
        "familiarity_probability",
        "knowledge_accuracy",
        "general_perplexity",
    }


def test_the_report_of_such_a_run(finished, tmp_path):
    text = write_report(tmp_path, finished[1]).read_text(encoding="utf-8")
    assert "## Attacks" in text and "Relearning, 2 steps on 10 % of the target" in text
    assert (tmp_path / "relearning.png").stat().st_size > 10_000
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    line = next(line for line in metrics["attacks"] if line["attack"] == "relearn")
    assert line["after"]["interval"] and line["oracle"]["interval"]
