"""One training of a method, how it scores, and which learning rate is taken.

The score of a model is the harmonic mean of three shares, each cut to 0 .. 1:

    forgotten   1 - familiarity / the base's          familiarity: mean of completion and probability
    answers     general accuracy / the base's
    fluency     the base's general perplexity / its own

on the search half. The setting with the highest score is taken, for every method; of equal ones the first. A
training that stopped at a loss or gradient that is not finite scores 0 and is called
diverged.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.methods_list import Method
from benchmarks.methods_world import World
from whp_fast.engine import train
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.trainee import Trainee

DIVERGED = "diverged"


def score(found: Mapping[str, float | None], base: Mapping[str, float | None]) -> float:
    """See above; both mappings hold the four figures of ``whp_fast.evaluate``. A perplexity that is None is
    not finite."""
    perplexity = found["general_perplexity"]
    shares = [
        1 - familiarity(found) / familiarity(base),
        found["general_accuracy"] / base["general_accuracy"],
        0.0 if perplexity is None else base["general_perplexity"] / perplexity,
    ]
    shares = [min(1.0, max(0.0, share)) for share in shares]
    return len(shares) / sum(1 / share for share in shares) if all(shares) else 0.0


def familiarity(found: Mapping[str, float | None]) -> float:
    """The mean of both familiarities."""
    return (found["familiarity_completion"] + found["familiarity_probability"]) / 2


def best(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Which of a method's search rows is taken; None where all diverged."""
    kept = [number for number, row in enumerate(rows) if row["status"] != DIVERGED]
    return max(kept, key=lambda number: rows[number]["score"], default=None)


def unlearnt(world: World, method: Method, setting: float) -> tuple[Llama | None, float]:
    """The base after a method.

    Args:
        setting: learning rate, or the task vector's strength.

    Returns:
        the model, None where the training diverged; and the seconds of the training.
    """
    began = time.monotonic()
    if method.objectives is None:
        return _without_vector(world, setting), time.monotonic() - began
    objectives = method.objectives(world)
    settings = dataclasses.replace(world.training, lr=setting)
    trainee = Trainee.from_model(
        copy.deepcopy(world.base), settings, world.memory, compute_dtype=world.compute_dtype
    )
    began = time.monotonic()  # what a method reads of its teachers is prepared once
    try:
        train(trainee, objectives, settings, seed=world.seed, device=torch.device("cpu"))
    except UserError as error:
        if "not finite" not in str(error):
            raise
        return None, time.monotonic() - began
    seconds = time.monotonic() - began
    model = trainee.to_float32().eval()
    whole = all(bool(p.isfinite().all()) for p in model.parameters())
    return (model if whole else None), seconds


@torch.no_grad()
def _without_vector(world: World, strength: float) -> Llama:
    model = copy.deepcopy(world.base)
    pairs = zip(model.parameters(), world.reinforced.parameters(), strict=True)
    for parameter, reinforced in pairs:
        parameter -= strength * (reinforced - parameter)
    return model


def finite(number: float | None) -> float | None:
    """For JSON: what is not finite becomes None."""
    return None if number is None or not math.isfinite(number) else number
