"""A step on the CPU, compiled (csrc/cpu/adamw.cpp): one pass over a parameter, 256 elements at a time."""

from __future__ import annotations

import torch

from whp_kernels import extension
from whp_kernels.optim.update import Numbers, Tensors


def update(tensors: Tensors, numbers: Numbers) -> None:
    """One step of one parameter, in place; see ``update.py``.

    Raises:
        ValueError: the extension is missing.
    """
    if extension.load() is None:
        raise ValueError(extension.reason())
    torch.ops.whp_kernels_C.adamw_(
        tensors.weights,
        tensors.remainder,
        tensors.gradient,
        tensors.exp_avg,
        tensors.exp_avg_sq,
        tensors.exp_avg_scale,
        tensors.exp_avg_sq_scale,
        tensors.grad_scale,
        tensors.first,
        numbers.key,
        numbers.from_gradient,
        list(numbers[:7]),
    )
