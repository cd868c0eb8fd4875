"""Every memory mode end to end, from the command line to the exported folder, and what is refused."""

import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_world import (
    CONTEXT,
    arguments,
    ask_to_stop,
    command,
    contents,
    make_world,
    without_pictures,
)
from torch.nn import functional as F

from whp_fast import job, train
from whp_fast.checkpoint import load_model
from whp_fast.corpus import Blocks
from whp_fast.soft_targets import SoftTargets
from whp_fast.tokens import load_tokenizer

STEPS = 6
WEIGHTS = "export/model.safetensors"
RETAINED = "The tree was old. It is said that a cup is cold, and the stick of the tree was cold too.\n"
BF16 = {"model__compute_dtype": "bfloat16"}
SMALL = {"reinforce__lr": 1e-5, "unlearn__lr": 1e-5}
MODES = {
    "float32": {},
    "autocast": BF16 | {"memory__weights": "float32"},
    "bfloat16 weights": BF16 | {"memory__weights": "bfloat16"},
    "bfloat16 gradients": BF16 | {"memory__gradients": "bfloat16"},
    "small autocast": BF16 | SMALL | {"memory__weights": "float32"},
    "small bfloat16": BF16 | SMALL | {"memory__weights": "bfloat16"},
    "bfloat16 moments": {"memory__moments": "bfloat16"},
    "int8 moments": {"memory__moments": "int8"},
    "offloaded": BF16 | {"memory__offload_moments": "true"},
    "bitsandbytes": {"memory__optimizer": "bitsandbytes"},
    "selective": {"memory__checkpointing": "selective"},
    "full": {"memory__checkpointing": "full"},
    "adapters": {"memory__lora_rank": 4},
    "adapters nf4": BF16 | {"memory__lora_rank": 4, "memory__frozen": "nf4"},
    "adapters int8": BF16 | {"memory__lora_rank": 4, "memory__frozen": "int8"},
    "soft": {"unlearn__target": "soft"},
    "reverse": {"unlearn__target": "reverse"},
    "soft float8": {"unlearn__target": "soft", "unlearn__cache_dtype": "float8"},
    "reverse adapters": {"unlearn__target": "reverse", "memory__lora_rank": 4},
    "retain": {"unlearn__retain": ["world/retained.txt"], "unlearn__retain_weight": 3.0},
}

LEAST = {"soft": 0.15, "small": 0.0}  # fall of the loss, nats


def words(run: str = "run", **settings) -> list[str]:
    """The command line of a training that changes much in few steps."""
    much = {"reinforce__steps": STEPS, "unlearn__steps": STEPS, "run__tensorboard": "false"}
    return arguments(run, evaluation=False, **{**much, **settings})


class Runs:
    """Finished runs by the name of their mode, each made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        make_world(folder / "world")
        (folder / "world" / "retained.txt").write_text(RETAINED * 4, "utf-8")

    def __call__(self, mode: str) -> Path:
        run = mode.replace(" ", "_")
        if (self.folder / run / "report").is_dir():
            return self.folder / run
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            without_pictures(patch)
            assert train.main(words(run, **MODES[mode])) == 0
        return self.folder / run

    @functools.cached_property
    def base(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "world" / "base" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("modes"))


def blocks_of(run: Path) -> Blocks:
    return Blocks.of(np.load(run / "prepare" / "tokens.npy"), CONTEXT)


@torch.no_grad()
def label_loss(model, run: Path) -> float:
    """Cross-entropy with the run's labels over the whole corpus, blocks one by one, in nats."""
    labels = torch.from_numpy(np.load(run / "label" / "labels_alpha_5.npy").astype(np.int64))
    tokens = torch.from_numpy(np.load(run / "prepare" / "tokens.npy").astype(np.int64))
    losses = [
        F.cross_entropy(model(ids[None])[0].double(), wanted, ignore_index=-100, reduction="sum")
        for ids, wanted in zip(tokens.split(CONTEXT), labels.split(CONTEXT))
    ]
    return float(sum(losses) / (labels != -100).sum())


def distance(runs, one: str, other: str) -> float:
    """How far two runs are from each other, as a share of how far the second went from the base."""
    ours, theirs = (load_file(runs(mode) / WEIGHTS) for mode in (one, other))
    apart = sum(float((ours[k].double() - theirs[k].double()).square().sum()) for k in theirs)
    went = sum(float((theirs[k].double() - runs.base[k].double()).square().sum()) for k in theirs)
    return (apart / went) ** 0.5


# Every mode
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_learns_its_labels_and_exports_a_folder(runs, mode):
    run = runs(mode)
    records = [json.loads(line) for line in (run / "unlearn" / "log.jsonl").read_text().splitlines()]
    if MODES[mode].get("unlearn__target"):  # whose loss is another
        before, after = records[0]["loss"], records[-1]["loss"]
    else:
        folders = (runs.folder / "world" / "base", run / "export")
        before, after = (label_loss(load_model(folder), run) for folder in folders)
    assert 0 < after < before - LEAST.get(mode.split()[0], 0.3)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert not [name for name in os.listdir(run) if name.endswith((".snapshots", ".partial"))]
    weights = load_file(run / WEIGHTS)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    if mode in ("adapters", "reverse adapters"):
        changed = {name for name in weights if not weights[name].equal(runs.base[name])}
        assert changed and all("_proj" in name for name in changed)


@pytest.mark.parametrize("mode", ["bfloat16 weights", "adapters nf4"])
def test_transformers_loads_the_folder_with_the_same_logits(runs, mode):
    transformers = pytest.importorskip("transformers")
    export = runs(mode) / "export"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(runs(mode) / "prepare" / "tokens.npy")[: 2 * CONTEXT].astype(np.int64))
    with torch.no_grad():
        logits = load_model(export)(ids.view(2, CONTEXT))
        torch.testing.assert_close(theirs(ids.view(2, CONTEXT)).logits, logits, rtol=0, atol=1e-5)
        base = load_model(runs.folder / "world" / "base")(ids.view(2, CONTEXT))
    assert (base - logits).abs().max() > 1e-2


# How near the modes come to each other
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, same", [("selective", "float32"), ("full", "float32"), ("offloaded", "bfloat16 weights")]
)
def test_checkpointing_and_moments_in_host_memory_change_no_bit(runs, mode, same):
    stages = ["reinforce", "label", "unlearn"]
    assert contents(runs(mode), stages) == contents(runs(same), stages)


def test_bfloat16_weights_are_no_farther_from_float32_than_autocast(runs):
    """What is left is the rounding of matrix products, which both have."""
    found, yardstick = (distance(runs, mode, "float32") for mode in ("bfloat16 weights", "autocast"))
    assert 0 < found < 1.5 * yardstick


def test_updates_smaller_than_a_step_of_bfloat16_arrive(runs):
    """Without the remainders most of them would be rounded away, and the distance would be near 1."""
    found = distance(runs, "small bfloat16", "small autocast")
    assert found < 0.12
    weights = load_file(runs("small bfloat16") / WEIGHTS)["lm_head.weight"]
    step = (weights - runs.base["lm_head.weight"]).abs()
    assert (step < weights.abs() / 2**9).float().mean() > 0.5  # they were as small as that


@pytest.mark.parametrize(
    "mode, other, most",
    [
        ("bfloat16 weights", "autocast", 0.15),
        ("bfloat16 gradients", "bfloat16 weights", 0.06),
        ("bfloat16 moments", "float32", 0.003),
        ("int8 moments", "float32", 0.05),
        ("bitsandbytes", "float32", 0.06),
        ("soft float8", "soft", 0.2),
    ],
)
def test_a_mode_goes_nearly_the_way_of_another(runs, mode, other, most):
    found = distance(runs, mode, other)
    assert 0 < found < most


# Soft targets and text to keep
# -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def divergence(run: Path, base: Path, student: Path, direction: str) -> float:
    """Mean KL between the run's combined distribution and a model's, over all trained positions."""
    blocks = blocks_of(run)
    heads = [load_model(f).lm_head_weight for f in (base, run / "reinforce/model")]
    labels = np.load(run / "label" / "labels_alpha_5.npy")
    targets = SoftTargets(
        run / "label" / "targets", *heads, labels=labels, context=CONTEXT, alpha=5.0, direction=direction
    )
    model = load_model(student)
    total = 0.0
    for number in range(len(blocks)):
        hidden = model.hidden_states(torch.from_numpy(blocks[number][None].astype(np.int64)))
        prepared = targets.prepare([number])
        total += float(targets.loss(hidden[0], model.lm_head_weight, prepared, num_items_in_batch=1))
    return total / targets.count(np.arange(len(blocks)))


@pytest.mark.parametrize(
    "mode, direction", [("soft", "soft"), ("soft float8", "soft"), ("reverse", "reverse")]
)
def test_the_divergence_from_the_soft_target_falls(runs, mode, direction):
    base, other = runs.folder / "world" / "base", "soft" if mode == "reverse" else "reverse"
    before = divergence(runs(mode), base, base, direction)
    after = divergence(runs(mode), base, runs(mode) / "export", direction)
    assert 0 < after < 0.8 * before, (before, after)
    # it is what was asked for: a model of the other direction is farther away
    assert after < divergence(runs(mode), base, runs(other) / "export", direction)


def test_the_cache_of_soft_targets_is_kept_as_asked(runs):
    size = {
        mode: sum(f.stat().st_size for f in (runs(mode) / "label" / "targets").rglob("base*"))
        for mode in ("soft", "soft float8")
    }
    assert 0.4 < size["soft float8"] / size["soft"] < 0.8  # a byte a value, and a scale a row
    assert not (runs("float32") / "label" / "targets").exists()


def test_retained_text_keeps_the_model_nearer_to_the_base(runs):
    base = load_model(runs.folder / "world" / "base")
    ids = torch.tensor(load_tokenizer(runs.folder / "world" / "base").encode(RETAINED))[None, :CONTEXT]

    @torch.no_grad()
    def to_base(mode: str) -> float:
        model = load_model(runs(mode) / "export")
        there, here = (F.log_softmax(m(ids)[0].double(), -1) for m in (base, model))
        return float((there.exp() * (there - here)).sum(-1).mean())

    runs("retain"), runs("float32")  # they need gradients
    assert to_base("retain") < 0.5 * to_base("float32"), (to_base("retain"), to_base("float32"))
    assert contents(runs("retain"), ["reinforce"]) == contents(runs("float32"), ["reinforce"])


# Snapshots of unusual state
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, stage",
    [
        ("int8 moments", "unlearn"),
        ("bitsandbytes", "unlearn"),
        ("adapters nf4", "reinforce"),
        ("adapters nf4", "unlearn"),
        ("bfloat16 gradients", "unlearn"),
        ("offloaded", "reinforce"),
        ("soft", "unlearn"),
        ("retain", "unlearn"),
    ],
)
def test_a_stopped_training_ends_with_the_same_bits(runs, tmp_path, monkeypatch, capfd, mode, stage):
    shutil.copytree(runs.folder / "world", tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    ask_to_stop(monkeypatch, stage, 3)
    stopped = command(capfd, words(**MODES[mode]))
    assert stopped.status == 130
    outcome = command(capfd, words(**MODES[mode]))
    assert outcome.status == 0 and f"{stage}: goes on after step 3" in outcome.out
    assert contents("run") == contents(runs(mode))


# What is refused before anything is loaded
# -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loaded(runs, tmp_path, monkeypatch):
    """A world in the current folder, in which no stage may begin."""
    shutil.copytree(runs.folder / "world", tmp_path / "world")
    monkeypatch.chdir(tmp_path)

    def begun(_job):
        raise AssertionError("a stage has begun")

    monkeypatch.setattr(job.Job, "prepare", begun)


def refused(capfd, settings: dict, told: list[str]) -> None:
    outcome = command(capfd, words(**settings))
    assert outcome.status == 2
    assert re.fullmatch(r"error: .*[.?]\n", outcome.err), outcome.err  # one line
    for word in told:
        assert word in outcome.err, f"{word!r} is not in {outcome.err!r}"
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"memory__frozen": "nf4"}, ["memory.frozen", "nf4", "set memory.lora_rank"]),
        ({"memory__frozen": "int8"}, ["memory.frozen", "int8", "set memory.lora_rank"]),
        (
            {"memory__weights": "float32", "memory__gradients": "bfloat16"},
            ["memory.gradients", "float32 weights", "memory.weights bfloat16"],
        ),
        ({"memory__gradients": "bfloat16"}, ["memory.gradients", "weights are float32"]),  # auto, in float32
        (
            {"memory__optimizer": "bitsandbytes", "memory__weights": "bfloat16"},
            ["memory.optimizer", "bitsandbytes", "memory.weights float32"],
        ),
        ({"memory__optimizer": "bitsandbytes", "memory__gradients": "bfloat16"} | BF16, ["memory.gradients"]),
        ({"memory__lora_targets": ["q_prj"]}, ["memory.lora_targets", "'q_prj'", "did you mean 'q_proj'?"]),
        ({"memory__lora_rank": 4, "memory__lora_targets": []}, ["memory.lora_targets"]),
        ({"memory__lora_rank": -1}, ["memory.lora_rank", "0 or more"]),
        ({"memory__lora_alpha": 0}, ["memory.lora_alpha", "above 0"]),
        ({"memory__moments": "int4"}, ["memory.moments", "int4"]),
        ({"unlearn__target": "sotf"}, ["unlearn.target", "soft"]),
        ({"unlearn__retain": ["world/none.txt"]}, ["world/none.txt", "not found", "unlearn.retain"]),
        ({"unlearn__retain_weight": -1}, ["unlearn.retain_weight", "0 or more"]),
        ({"run__snapshot_steps": -1}, ["run.snapshot_steps", "0 or more"]),
    ],
)
def test_settings_that_do_not_go_together(nothing_loaded, capfd, settings, told):
    refused(capfd, settings, told)


@pytest.mark.parametrize(
    "settings",
    [{"memory__optimizer": "bitsandbytes"}, {"memory__lora_rank": 4, "memory__frozen": "nf4"}],
)
def test_bitsandbytes_that_is_not_installed(nothing_loaded, capfd, monkeypatch, settings):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(capfd, settings, ["memory.", "bitsandbytes", "pip install bitsandbytes"])
