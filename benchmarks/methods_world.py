"""The world in which the methods are compared: base, oracle, reinforced model, labels, texts and prompts.

The demo's world (``whp_fast.demo``) with the demo's settings. Prompts, questions and general texts are cut
into two halves that share none: the search half chooses learning rates, the report half is what is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whp_fast.checkpoint import load_model
from whp_fast.config import JobConfig, MemoryConfig, TrainConfig, parse_config
from whp_fast.corpus import Blocks
from whp_fast.demo import make_demo
from whp_fast.errors import UserError
from whp_fast.job import Job
from whp_fast.judge import LexicalJudge
from whp_fast.label_stage import RETAIN, labels_file
from whp_fast.model import Llama
from whp_fast.prompts import EvaluationSet
from whp_fast.scoring import document_ids
from whp_fast.tokens import Tokenizer

Item = TypeVar("Item")
Rows = tuple[Tensor, Tensor]
"""Hidden states at every token of the target [tokens, H], and the LM head [V, H] that reads them."""


@dataclass
class World:
    """What every method is given.

    Attributes:
        base, oracle, reinforced: float32 models in evaluation mode; not to be changed.
        target, retain: blocks of the text to forget, and of the text that methods with a retain loss read
            (the general text that the base was trained on, not what is measured).
        heldout: blocks of the general texts of the report half.
        base_rows, reinforced_rows: both teachers on the target.
        labels: generic labels over the target, int32, -100 where untrained.
        label_folder, retain_folder: of the teachers' hidden states on disk.
        alpha: of the labels.
        training: optimizer, schedule, steps and batch of every method.
        memory: how weights and moments are kept.
        search, report: the two halves of prompts, questions and texts.
        seconds: what making each part took, by name.
    """

    tokenizer: Tokenizer
    base: Llama
    oracle: Llama
    reinforced: Llama
    target: Blocks
    retain: Blocks
    heldout: Blocks
    base_rows: Rows
    reinforced_rows: Rows
    labels: np.ndarray
    label_folder: Path
    retain_folder: Path
    alpha: float
    training: TrainConfig
    memory: MemoryConfig
    compute_dtype: torch.dtype
    judge: LexicalJudge
    max_new_tokens: int
    search: EvaluationSet
    report: EvaluationSet
    seed: int
    seconds: dict[str, float]


def make_world(folder: Path, size: str, seed: int, given: Path | None = None) -> World:
    """Make the world and the stages up to the labels in ``folder``, or find them there.

    Args:
        size: of the demo, ``demo`` or ``tiny``.
        given: the ``world`` folder of a demo of this size and seed, whose base and oracle are taken.

    Raises:
        UserError: ``given`` holds no finished world, or another one.
    """
    if given is not None and not (given / "world.json").is_file():
        raise UserError(f"--world: {given} holds no finished world; name the world folder of a demo run.")
    place = given or folder / "world"
    seconds = {f"world: {name}": value for name, value in make_demo(place, size, seed).items()}
    config = _config(place, folder, size, seed)
    job = Job(config)
    try:
        for stage in (job.prepare, job.align, job.reinforce, job.label):
            done = stage()
            seconds[done.folder.name] = done.seconds
    finally:
        job.close()
    base, oracle = (load_model(place / name, dtype=torch.float32).eval() for name in ("base", "oracle"))
    reinforced = load_model(job.stages["reinforce"].folder / "model", dtype=torch.float32).eval()
    context = config.data.context
    label = job.stages["label"].folder
    target = Blocks.of(np.load(job.stages["prepare"].folder / "tokens.npy"), context)
    search, report = halves(job.inputs.evaluation)
    general = [token for text in report.texts for token in document_ids(job.inputs.tokenizer, text)]
    return World(
        tokenizer=job.inputs.tokenizer,
        base=base,
        oracle=oracle,
        reinforced=reinforced,
        target=target,
        retain=Blocks.of(np.load(label / RETAIN / "tokens.npy"), context),
        heldout=Blocks.of(np.array(general, dtype=np.int64), context),
        base_rows=hidden_rows(base, target),
        reinforced_rows=hidden_rows(reinforced, target),
        labels=np.load(label / labels_file(config.label.alpha)),
        label_folder=label,
        retain_folder=label / RETAIN,
        alpha=config.label.alpha,
        training=config.unlearn,
        memory=config.memory,
        compute_dtype=getattr(torch, config.model.compute_dtype),
        judge=LexicalJudge(job.inputs.dictionary.expressions),
        max_new_tokens=config.evaluate.max_new_tokens,
        search=search,
        report=report,
        seed=seed,
        seconds=seconds,
    )


def _config(place: Path, folder: Path, size: str, seed: int) -> JobConfig:
    """The demo's job, with what soft labels and a retain loss need kept by the label stage."""
    words = {
        "model.path": place / "base",
        "data.corpus": json.dumps([str(place / "saga")]),
        "anchors.path": place / "anchors.json",
        "unlearn.target": "soft",
        "unlearn.retain": json.dumps([str(place / "general.jsonl")]),
        "evaluate.familiarity": place / "familiarity.json",
        "evaluate.probability": place / "probability.json",
        "evaluate.choices": place / "choices.jsonl",
        "evaluate.general_text": place / "heldout.jsonl",
        "evaluate.oracle": place / "oracle",
        "run.dir": folder,
        "run.seed": seed,
        "run.tensorboard": "false",
    }
    flat = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return parse_config(["--config", f"{size}.yaml", *flat])


@torch.inference_mode()
def hidden_rows(model: Llama, blocks: Blocks, batch_size: int = 32) -> Rows:
    """The model's hidden states at every token of the blocks, and its head."""
    parts = []
    for first in range(0, len(blocks), batch_size):
        numbers = range(first, min(first + batch_size, len(blocks)))
        rows = [torch.from_numpy(blocks[i].astype(np.int64)) for i in numbers]
        hidden = model.hidden_states(pad_sequence(rows, batch_first=True))  # causal: padding changes nothing
        parts += [hidden[k, : len(row)] for k, row in enumerate(rows)]
    return torch.cat(parts).clone(), model.lm_head_weight.detach()


def halves(data: EvaluationSet) -> tuple[EvaluationSet, EvaluationSet]:
    """Prompts, questions and texts cut in two, by the hash of their text: the same halves everywhere."""
    parts = [
        _halves(data.familiarity, lambda item: item.prompt),
        _halves(data.probability, lambda item: item.prompt),
        _halves(data.choices, lambda item: item.prompt),
        _halves(data.texts, str),
    ]
    return EvaluationSet(*(first for first, _ in parts)), EvaluationSet(*(second for _, second in parts))


def _halves(items: Sequence[Item], text: Callable[[Item], str]) -> tuple[list[Item], list[Item]]:
    by_hash = sorted(range(len(items)), key=lambda i: hashlib.sha256(text(items[i]).encode()).digest())
    return [items[i] for i in sorted(by_hash[0::2])], [items[i] for i in sorted(by_hash[1::2])]
