"""Which linear layers of a model multiply in 8-bit floats, and where that is refused.

The projections of the blocks do; embedding, language model head, norms, attention and losses stay as they
are. A model in training does so where gradients are asked for alone: what is measured between steps is the
weights, and not their rounding to 8 bits. Teachers do so wherever they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from whp_kernels.layers.fp8 import fits, fp8_linears, has_fp8

from whp_fast.errors import UserError

if TYPE_CHECKING:
    from whp_fast.config import JobConfig
    from whp_fast.model import Llama


@dataclass(frozen=True)
class Fp8:
    """How a linear layer multiplies; its attribute ``fp8``.

    Attributes:
        scaling: ``tensorwise`` or ``rowwise``.
        only_in_training: calls without gradients stay as they were.
    """

    scaling: str
    only_in_training: bool


def use_fp8(model: Llama, scaling: str, *, only_in_training: bool) -> None:
    """Let the projections of a model's blocks multiply in 8-bit floats; with ``off`` nothing happens.

    A projection whose dimensions are not divisible by 16 stays as it is, and so do those that share its
    input.
    """
    if scaling == "off":
        return
    how = Fp8(scaling, only_in_training)
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        for group in (
            (attn.q_proj, attn.k_proj, attn.v_proj),
            (attn.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            if all(type(linear) is nn.Linear and fits(linear.weight.shape) for linear in group):
                for linear in group:
                    linear.fp8 = how


def fp8_project(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...] | None:
    """What linear layers make of x in 8-bit floats; None: they do not multiply so."""
    how: Fp8 | None = getattr(linears[0], "fp8", None)
    if how is None or (how.only_in_training and not torch.is_grad_enabled()):
        return None
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    return fp8_linears(x, weights, biases, how.scaling)


def refuse_fp8(config: JobConfig, device: torch.device) -> None:
    """Refuse 8-bit products on a GPU that has none; on a CPU they are emulated.

    Raises:
        UserError: the sentence that mends it.
    """
    for key, scaling in (("model.fp8", config.model.fp8), ("label.fp8", config.label.fp8)):
        if scaling != "off" and device.type == "cuda" and not has_fp8(device):
            raise UserError(
                f"{key}: {torch.cuda.get_device_name(device)} has no 8-bit floats, Ada, Hopper and newer "
                "have; set off."
            )
