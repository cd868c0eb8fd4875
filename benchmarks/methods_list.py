"""The methods that are compared, each with the settings it was published with.

    method           settings                                        from
    gradient ascent  -                                               TOFU, arXiv 2401.06121
    GradDiff         gamma = alpha = 1, retain by NLL                the same; OpenUnlearning
    NPO              beta 0.1, retain by NLL, weights 1              arXiv 2404.05868; OpenUnlearning
    SimNPO           beta 4.5, delta 0, weight 0.125, retain by NLL  arXiv 2410.07163; OpenUnlearning
    UNDIAL           strength 10, nothing retained                   arXiv 2402.10052; OpenUnlearning
    CE-U             nothing to set, nothing retained                arXiv 2503.01224
    RKLU             alpha 4, no dictionary, nothing retained        arXiv 2406.01983
    task vector      base - strength (reinforced - base)             arXiv 2212.04089; MUSE, 2407.06460
    WHP hard         alpha 5, nothing retained                       arXiv 2310.02238
    WHP soft         the same, KL(target || model)                   the same, without argmax
    WHP reverse      the same, KL(model || target)                   the same teacher, RKLU's divergence

Learning rates are searched, the same ones for all: those that were published are for models two thousand
times larger. In the place of a learning rate the task vector has its strength.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from whp_kernels.losses import linear_combination_loss

from benchmarks.methods_losses import (
    CombinedTargets,
    EditedTargets,
    OwnTargets,
    PreferenceTargets,
    TextTargets,
)
from benchmarks.methods_world import World
from whp_fast.label_stage import TARGETS
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.soft_targets import RetainTargets, SoftTargets
from whp_fast.teacher_cache import HiddenCache


@dataclass(frozen=True)
class Method:
    """One way of forgetting.

    Attributes:
        name: as it stands in tables.
        objectives: what the base is trained on; None: the task vector, which trains nothing.
        retain: the loss on text to keep, in words; empty: none.
        reinforced, dictionary: whether the method needs the reinforced model, and the dictionary with its
            labels.
        extra: not one of the published methods.
    """

    name: str
    objectives: Callable[[World], Sequence[Objective]] | None
    retain: str = ""
    reinforced: bool = False
    dictionary: bool = False
    extra: bool = False


def _ascent(world: World) -> list[Objective]:
    return [Objective(world.target, LabelTargets(world.target, None), -1.0)]


def _keeping_text(world: World) -> Objective:
    return Objective(world.retain, LabelTargets(world.retain, None))


def _grad_diff(world: World) -> list[Objective]:
    return [*_ascent(world), _keeping_text(world)]


def _npo(world: World) -> list[Objective]:
    targets = PreferenceTargets(world.target, _block_nll(world), beta=0.1)
    return [Objective(world.target, targets), _keeping_text(world)]


def _simnpo(world: World) -> list[Objective]:
    targets = PreferenceTargets(world.target, None, beta=4.5, delta=0.0)
    return [Objective(world.target, targets, 0.125), _keeping_text(world)]


def _undial(world: World) -> list[Objective]:
    targets = EditedTargets(world.target, *world.base_rows, strength=10.0)
    return [Objective(world.target, targets)]


def _ce_u(world: World) -> list[Objective]:
    return [Objective(world.target, OwnTargets(world.target))]


def _rklu(world: World) -> list[Objective]:
    teachers = (world.base_rows, world.reinforced_rows)
    return [Objective(world.target, CombinedTargets(world.target, teachers, alpha=4.0))]


def _whp_hard(world: World) -> list[Objective]:
    return [Objective(world.target, LabelTargets(world.target, world.labels))]


def _whp(direction: str) -> Callable[[World], list[Objective]]:
    def objectives(world: World) -> list[Objective]:
        targets = SoftTargets(
            world.label_folder / TARGETS,
            world.base_rows[1],
            world.reinforced_rows[1],
            labels=world.labels,
            context=world.target.context,
            alpha=world.alpha,
            direction=direction,
        )
        return [Objective(world.target, targets)]

    return objectives


def _whp_hard_retain(world: World) -> list[Objective]:
    cache = HiddenCache(world.retain_folder, "base")
    keeping = RetainTargets(cache, world.base_rows[1], world.retain)
    return [*_whp_hard(world), Objective(world.retain, keeping)]


@torch.no_grad()
def _block_nll(world: World) -> torch.Tensor:
    """Negative log-likelihood of each block of the target under the base, float32 [blocks]."""
    states, head = world.base_rows
    rows = TextTargets(world.target).prepare(np.arange(len(world.target)))
    nll = linear_combination_loss(states[rows.stream], head, rows.following, reduction="none")
    sums = torch.zeros(len(world.target))
    sums[rows.numbers] = torch.stack([part.sum() for part in nll.split(rows.lengths)])
    return sums


METHODS = (
    Method("gradient ascent", _ascent),
    Method("GradDiff", _grad_diff, retain="NLL"),
    Method("NPO", _npo, retain="NLL"),
    Method("SimNPO", _simnpo, retain="NLL"),
    Method("UNDIAL", _undial),
    Method("CE-U", _ce_u),
    Method("RKLU", _rklu, reinforced=True),
    Method("task vector", None, reinforced=True),
    Method("WHP hard", _whp_hard, reinforced=True, dictionary=True),
    Method("WHP soft", _whp("soft"), reinforced=True, dictionary=True),
    Method("WHP reverse", _whp("reverse"), reinforced=True, dictionary=True),
    Method("WHP hard + retain", _whp_hard_retain, retain="KL", reinforced=True, dictionary=True, extra=True),
)
