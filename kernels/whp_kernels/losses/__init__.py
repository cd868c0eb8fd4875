"""Losses whose target is a combination of several models' logits: combination x divergence."""

from whp_kernels.losses.arguments import IGNORE_INDEX
from whp_kernels.losses.combination import (
    SELF,
    Identity,
    Offset,
    RelativeTop,
    RowEdits,
    StudentOffset,
    Whp,
)
from whp_kernels.losses.dispatch import backends
from whp_kernels.losses.labels import GenericLabels, generic_labels
from whp_kernels.losses.linear_loss import LinearCombinationLoss, linear_combination_loss
from whp_kernels.losses.loss import CombinationLoss, combination_loss
from whp_kernels.losses.statistics import Statistics
from whp_kernels.losses.unlearning import (
    grad_ascent_loss,
    grad_diff_loss,
    npo_loss,
    satimp_loss,
    simnpo_loss,
    trained_positions,
    wga_loss,
)

__all__ = [
    "IGNORE_INDEX",
    "SELF",
    "CombinationLoss",
    "GenericLabels",
    "Identity",
    "LinearCombinationLoss",
    "Offset",
    "RelativeTop",
    "RowEdits",
    "Statistics",
    "StudentOffset",
    "Whp",
    "backends",
    "combination_loss",
    "generic_labels",
    "grad_ascent_loss",
    "grad_diff_loss",
    "linear_combination_loss",
    "npo_loss",
    "satimp_loss",
    "simnpo_loss",
    "trained_positions",
    "wga_loss",
]
