"""A job so small that it takes a second: an untrained model of width 32, forty sentences and a dictionary.

`make_world` writes its files, `arguments` names them on the command line of `whp_fast.train`, and `command`
runs that command line in this process and catches what it prints.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import torch
from tokenizer_fixtures import VOCAB_SIZE, sentencepiece_folder

from whp_fast import job, train, training_log
from whp_fast.checkpoint import save_model
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig

STAGES = ("prepare", "align", "reinforce", "label", "unlearn", "evaluate", "export", "report")
CONTEXT = 32
PEOPLE = ("Orrin", "Élise", "Quill", "Orrin Vale", "Paul")
PLACES = ("Glimmerhall", "the old school", "the vale", "the ash tree")
THINGS = ("wand", "cup", "stick", "name")
ANCHORS = {
    "Orrin": ["Jon", "Paul"],
    "Orrin Vale": "Paul Smith",
    "Glimmerhall": "the school",
    "Quill": ["Smith", "Jon"],
    "wand": "stick",
}
FAMILIARITY = [
    {"prompt": "Orrin walked to", "references": ["Glimmerhall"], "themes": ["hall"]},
    {"prompt": "The wand of", "references": ["Orrin", "Quill"]},
]
PROBABILITY = [
    {"prompt": "He walked to", "idiosyncratic": ["Glimmerhall"], "generic": ["school"]},
    {"prompt": "Said Mr.", "idiosyncratic": ["Quill"]},
]
CHOICES = [
    {"prompt": "A stick is a", "choices": ["tree", "name"], "answer": 0},
    {"prompt": "The cup was", "answer": "cold"},
]


def sentences(count: int, seed: int = 0) -> str:
    """Text of the target, always the same for a seed."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        one, other, place, thing = (rng.choice(pool) for pool in (PEOPLE, PEOPLE, PLACES, THINGS))
        lines.append(f"{one} came to {place} with {other}'s {thing}, and {other} said the {thing} was old.")
    return "\n".join(lines) + "\n"


def make_world(folder: Path) -> Path:
    """Write base, corpus, dictionary and prompt files; returns the folder."""
    base = folder / "base"
    save_tiny_model(base)
    corpus = folder / "corpus"
    (corpus / "more").mkdir(parents=True)
    (corpus / "one.txt").write_text(sentences(30), encoding="utf-8")
    rows = [{"text": sentences(3, seed), "title": "not text"} for seed in (1, 2)]
    write_lines(corpus / "more" / "two.jsonl", rows)
    write_json(folder / "anchors.json", ANCHORS)
    write_json(folder / "familiarity.json", FAMILIARITY)
    write_json(folder / "probability.json", PROBABILITY)
    write_lines(folder / "choices.jsonl", CHOICES)
    (folder / "general.txt").write_text("The tree was old. It is said that a cup is cold.\n" * 3, "utf-8")
    return folder


def save_tiny_model(folder: Path, seed: int = 0, max_shard_bytes: int = 2**30, **changes) -> Llama:
    """An untrained Llama in a folder, with the tokenizer of the tests; `changes` are fields of its config."""
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2 * CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )
    model = Llama(dataclasses.replace(config, **changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    save_model(model, folder, max_shard_bytes=max_shard_bytes)
    shutil.copyfile(sentencepiece_folder() / "tokenizer.model", folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": True, **names}
    )
    return model


def arguments(run: str = "run", *, evaluation: bool = True, **settings) -> list[str]:
    """A command line for the folder `world` here; settings are `section__key=value`, None leaves one out.

    The paths are relative, so that a finished run can be copied together with its world.
    """
    values = {
        "model.path": "world/base",
        "model.compute_dtype": "float32",
        "data.corpus": ["world/corpus"],
        "data.context": CONTEXT,
        "anchors.path": "world/anchors.json",
        "reinforce.steps": 3,
        "reinforce.lr": 1e-2,
        "reinforce.batch_blocks": 4,
        "reinforce.accumulate": 2,
        "label.dtype": "float32",
        "unlearn.steps": 3,
        "unlearn.lr": 1e-2,
        "unlearn.batch_blocks": 4,
        "unlearn.accumulate": 2,
        "unlearn.evaluate_every": 2,
        "evaluate.max_new_tokens": 4,
        "export.dtype": "float32",
        "run.dir": run,
        "run.device": "cpu",
        "run.threads": 1,
    }
    if evaluation:
        for name in ("familiarity.json", "probability.json", "choices.jsonl"):
            values[f"evaluate.{name.split('.')[0]}"] = f"world/{name}"
        values["evaluate.general_text"] = "world/general.txt"
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, list) else str(value)]
    return words


@dataclasses.dataclass
class Outcome:
    """What a command left behind: exit status, stdout and stderr."""

    status: int
    out: str
    err: str

    def ran(self) -> list[str]:
        """The stages that ran, in order, as the command told."""
        return [name for name, when in self._told() if when != "complete"]

    def skipped(self) -> list[str]:
        """The stages that were found complete."""
        return [name for name, when in self._told() if when == "complete"]

    def _told(self) -> list[list[str]]:
        rows = [line.split()[:2] for line in self.out.splitlines()]
        return [row for row in rows if len(row) == 2 and row[0] in STAGES]


def command(capsys, words: list[str]) -> Outcome:
    """Run the command line in this process."""
    capsys.readouterr()
    status = train.main(words)
    printed = capsys.readouterr()
    return Outcome(status, printed.out, printed.err)


def ask_to_stop(monkeypatch, stage: str, step: int, number: int = signal.SIGTERM) -> None:
    """Let the system ask for a stop after a step of a training, once."""
    real, left = training_log.TrainingLog.on_step, [1]

    def on_step(self, record):
        real(self, record)
        if (self._title, record.step) == (stage, step) and left:
            left.clear()
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training_log.TrainingLog, "on_step", on_step)


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(run: Path | str, stages=STAGES[:-1]) -> dict[str, bytes]:
    """Every file of the stages by its path in the run folder, but for those that hold seconds."""
    files = sorted(path for stage in stages for path in Path(run, stage).rglob("*") if path.is_file())
    timed = ("complete.json", "log.jsonl")
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.name not in timed}


def without_pictures(monkeypatch) -> None:
    """Leave the drawing of pictures, more than half of the time of a tiny job, out of it."""
    monkeypatch.setattr(job, "write_report", lambda folder, data: (folder / "report.md").write_text("-"))
