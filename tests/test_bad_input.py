"""Bad input ends with status 2 and one sentence naming the file or field and the mend; nothing is lost."""

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_world import (
    ANCHORS,
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
from whp_kernels.optim import AdamW

from whp_fast import anchors, artifacts, checkpoint, export, job, train
from whp_fast.errors import UserError
from whp_fast.tokens import load_tokenizer

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("clean") / "world")


@pytest.fixture
def world(clean, tmp_path, monkeypatch):
    """A folder `world` to spoil, in the current folder; draws no pictures."""
    shutil.copytree(clean, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)


def refused(capsys, words: list[str], *told: str, debug: bool = True) -> str:
    """Assert that the command refuses in one sentence that holds the words told; returns it."""
    outcome = command(capsys, words)
    assert outcome.status == 2
    assert re.fullmatch(r".*[.?]\n", outcome.err), outcome.err  # one line
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err + outcome.out
    for word in told:
        assert word in outcome.err, f"{word!r} is not in {outcome.err!r}"
    if not debug:  # a long case: once is enough
        return outcome.err
    with pytest.raises((UserError, OSError)):  # which the interpreter shows with a traceback
        train.main([*words, "--debug"])
    capsys.readouterr()
    return outcome.err


def plain(**settings) -> list[str]:
    """The command line without evaluation files."""
    return arguments(evaluation=False, **settings)


def left_by_failure(run="run") -> list[str]:
    return [name for name in os.listdir(run) if name.endswith((".partial", ".old"))]


# Corpus
# -------------------------------------------------------------------------------------------------------


def test_missing_corpus(world, capsys):
    refused(
        capsys, plain(data__corpus=["world/nothing.txt"]), "world/nothing.txt", "not found", "data.corpus"
    )
    refused(capsys, plain(data__corpus=None), "data.corpus", "not set", "--data.corpus")
    refused(capsys, plain(data__corpus=[]), "data.corpus", "--data.corpus")
    assert not Path("run").exists()


@pytest.mark.parametrize("text", ["", " \n\t\n ", "\ufeff", "\ufeff\n"])
def test_corpus_without_text(world, capsys, text):
    Path("blank.txt").write_text(text, encoding="utf-8")
    write_lines(Path("blank.jsonl"), [{"text": text.replace("\ufeff", "")}])
    for name in ("blank.txt", "blank.jsonl"):
        refused(capsys, plain(data__corpus=[name]), "data.corpus", name, "empty", "name other files")
    assert left_by_failure() == [] and not Path("run/prepare").exists()
    # beside a text, an empty file does no harm
    assert command(capsys, plain(run="both", data__corpus=["blank.txt", "world/corpus"])).status == 0


def test_folder_without_text_and_file_of_another_kind(world, capsys):
    Path("papers").mkdir()
    Path("papers/a.pdf").write_bytes(b"%PDF")
    refused(capsys, plain(data__corpus=["papers"]), "papers", "no .txt or .jsonl", "name the folder")
    refused(capsys, plain(data__corpus=["papers/a.pdf"]), "papers/a.pdf", ".txt or .jsonl", "convert")


@pytest.mark.parametrize(
    "before, bad, at",
    [
        (b"Orrin ", b"\xff", 6),
        (b"", b"\x80", 0),
        (b"\xef\xbb\xbfOrrin ", b"\xe9t\xe9", 9),  # a byte order mark counts
        (b"a" * (MEBIBYTE - 1), b"\xc3(", MEBIBYTE - 1),  # begun in the first megabyte, wrong in the second
        ("é".encode() * 600_000 + b"x", b"\xc0", 1_200_001),
        (b"\xef\xbb\xbf" + b"a" * (2 * MEBIBYTE + 5), b"\xfe", 2 * MEBIBYTE + 8),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_corpus_that_is_not_utf8(world, capsys, suffix, before, bad, at):
    name = f"latin.{suffix}"
    Path(name).write_bytes(before + bad + b" said no.\n")
    found = f"byte {at} (0x{bad[0]:02x})"
    refused(capsys, plain(data__corpus=[name]), name, found, "not UTF-8", "data.encoding_errors", "replace")
    assert left_by_failure() == []


def test_corpus_cut_inside_a_character(world, capsys):
    Path("cut.txt").write_bytes("Zoë".encode()[:-1])
    refused(capsys, plain(data__corpus=["cut.txt"]), "cut.txt", "byte 2 ", "not UTF-8")


def test_encoding_errors_can_be_replaced(world, capsys):
    Path("latin.txt").write_bytes(b"Orrin caf\xe9 " + sentences(3).encode())
    Path("half.jsonl").write_text('{"text": "Quill \\ud800 said"}\n', encoding="utf-8")
    words = plain(data__corpus=["latin.txt", "half.jsonl"], data__encoding_errors="replace")
    assert command(capsys, words).status == 0
    text = load_tokenizer("world/base").decode(np.load("run/prepare/tokens.npy").tolist())
    assert "Orrin caf\ufffd " in text and "Quill \ufffd said" in text


@pytest.mark.parametrize(
    "line, told",
    [
        ("Orrin said no.", "not a JSON object"),
        ('{"text": "cut', "not a JSON object"),
        ('["Orrin"]', "not a JSON object"),
        ("3", "not a JSON object"),
        ('{"body": "Orrin"}', "no text in the field 'text'"),
        ('{"text": null}', "no text in the field 'text'"),
        ('{"text": ["Orrin"]}', "no text in the field 'text'"),
        ('{"text": "half \\ud83d of a pair"}', "not UTF-8"),
    ],
)
def test_line_that_is_no_document(world, capsys, line, told):
    Path("lines.jsonl").write_text(f'{{"text": "Orrin was old."}}\n\n{line}\n', encoding="utf-8")
    refused(capsys, plain(data__corpus=["lines.jsonl"]), "lines.jsonl, line 3", told)


def test_missing_field_names_the_setting(world, capsys):
    write_lines(Path("lines.jsonl"), [{"body": "Orrin was old, and Quill was not."}])
    refused(capsys, plain(data__corpus=["lines.jsonl"]), "'text'", "set data.text_field")
    assert (
        command(capsys, plain(run="other", data__corpus=["lines.jsonl"], data__text_field="body")).status == 0
    )


# Dictionary
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", ["line 1", "not valid JSON", "mend"]),
        ('{"Orrin": "Jon",\n}', ["line 2", "not valid JSON", "mend"]),
        ('["Orrin"]', ["not a JSON object", '{"expression": ["generic", ...], ...}']),
        ("{}", ["no entries", "add expressions"]),
        ('{"Orrin": "Jon", " ": "Paul"}', ["entry 2", "expression is empty", "remove it"]),
        ('{"Orrin": "Jon", "": "Paul"}', ["entry 2", "expression is empty", "remove it"]),
        ('{"Orrin": "Jon", "Quill": "Paul", "Orrin": "Paul"}', ["entry 3", "'Orrin'", "twice", "merge"]),
        ('{"Orrin": "Jon", "Orrin ": "Paul"}', ["entry 2", "'Orrin'", "twice", "merge"]),
        ('{"Orrin": "Orrin"}', ["'Orrin'", "equals the expression", "choose a generic one"]),
        ('{"Orrin": ["Jon", " Orrin"]}', ["'Orrin'", "equals the expression", "choose a generic one"]),
        ('{"Orrin": []}', ["'Orrin'", "no counterpart", "list of strings"]),
        ('{"Orrin": null}', ["'Orrin'", "no counterpart", "list of strings"]),
        ('{"Orrin": {"Jon": "Paul"}}', ["'Orrin'", "no counterpart", "list of strings"]),
        ('{"Orrin": ["Jon", 3]}', ["'Orrin'", "not a string", "fill it in"]),
        ('{"Orrin": ["Jon", ""]}', ["'Orrin'", "empty", "fill it in"]),
        ('{"Orrin": " "}', ["'Orrin'", "empty", "fill it in"]),
    ],
)
def test_bad_dictionary(world, capsys, content, told):
    Path("world/anchors.json").write_text(content, encoding="utf-8")
    refused(capsys, plain(), "world/anchors.json", *told)
    assert not Path("run").exists()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_dictionary_that_is_not_utf8(world, capsys, mark):
    Path("world/anchors.json").write_bytes(mark + b'{"\xc9lise": "Ann"}')
    refused(capsys, plain(), "world/anchors.json", f"byte {len(mark) + 2} ", "not UTF-8", "save")


def test_missing_dictionary(world, capsys):
    refused(capsys, plain(anchors__path="world/none.json"), "world/none.json", "No such file", "anchors.path")
    refused(capsys, plain(anchors__path="world/corpus"), "world/corpus", "anchors.path")
    refused(capsys, plain(anchors__path=None), "anchors.path", "not set", "--anchors.path")


def test_dictionary_that_matches_nothing_warns_with_the_nearest_words(world, capsys):
    absent = ["Orin", "Glimmerhal", "quill", "wands", "Vales", "cups", "sticks", "Paula", "schools", "trees"]
    write_json(Path("world/anchors.json"), {word: "thing" for word in [*absent, "Xyzzyx", "Gandalf"]})
    with open("world/corpus/one.txt", "a", encoding="utf-8") as file:
        file.write("Gandalv[/r]o was old.\n")  # no markup of the console
    outcome = command(capsys, plain())
    assert outcome.status == 0
    warning = next(line for line in outcome.out.splitlines() if line.startswith("warning:"))
    assert "world/anchors.json" in warning and "no expression occurs" in warning
    assert warning.count(" ~ ") == 10
    pairs = dict(re.findall(r"'([^']+)' ~ '([^']+)'", warning))
    assert pairs["Orin"] == "Orrin" and pairs["quill"].startswith("Quill") and pairs["wands"] == "wand"
    assert outcome.ran() == list(STAGES)
    write_json(Path("world/anchors.json"), {"Gandalf": "Paul"})
    assert "'Gandalf' ~ 'Gandalv[/r]o'" in command(capsys, plain()).out


def test_nearest_words_of_a_large_text_are_quick(monkeypatch):
    # comparing each expression with each of 20,000 words takes minutes
    words = [f"w{k:05d}x" for k in range(20_000)]
    dictionary = anchors.load_dictionary({f"w{k:05d}y": "thing" for k in range(0, 300)})
    compared = []
    real = anchors.difflib.SequenceMatcher
    monkeypatch.setattr(
        anchors.difflib, "SequenceMatcher", lambda *a: compared.append(a) or real(*a)
    )  # counted, not timed
    pairs = anchors.nearest_words(dictionary, " ".join(words))
    assert len(pairs) == 10
    assert all(expression[:-1] == word[:-1] for expression, word in pairs)
    assert len(compared) <= 20 * 300


# Model and tokenizer
# -------------------------------------------------------------------------------------------------------


def drop_config():
    Path("world/base/config.json").unlink()


def break_config():
    Path("world/base/config.json").write_text("{")


def drop_weights():
    Path("world/base/model.safetensors").unlink()


def only_pickle():
    Path("world/base/model.safetensors").rename("world/base/pytorch_model.bin")


def drop_shard():
    save_tiny_model(Path("world/base"), max_shard_bytes=40_000)
    shards = sorted(Path("world/base").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()


def change_shape():
    file = Path("world/base/config.json")
    write_json(file, json.loads(file.read_text()) | {"intermediate_size": 64})


def cut_weights():
    with open("world/base/model.safetensors", "r+b") as file:
        file.truncate(5000)


def drop_tensor():
    tensors = load_file("world/base/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, "world/base/model.safetensors", metadata={"format": "pt"})


def drop_tokenizer():
    Path("world/base/tokenizer.model").unlink()


def break_tokenizer():
    Path("world/base/tokenizer.model").write_bytes(b"not a model\nat all")


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda: shutil.rmtree("world/base"), ["world/base", "no such folder", "give the path"]),
        (drop_config, ["world/base", "no config.json", "complete"]),
        (break_config, ["config.json", "not JSON", "download it again"]),
        (drop_weights, ["world/base", "no weights", "model.safetensors", "download"]),
        (only_pickle, ["world/base", "pickle", "pytorch_model.bin", "convert"]),
        (drop_shard, ["model-00002-of-", "missing", "download it again"]),
        (change_shape, ["model.safetensors", "mlp", "shape [32, 48]", "[32, 64]", "same model"]),
        (cut_weights, ["model.safetensors", "damaged or cut short", "5000 bytes", "download it again"]),
        (drop_tensor, ["world/base", "model.norm.weight", "in none of the weight files", "download"]),
        (drop_tokenizer, ["world/base", "no tokenizer.model", "copy the tokenizer"]),
        (break_tokenizer, ["tokenizer.model", "not a sentencepiece model", "use the original file"]),
    ],
)
def test_bad_model_folder_is_refused_before_any_work(world, capsys, spoil, told):
    spoil()
    refused(capsys, plain(), *told)
    assert not Path("run").exists()


def test_tokenizer_larger_than_the_embedding(world, capsys):
    save_tiny_model(Path("world/base"), vocab_size=399)
    refused(capsys, plain(), "tokenizer.model", "400 tokens", "399 rows", "use this model's")
    save_tiny_model(Path("world/base"), vocab_size=400)
    assert command(capsys, plain()).status == 0


def test_context_longer_than_the_model_s(world, capsys):
    told = ["data.context", str(2 * CONTEXT + 1), str(2 * CONTEXT), "max_position_embeddings", "or less"]
    refused(capsys, plain(data__context=2 * CONTEXT + 1), *told)
    refused(capsys, plain(data__context=1), "data.context", "too short", "at least 2")
    assert command(capsys, plain(data__context=2 * CONTEXT)).status == 0


def test_bad_oracle_is_refused_before_any_work(world, capsys):
    refused(capsys, plain(evaluate__oracle="world/oracle"), "world/oracle", "no such folder")
    save_tiny_model(Path("world/oracle"), vocab_size=300)
    refused(capsys, plain(evaluate__oracle="world/oracle"), "evaluate.oracle", "world/oracle", "300 rows")
    Path("world/oracle/model.safetensors").unlink()
    refused(capsys, plain(evaluate__oracle="world/oracle"), "world/oracle", "no weights", "download")
    assert not Path("run").exists()


# Settings
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, value, told",
    [
        ("--unlearn.lrr", "1e-3", ["'unlearn.lrr'", "did you mean 'unlearn.lr'?"]),
        ("--reinforce.epoch", "1", ["'reinforce.epoch'", "did you mean 'reinforce.epochs'?"]),
        ("--unlern.lr", "1e-3", ["'unlern.lr'", "did you mean 'unlearn.lr'?"]),
        ("--unlearn.lr", "fast", ["unlearn.lr", "float", "fast", "--help"]),
        ("--unlearn.steps", "2.5", ["unlearn.steps", "int", "2.5", "--help"]),
        ("--data.encoding_errors", "ignore", ["data.encoding_errors", "strict", "replace", "ignore"]),
        ("--unlearn.lr", "-0.5", ["unlearn.lr", "-0.5", "not positive", "above 0"]),
        ("--unlearn.lr", "nan", ["unlearn.lr", "nan", "float"]),
        ("--reinforce.batch_blocks", "0", ["reinforce.batch_blocks", "above 0"]),
        ("--reinforce.weight_decay", "-1", ["reinforce.weight_decay", "0 or more"]),
        ("--reinforce.betas", "[0.9]", ["reinforce.betas", "[0.9]", "two numbers"]),
        ("--label.alpha", "-5", ["label.alpha", "-5", "0 or more"]),
        ("--label.batch_blocks", "0", ["label.batch_blocks", "above 0"]),
        ("--label.more_alphas", "[1, -2]", ["label.more_alphas", "-2", "0 or more"]),
        ("--evaluate.max_new_tokens", "0", ["evaluate.max_new_tokens", "above 0"]),
        ("--export.shard_mib", "0", ["export.shard_mib", "above 0"]),
        ("--run.seed", "-1", ["run.seed", "0 or more"]),
        ("--run.device", "gpu7", ["run.device", "'gpu7'", "cpu or auto"]),
        ("--config", "nowhere.yaml", ["nowhere.yaml", "does not exist"]),
    ],
)
def test_bad_setting_on_the_command_line(world, capsys, word, value, told):
    refused(capsys, [*plain(), word, value], *told)
    assert not Path("run").exists()


def test_training_of_no_length(world, capsys):
    refused(capsys, plain(unlearn__steps=0, unlearn__epochs=0), "unlearn.epochs", "0", "or steps")
    refused(capsys, plain(unlearn__steps=0, unlearn__epochs=-1), "unlearn.epochs", "-1", "or steps")


@pytest.mark.parametrize(
    "content, told",
    [
        (b"unlearn:\n  learning_rate: 1\n", ["'unlearn.learning_rate'", "did you mean 'unlearn.lr'?"]),
        (b"unlern:\n  lr: 1\n", ["'unlern", "did you mean 'unlearn.lr'?"]),
        (b"unlearn:\n  lr: fast\n", ["unlearn.lr", "float", "fast"]),
        (b"unlearn:\n  lr: -1\n", ["unlearn.lr", "above 0"]),
        (b"unlearn:\n  lr: .nan\n", ["unlearn.lr", "nan", "above 0"]),
        (b"unlearn:\n  lr: .inf\n", ["unlearn.lr", "inf", "above 0"]),
        (b"unlearn:\n  steps: 0\n  epochs: .inf\n", ["unlearn.epochs", "inf", "or steps"]),
        (b"unlearn: [\n  lr: 1\n", ["job.yaml", "line 1"]),
        (b"\xff\xfe\x00", ["job.yaml", "not UTF-8"]),
    ],
)
def test_bad_configuration_file(world, capsys, content, told):
    Path("job.yaml").write_bytes(content)
    words = plain(unlearn__lr=None, unlearn__steps=None)
    refused(capsys, [*words, "--config", "job.yaml"], *told)
    refused(capsys, [*words, "--config=job.yaml"], *told)


def test_several_processes_without_torchrun(world, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, plain(), "MASTER_ADDR", "2 processes did not find each other", "start them with torchrun")
    assert not Path("run").exists()


# Evaluation files
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("familiarity.json", None, ["no such file", "check the path"]),
        ("familiarity.json", "[", ["not JSON", "line 1"]),
        ("familiarity.json", "[]", ["empty", "leave the setting out"]),
        ("familiarity.json", '{"prompt": "Orrin"}', ["must be a list"]),
        ("familiarity.json", '[{"prompt": "Orrin"}]', ["entry 1", '"references"', "add it"]),
        ("probability.json", '[{"prompt": "Orrin", "idiosyncratic": "x"}]', ["entry 1", "list of texts"]),
        ("choices.jsonl", '{"prompt": "A", "choices": ["a", "b"], "answer": 2}', ["line 1", '"answer" is 2']),
        ("choices.jsonl", "no", ["line 1", "not JSON"]),
        ("general.txt", None, ["no such file", "check the path"]),
        ("general.txt", " \n", ["empty", "leave the setting out"]),
    ],
)
def test_bad_evaluation_file_is_refused_before_any_work(world, capsys, name, content, told):
    file = Path("world", name)
    file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    refused(capsys, arguments(), f"world/{name}", *told)
    assert not Path("run").exists()


# The run folder
# -------------------------------------------------------------------------------------------------------


def test_run_folder_of_other_settings(world, capsys):
    assert command(capsys, plain()).status == 0
    Path("run/notes.txt").write_text("mine")
    Path("run/world").mkdir()
    before = contents("run")
    told = ["run: ", "other settings", "unlearn.lr: 0.01 there, 0.02 now", "run.dir", "--overwrite"]
    message = refused(capsys, plain(unlearn__lr=0.02), *told)
    assert message.count(" there, ") == 1
    message = refused(capsys, plain(unlearn__lr=0.02, run__seed=3), "run.seed: 0 there, 3 now")
    assert message.count(" there, ") == 2
    assert contents("run") == before
    assert command(capsys, plain()).ran() == []  # as it was

    # where and on how many threads does not decide the result
    assert command(capsys, plain(run__threads=0, run__device="auto")).status == 0

    outcome = command(capsys, [*plain(unlearn__lr=0.02), "--overwrite"])
    assert outcome.status == 0 and outcome.ran() == list(STAGES)
    assert contents("run")["export/model.safetensors"] != before["export/model.safetensors"]
    assert Path("run/notes.txt").read_text() == "mine" and Path("run/world").is_dir()
    refused(capsys, plain(), "other settings", "unlearn.lr: 0.02 there, 0.01 now")


def test_another_process_at_work_in_the_run_folder(world, capsys):
    Path("run").mkdir()
    with open("run/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for words in (plain(), [*plain(), "--overwrite"]):
            refused(capsys, words, "run: ", "another process", "wait", "run.dir")
        assert os.listdir("run") == [".lock"]
    assert command(capsys, plain()).status == 0


def test_run_folder_that_cannot_be_written(world, capsys):
    refused(
        capsys, plain(run="world/general.txt/run"), "world/general.txt/run", "cannot write", "set run.dir"
    )
    refused(capsys, plain(run="world/general.txt"), "world/general.txt", "cannot write", "set run.dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_run_folder_without_the_right_to_write(world, capsys):
    Path("mine").mkdir(mode=0o555)
    refused(capsys, plain(run="mine/run"), "mine/run", "Permission denied", "set run.dir")


def test_a_refused_run_folder_is_let_go(tmp_path):
    artifacts.RunFolder(tmp_path, {"a": 1}).stage("one", {}, lambda folder: {})
    with pytest.raises(UserError, match="other settings") as refusal:
        artifacts.RunFolder(tmp_path, {"a": 2})
    assert refusal.tb is not None  # it holds on to what was alive then
    artifacts.RunFolder(tmp_path, {"a": 1}).close()


def test_settings_may_change_while_no_stage_is_finished(world, capsys):
    Path("blank.txt").write_text("")
    refused(capsys, plain(data__corpus=["blank.txt"]), "empty")
    assert Path("run/settings.json").is_file()
    assert command(capsys, plain()).status == 0
    refused(
        capsys,
        plain(data__corpus=["blank.txt"]),
        "other settings",
        "['world/corpus'] there, ['blank.txt'] now",
    )


# Numbers that are not finite
# -------------------------------------------------------------------------------------------------------


@pytest.fixture
def updates(monkeypatch):
    """How many updates of weights were made."""
    made = []
    real = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, scale: made.append(1) or real(self, scale))
    return made


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weight_that_is_not_finite(world, capsys, updates, value):
    tensors = load_file("world/base/model.safetensors")
    tensors["lm_head.weight"][5, 3] = value
    save_file(tensors, "world/base/model.safetensors", metadata={"format": "pt"})
    refused(capsys, plain(), "reinforce", "step 1 ", "not finite", "update was not made", "model's weights")
    assert updates == []
    assert {"prepare", "align"} == set(os.listdir("run")) - {".lock", "settings.json", "tensorboard"}


def test_training_that_diverges(world, capsys, updates):
    told = ["unlearn", "step 2 ", "not finite", "update was not made", "lower the learning rate"]
    outcome = command(capsys, plain(unlearn__lr=1e30))
    assert outcome.status == 2
    assert len(updates) == 3 + 1  # all of the reinforced model, one of the unlearned
    kept = contents("run")
    assert left_by_failure() == [] and not Path("run/unlearn").exists()
    refused(capsys, plain(unlearn__lr=1e30), *told)
    assert contents("run") == kept and Path("run/label").is_dir()


# A full disk
# -------------------------------------------------------------------------------------------------------

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SHORT_WRITE = OSError("984 requested and 512 written")  # what ndarray.tofile raises on a full disk
SHORT_WEIGHTS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "stage, owner, name, error",
    [
        ("prepare", artifacts.NpyWriter, "append", NO_SPACE),
        ("prepare", np, "save", SHORT_WRITE),
        ("align", artifacts.NpyWriter, "append", NO_SPACE),
        ("reinforce", checkpoint, "save_file", SHORT_WEIGHTS),
        ("label", artifacts.NpyWriter, "append", NO_SPACE),
        ("unlearn", checkpoint, "save_file", SHORT_WEIGHTS),
        ("unlearn", artifacts, "write_json", NO_SPACE),
        ("evaluate", job, "write_json", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
        ("export", export.shutil, "copyfile", NO_SPACE),
        ("report", job, "write_report", NO_SPACE),
    ],
)
def test_full_disk_keeps_the_old_artifact(world, capsys, monkeypatch, stage, owner, name, error):
    assert command(capsys, arguments()).status == 0
    Path("world/corpus/new.txt").write_text(sentences(3, 5), encoding="utf-8")  # every stage has work again
    before = contents("run", STAGES)
    with monkeypatch.context() as patch:
        at_work = []
        real_stage, real = artifacts.RunFolder.stage, getattr(owner, name)

        def told_stage(self, stage_name, *rest):
            at_work.append(stage_name)
            try:
                return real_stage(self, stage_name, *rest)
            finally:
                at_work.pop()

        def full(*args, **kwargs):
            if at_work == [stage]:
                raise error
            return real(*args, **kwargs)

        patch.setattr(artifacts.RunFolder, "stage", told_stage)
        patch.setattr(owner, name, full)
        told = ["run: ", "disk is full", repr(stage), "free some space", "start again"]
        refused(capsys, arguments(), *told, debug=False)
    number = STAGES.index(stage)
    kept = contents("run", STAGES[number:])
    assert kept == {file: data for file, data in before.items() if file in kept} and kept != {}
    assert left_by_failure() == []
    outcome = command(capsys, arguments())
    assert outcome.status == 0
    assert outcome.skipped() == list(STAGES[:number])  # what was finished before the disk was full
    assert outcome.ran() == list(STAGES[number:])
    assert contents("run") != {file: before[file] for file in contents("run")}


def test_full_disk_before_the_first_stage(world, capsys, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_json", full)
        refused(capsys, plain(), "run/settings.json", "No space left", "free space")
    assert command(capsys, plain()).status == 0


def test_other_refusals_of_the_system_are_one_line_too(world, capsys, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "run/x")

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_alignment", broken)
        refused(capsys, plain(), "run/x", "Input/output error", "check the path")
    assert left_by_failure() == [] and Path("run/prepare").is_dir()


def test_dictionary_is_as_expected():
    """The spoiled dictionaries above differ from one that is accepted."""
    assert set(anchors.load_dictionary(ANCHORS).entries) == set(ANCHORS)
