"""Losses whose target is a combination of several models' logits."""

from whp_kernels.losses.labels import generic_labels
from whp_kernels.losses.linear_loss import linear_cross_entropy

IGNORE_INDEX = -100

__all__ = ["IGNORE_INDEX", "generic_labels", "linear_cross_entropy"]
