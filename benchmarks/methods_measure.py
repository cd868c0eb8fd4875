"""What is measured of a model of the methods' world: the four figures, the distance to the oracle, and what
comes back after relearning and in 4 bits."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata

import numpy as np
import torch
from whp_kernels.losses import Identity, linear_combination_loss

from benchmarks.methods_losses import TextTargets
from benchmarks.methods_world import World, hidden_rows
from whp_fast.config import TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import train
from whp_fast.evaluate import FIGURES, EvaluationResult, evaluate
from whp_fast.evaluation.bootstrap import Figure, ratio_figure
from whp_fast.model import Llama
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.prompts import EvaluationSet, spaced
from whp_fast.quantised import quantise_
from whp_fast.trainee import Trainee

RELEARN_STEPS, RELEARN_LR, RELEARN_BATCH, RELEARN_SHARE = 20, 2e-4, 8, 0.1
_DISTANCE_BLOCKS = 96


def figures(model: Llama, world: World, data: EvaluationSet) -> EvaluationResult:
    """The four figures of ``whp_fast.evaluate``."""
    return evaluate(
        model,
        world.tokenizer,
        data,
        judge=world.judge,
        max_new_tokens=world.max_new_tokens,
        context=world.target.context,
    )


class Distance:
    """Mean KL(oracle || model) in nats a token, on evenly spaced blocks of a text.

    The oracle's hidden states are computed once; logits exist for a chunk of rows at a time.
    """

    def __init__(self, oracle: Llama, blocks: Blocks):
        kept = spaced([blocks[i] for i in range(len(blocks))], _DISTANCE_BLOCKS)
        self.blocks = Blocks.of(np.concatenate(kept), blocks.context)
        self._rows = TextTargets(self.blocks).prepare(np.arange(len(self.blocks)))
        self._oracle = hidden_rows(oracle, self.blocks)

    @torch.inference_mode()
    def __call__(self, model: Llama) -> Figure:
        states, head = hidden_rows(model, self.blocks)
        divergence = linear_combination_loss(
            states[self._rows.stream],
            head,
            teachers=((self._oracle[0][self._rows.stream], self._oracle[1]),),
            combination=Identity(),
            divergence="forward_kl",
            reduction="none",
        )
        sizes = self._rows.lengths
        return ratio_figure([part.double().sum().item() for part in divergence.split(sizes)], sizes)


def relearnt(model: Llama, world: World) -> Llama:
    """A copy after a few steps of next-token training on a tenth of the target, the same for every model.

    What the oracle learns in as many steps was learnt anew and did not come back.
    """
    settings = TrainConfig(
        steps=RELEARN_STEPS,
        lr=RELEARN_LR,
        batch_blocks=RELEARN_BATCH,
        accumulate=1,
        schedule="constant",
        betas=list(world.training.betas),
    )
    blocks = [world.target[i] for i in range(len(world.target))]
    # a short last block may only stand at the end, and that is where it comes
    kept = spaced(blocks, max(1, round(RELEARN_SHARE * len(blocks))))
    shown = Blocks.of(np.concatenate(kept), world.target.context)
    trainee = Trainee.from_model(copy.deepcopy(model), settings, compute_dtype=torch.float32)
    objectives = [Objective(shown, LabelTargets(shown, None))]
    train(trainee, objectives, settings, seed=world.seed, device=torch.device("cpu"))
    return trainee.to_float32().eval()


def in_four_bits(model: Llama) -> Llama | None:
    """A copy with its projections in nf4; None without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    return quantise_(copy.deepcopy(model), "nf4")


class Report:
    """All that is reported of a model, on the report half."""

    def __init__(self, world: World):
        self.world = world
        self.to_target = Distance(world.oracle, world.target)
        self.to_general = Distance(world.oracle, world.heldout)
        self._familiarity = dataclasses.replace(world.report, choices=None, texts=None)

    def __call__(self, model: Llama) -> dict[str, Figure | None]:
        """Name -> figure with its interval; None where it was not measured."""
        found: dict[str, Figure | None] = {}
        self._add(found, "", model, self.world.report)
        found |= {"kl_target": self.to_target(model), "kl_general": self.to_general(model)}
        self._add(found, "relearnt_", relearnt(model, self.world), self.world.report)
        self._add(found, "quantised_", in_four_bits(model), self._familiarity)
        return found

    def _add(self, found: dict, prefix: str, model: Llama | None, data: EvaluationSet) -> None:
        result = None if model is None else figures(model, self.world, data)
        names = FIGURES[:2] if data is self._familiarity else FIGURES
        found |= {prefix + name: None if result is None else result.figure(name) for name in names}


NAMES: tuple[str, ...] = (
    *FIGURES,
    "kl_target",
    "kl_general",
    *(f"relearnt_{name}" for name in FIGURES),
    *(f"quantised_{name}" for name in FIGURES[:2]),
)
"""The names of a report's figures."""


def bitsandbytes_version() -> str | None:
    """Which quantised the weights; None where there is none."""
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return None
