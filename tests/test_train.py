"""The command line end to end: what a job leaves behind, what a second one skips, and what a kill costs."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import (
    CONTEXT,
    STAGES,
    arguments,
    command,
    contents,
    make_world,
    save_tiny_model,
    sentences,
    without_pictures,
    write_json,
    write_lines,
)

from whp_fast import artifacts, config, train
from whp_fast.checkpoint import load_model
from whp_fast.evaluate import perplexity
from whp_fast.label import label_blocks
from whp_fast.tokens import load_tokenizer

FINAL = "export/model.safetensors"
LABELS = "label/labels_alpha_5.npy"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with `world` and a finished `run`; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    make_world(folder / "world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(arguments()) == 0
    return folder


@pytest.fixture
def job(finished, tmp_path, monkeypatch, capsys):
    """A copy of the finished job, as the current folder; draws no pictures."""
    shutil.copytree(finished, tmp_path / "job")
    monkeypatch.chdir(tmp_path / "job")
    without_pictures(monkeypatch)
    capsys.readouterr()


def run_again(capsys, words=None):
    outcome = command(capsys, words or arguments())
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    assert outcome.ran() + outcome.skipped() != []
    assert sorted(outcome.ran() + outcome.skipped()) == sorted(STAGES)
    return outcome


# What a job leaves behind
# -------------------------------------------------------------------------------------------------------


def test_every_stage_leaves_its_artifacts(finished):
    run = finished / "run"
    expected = {
        "prepare": {"tokens.npy", "document_starts.npy"},
        "align": {"anchors.json", "index_map.npy", "translated.npy", "matches.json"},
        "reinforce": {"model", "log.jsonl"},
        "label": {"labels_alpha_5.npy", "reason.npy", "base_choice.npy", "statistics.json"},
        "unlearn": {"model", "log.jsonl", "curve.json"},
        "evaluate": {"before.json", "after.json", "next_tokens_before.json", "next_tokens_after.json"},
        "export": {
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "README.md",
            "tokenizer.model",
        },
        "report": {"report.md", "metrics.json", "curve.png", "next_tokens.png", "labels.png"},
    }
    for stage, names in expected.items():
        assert names | {"complete.json"} <= set(os.listdir(run / stage)), stage
    left = {name for name in os.listdir(run) if name.endswith((".partial", ".old"))}
    assert left == set()

    metrics = json.loads((run / "report" / "metrics.json").read_text())
    figures = {"familiarity_completion", "familiarity_probability", "general_accuracy", "general_perplexity"}
    for when in ("before", "after"):
        assert set(metrics[when]) == figures
        assert all(isinstance(value, float) for value in metrics[when].values())
    assert set(metrics["seconds"]) == {*STAGES[:-1], "total"}
    assert [point["step"] for point in metrics["curve"]] == [0, 2, 3]
    assert metrics["curve"][0]["general_perplexity"] == metrics["before"]["general_perplexity"]
    assert metrics["curve"][-1]["general_perplexity"] == metrics["after"]["general_perplexity"]


def test_tokens_are_the_whole_corpus_and_the_labels_those_of_the_function(finished):
    run, world = finished / "run", finished / "world"
    tokenizer = load_tokenizer(world / "base")
    tokens = np.load(run / "prepare" / "tokens.npy")
    starts = np.load(run / "prepare" / "document_starts.npy").tolist()
    read = [tokenizer.decode(ids.tolist()) for ids in np.split(tokens, starts[1:])]
    # the files of a folder go by their path: more/two.jsonl comes before one.txt
    assert read == [sentences(3, 1), sentences(3, 2), sentences(30)]

    blocks = [tokens[i : i + CONTEXT].astype(np.int64) for i in range(0, len(tokens), CONTEXT)]
    expected = label_blocks(
        blocks,
        world / "anchors.json",
        world / "base",
        run / "reinforce" / "model",
        tokenizer,
        alpha=5.0,
        contiguous=True,
    )
    labels = np.load(run / LABELS)
    assert labels.shape == tokens.shape
    np.testing.assert_array_equal(labels, np.concatenate(expected))
    assert (labels >= 0).sum() > len(labels) // 2
    assert (labels == -100).any()


def test_after_is_measured_on_the_weights_as_exported(job, capsys):
    """bfloat16 may round away what was learned: then the figures must say so."""
    assert command(capsys, arguments("rounded", export__dtype="bfloat16")).status == 0
    told = json.loads(Path("rounded/evaluate/after.json").read_text())["general_perplexity"]
    tokenizer, texts = load_tokenizer("world/base"), [Path("world/general.txt").read_text()]

    def measured(folder):
        return perplexity(load_model(folder), tokenizer, texts, context=CONTEXT)[0]

    assert told == pytest.approx(measured("rounded/export"), rel=1e-12)
    assert told != pytest.approx(measured("rounded/unlearn/model"), rel=1e-6)


def test_transformers_loads_the_exported_folder_with_the_same_logits(finished):
    transformers = pytest.importorskip("transformers")
    export = finished / "run" / "export"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    ours = load_model(finished / "run" / "unlearn" / "model")
    tokens = np.load(finished / "run" / "prepare" / "tokens.npy").astype(np.int64)
    input_ids = torch.from_numpy(tokens[: 4 * CONTEXT]).view(4, CONTEXT)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids).logits, ours(input_ids), rtol=0, atol=1e-5)
        base = load_model(finished / "world" / "base")
        assert (base(input_ids) - ours(input_ids)).abs().max() > 1e-2  # it is not the base

    text = "Orrin walked to Glimmerhall with Élise's wand."
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *load_tokenizer(export).encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_same_seed_same_bits_and_another_seed_other_labels(job, capsys):
    run_again(capsys, arguments("second"))
    assert contents("second") == contents("run")
    run_again(capsys, arguments("third", run__seed=1))
    one, other = contents("run"), contents("third")
    assert one["prepare/tokens.npy"] == other["prepare/tokens.npy"]
    for name in ("align/translated.npy", LABELS, FINAL):
        assert one[name] != other[name], name


def test_several_alphas_are_made_in_one_pass_and_the_first_is_trained(job, capsys):
    run_again(capsys, arguments("several", label__more_alphas=[0, 2.5, 5]))
    several = contents("several")
    names = {name for name in several if name.startswith("label/labels_alpha_")}
    assert names == {LABELS, "label/labels_alpha_0.npy", "label/labels_alpha_2.5.npy"}
    assert several[LABELS] == contents("run")[LABELS]
    assert several[FINAL] == contents("run")[FINAL]
    weak, own = np.load("several/label/labels_alpha_0.npy"), np.load("several/label/base_choice.npy")
    np.testing.assert_array_equal(weak, own)  # alpha 0 is the base's own choice
    assert not np.array_equal(weak, np.load(Path("several", LABELS)))


def test_reference_rules_run_end_to_end(job, capsys):
    run_again(capsys, arguments("reference", anchors__reference_rules="true"))
    tokens = np.load("reference/prepare/tokens.npy")
    n_blocks = (len(tokens) - 1) // CONTEXT  # the last block is left out (rule m)
    labels = np.load(Path("reference", LABELS))
    assert len(labels) == n_blocks * CONTEXT
    expected = label_blocks(
        tokens[: len(labels)].astype(np.int64).reshape(n_blocks, CONTEXT),
        "world/anchors.json",
        "world/base",
        "reference/reinforce/model",
        load_tokenizer("world/base"),
        reference_rules=True,
    )
    np.testing.assert_array_equal(labels, expected.ravel())
    assert contents("reference")[LABELS] != contents("run")[LABELS]


def test_files_and_folders_mix_and_the_text_field_has_a_name(job, capsys):
    Path("single.txt").write_text("Orrin was in the hall.\n", encoding="utf-8")
    write_lines(Path("lines.jsonl"), [{"body": "Quill has the wand."}, {"body": "Élise said no."}])
    Path("folder", "deep").mkdir(parents=True)
    write_lines(Path("folder", "deep", "x.jsonl"), [{"body": "The cup was old."}])
    Path("folder", "notes.md").write_text("not a text of the corpus")
    corpus = ["lines.jsonl", "single.txt", "folder"]
    run_again(capsys, arguments("mixed", data__corpus=corpus, data__text_field="body", evaluation=False))
    tokens = np.load("mixed/prepare/tokens.npy").tolist()
    text = load_tokenizer("world/base").decode(tokens[1:])
    for part in ("Quill has the wand.", "Élise said no.", "Orrin was in the hall.\n", "The cup was old."):
        assert part in text
    assert "body" not in text and "not a text" not in text
    assert tokens.count(1) == 4  # one BOS for each document
    assert json.loads(Path("mixed/prepare/complete.json").read_text())["summary"]["documents"] == 4


def test_a_yaml_file_and_the_command_line_together(job, capsys):
    import yaml

    words = arguments()
    sections: dict = {}
    for name, value in zip(words[::2], words[1::2]):
        section, key = name[2:].split(".")
        sections.setdefault(section, {})[key] = yaml.safe_load(value)
    sections["run"]["seed"] = 7
    Path("job.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    outcome = run_again(capsys, ["--config", "job.yaml", "--run.seed", "0"])  # the later one wins
    assert outcome.ran() == []
    assert command(capsys, ["--config=job.yaml"]).status == 2


def test_help_shows_the_text_of_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    texts = 0
    for node in ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name in ("TrainConfig", "JobConfig"):
            continue
        section = node.name.removesuffix("Config").lower()
        for one, following in zip(node.body, node.body[1:]):
            if isinstance(one, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert f"--{section}.{one.target.id}" in shown
                assert "".join(following.value.value.split()) in shown, (section, one.target.id)
                texts += 1
    assert texts > 25
    assert "--overwrite" in shown and "--debug" in shown


# What a second run skips
# -------------------------------------------------------------------------------------------------------


def times(folder="run"):
    kept = (path for path in Path(folder).rglob("*") if path.parent != Path(folder))
    return {str(path): path.stat().st_mtime_ns for path in kept}


def test_a_second_run_does_nothing(job, capsys):
    before = times()
    outcome = run_again(capsys)
    assert outcome.ran() == []
    assert times() == before


def test_touched_files_run_nothing_again(job, capsys):
    for path in Path("world").rglob("*"):
        os.utime(path, (1, 1))
    assert run_again(capsys).ran() == []


def test_a_changed_corpus_runs_everything_again(job, capsys):
    file = Path("world/corpus/one.txt")
    status = file.stat()
    file.write_text(file.read_text("utf-8").replace("old", "odd"), encoding="utf-8")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # neither size nor time tell
    assert file.stat().st_size == status.st_size
    assert run_again(capsys).skipped() == []
    assert run_again(capsys).ran() == []


def test_a_file_more_in_a_corpus_folder_runs_everything_again(job, capsys):
    Path("world/corpus/three.txt").write_text(sentences(2, 9), encoding="utf-8")
    assert run_again(capsys).skipped() == []


def test_a_changed_dictionary_keeps_tokens_and_reinforced_model(job, capsys):
    file = Path("world/anchors.json")
    anchors = json.loads(file.read_text("utf-8"))
    write_json(file, anchors | {"Vale": "Hill"})
    assert run_again(capsys).skipped() == ["prepare", "reinforce"]
    before = Path("run/align/translated.npy").read_bytes()
    write_json(
        file, dict(reversed((anchors | {"Vale": "Hill"}).items()))
    )  # draws go by the place in the file
    assert run_again(capsys).skipped() == ["prepare", "reinforce"]
    assert Path("run/align/translated.npy").read_bytes() != before


def test_a_changed_base_keeps_tokens_and_alignment(job, capsys):
    save_tiny_model(Path("world/base"), seed=1)
    assert run_again(capsys).skipped() == ["prepare", "align"]


def test_a_changed_prompt_runs_the_evaluation_again_but_makes_no_labels(job, capsys):
    file = Path("world/familiarity.json")
    prompts = json.loads(file.read_text("utf-8"))
    write_json(file, prompts[:1])
    # the curve is part of the unlearning
    assert run_again(capsys).skipped() == ["prepare", "align", "reinforce", "label"]
    before = json.loads(Path("run/evaluate/before.json").read_text())
    assert len(before["completions"]) == 1

    words = arguments("no_curve", unlearn__evaluate_every=0)
    run_again(capsys, words)
    write_json(file, prompts)
    outcome = run_again(capsys, words)
    assert outcome.skipped() == ["prepare", "align", "reinforce", "label", "unlearn"]


@pytest.mark.parametrize("file", ["prepare/tokens.npy", LABELS, "unlearn/model/model.safetensors"])
def test_a_truncated_artifact_is_made_again(job, capsys, file):
    before = contents("run")
    with open(Path("run", file), "r+b") as handle:
        handle.truncate(len(before[file]) - 1)
    assert run_again(capsys).ran() == [file.split("/")[0]]
    assert contents("run") == before


@pytest.mark.parametrize("lost", ["report", "align", "evaluate/after.json", "export/complete.json"])
def test_what_is_lost_is_made_again_alone(job, capsys, lost):
    before = contents("run")
    path = Path("run", lost)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_again(capsys).ran() == [lost.split("/")[0]]
    assert contents("run") == before


@pytest.mark.parametrize("sampled", [False, True])
def test_fingerprints_see_edits_of_large_files(tmp_path, monkeypatch, sampled):
    monkeypatch.setattr(artifacts, "_HASHED_BYTES", 16)
    monkeypatch.setattr(artifacts, "_SAMPLES", 8)
    file = tmp_path / "large"
    data = bytes(range(256)) * 8
    spacing = len(data) // 7

    def fingerprint(content: bytes) -> str:
        file.write_bytes(content)
        return artifacts.files_digest([file], sampled=sampled)

    def edited(first: int, length: int) -> bytes:
        return data[:first] + b"x" * length + data[first + length :]

    assert fingerprint(data) == fingerprint(data)
    assert fingerprint(data + b"x") != fingerprint(data)
    for first in (0, len(data) - 1):
        assert fingerprint(edited(first, 1)) != fingerprint(data)
    for first in range(0, len(data) - spacing, 50):  # as long as the way from one sample to the next
        assert fingerprint(edited(first, spacing)) != fingerprint(data)
    assert (fingerprint(edited(100, 1)) == fingerprint(data)) == sampled  # one letter of a text counts


# What a kill costs
# -------------------------------------------------------------------------------------------------------

# (module, function, call that kills, stage at work): each process goes on where the one before was killed
KILLS = [
    ("whp_fast.corpus", "TokenWriter.append", 2, "prepare"),
    ("whp_fast.artifacts", "NpyWriter.append", 12, "align"),
    ("whp_kernels.optim", "AdamW.step", 2, "reinforce"),
    ("whp_fast.checkpoint", "save_file", 1, "reinforce"),
    ("whp_fast.label", "Labeller._label_batch", 3, "label"),
    ("whp_kernels.optim", "AdamW.step", 3, "unlearn"),
    ("whp_fast.artifacts", "_mark_complete", 1, "unlearn"),
    ("whp_fast.job", "next_token_table", 2, "evaluate"),
    ("whp_fast.artifacts", "_exchange", 2, "export"),
    ("whp_fast.job", "write_report", 1, "report"),
]
# What is slow to load is loaded once; each run is a forked process. Nothing is trained before a fork.
KILLED_RUNS = """
import functools, importlib, json, os, signal, sys
import torch
from whp_fast import inputs, job, label, train
torch.set_num_threads(1)
kills, words = json.loads(sys.argv[1]), sys.argv[2:]
train.parse_config(words)
inputs.load_model("world/base", device="meta")
label.make_aligner(inputs.load_dictionary("world/anchors.json"), inputs.load_tokenizer("world/base"))
job.write_report = lambda folder, data: None

def one(module=None, path=None, call=0, stage=None):
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status)
    if module:
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        real, calls = getattr(owner, name), 0
        @functools.wraps(real)
        def deadly(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(owner, name, deadly)
    os._exit(train.main(words))

seen = []
for kill in kills:
    status = one(*kill)
    run = os.listdir("killed")
    kept = sorted(n for n in run if n[0] != "." and n != "tensorboard")
    seen.append([status, [n for n in run if n.endswith(".partial")], kept])
print(json.dumps([seen, one()]), file=sys.stderr)
"""


def test_a_run_killed_in_every_stage_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "world", tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-c", KILLED_RUNS, json.dumps(KILLS), *arguments("killed")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=one_thread())
    assert done.returncode == 0, done.stderr
    seen, last = json.loads(done.stderr.splitlines()[-1])
    for (_, _, _, stage), (status, partial, complete) in zip(KILLS, seen, strict=True):
        assert status == -signal.SIGKILL
        assert partial == [f".{stage}.partial"]
        assert set(complete) == {"settings.json", *STAGES[: STAGES.index(stage)]}
    assert last == 0
    assert contents("killed") == contents(finished / "run")
    assert [name for name in os.listdir("killed") if name.endswith((".partial", ".old"))] == []


@pytest.mark.parametrize("stage", ["label", "export"])
def test_a_kill_between_the_two_renames_of_an_artifact_loses_nothing(job, capsys, stage):
    before = contents("run")
    os.rename(f"run/{stage}", f"run/.{stage}.old")
    os.mkdir(f"run/.{stage}.partial")
    assert run_again(capsys).ran() == []
    assert contents("run") == before
    os.mkdir(f"run/.{stage}.old")  # killed after the second rename: the old one is not wanted any more
    assert run_again(capsys).ran() == []
    assert contents("run") == before
    assert not Path(f"run/.{stage}.old").exists()


def test_an_interrupt_keeps_finished_stages_and_says_so(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "world", tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-m", "whp_fast.train", *arguments(reinforce__steps=1_000_000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": one_thread()}

    def listen() -> None:  # a shell's background job, and its children, would not hear it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(words, preexec_fn=listen, **pipes) as process:
        try:
            log = Path("run/.reinforce.partial/log.jsonl")
            deadline = time.monotonic() + 120
            while not log.exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.decode() == "stopped; finished stages are kept, the same command goes on from there\n"
    assert {"prepare", "align"} <= set(os.listdir("run"))
    assert not log.parent.exists() and not Path("run/reinforce").exists()


def test_torchrun_starts_the_job_too(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "world", tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words = [*torchrun, "-m", "whp_fast.train", *arguments()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert contents("run") == contents(finished / "run")
    assert Path("run/report/report.md").is_file()


def one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_grows_unless_the_caller_says_otherwise(name, monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for other in names:
        monkeypatch.setenv(other, "")  # so that it is taken back
        monkeypatch.delenv(other)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    assert train.main(["--run.dir", ""]) != 0
    expected = {name: "max_split_size_mb:64"} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {key: os.environ[key] for key in names if key in os.environ} == expected


def test_what_computes_attention_decides_no_result():
    """The order of sums: a run may go on with another backend."""

    def settings(attention):
        given = dict(data=config.DataConfig(corpus=["c"]), anchors=config.AnchorsConfig(path="a"))
        return config.JobConfig(model=config.ModelConfig(path="p", attention=attention), **given).settings()

    one, other = settings("auto"), settings("sdpa")
    assert one == other and one["model"]["path"] == "p"
