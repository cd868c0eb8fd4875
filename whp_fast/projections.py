"""Several linear layers that read the same input, as one call: queries, keys and values; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from whp_kernels.layers import are_adjacent, stacked_linear

from whp_fast.fp8 import fp8_project

if TYPE_CHECKING:
    from whp_fast.model import Llama

STACKED_DEVICES = ("cuda",)
"""Types of the devices where weights are stacked. Not a CPU: there q, k and v, or gate and up, take between
0.55 and 1.24 times as long together as apart, forward and backward, without a tendency (1,024 tokens of width
192 to 256 of width 1,024, one thread), and what reads their columns would copy them."""


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """What each of some linear layers makes of x.

    Args:
        x: [..., H].
        linears: layers [n, H], plain, with adapters, or quantised.

    Returns:
        [..., n] for each.
    """
    in_8_bits = fp8_project(x, linears)
    if in_8_bits is not None:
        return in_8_bits
    # a compiler cannot look at places in memory
    stackable = len(linears) > 1 and not torch.compiler.is_compiling() and _are_plain(linears)
    if stackable and are_adjacent([linear.weight for linear in linears]):
        biases = [linear.bias for linear in linears]
        return stacked_linear(x, [linear.weight for linear in linears], None if biases[0] is None else biases)
    return tuple(linear(x) for linear in linears)


def stack_in_memory(model: Llama) -> Llama:
    """Lay q, k and v, and gate and up, of each block behind each other in memory, so that :func:`project`
    makes one product of them; on ``STACKED_DEVICES``.

    The parameters stay the objects that they are. Where they are shards, quantised or on the meta device
    nothing changes.

    Returns:
        the model itself.
    """
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        for linears in ((attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)):
            if _are_plain(linears):
                for name in ("weight", "bias"):
                    _lay_adjacent([getattr(linear, name) for linear in linears])
    return model


def _are_plain(linears: Sequence[nn.Module]) -> bool:
    """Linear layers whose call is their product and nothing else: adapters are hooks, quantised ones other
    classes."""
    return all(
        type(linear) is nn.Linear
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and (linear.bias is None) == (linears[0].bias is None)
        for linear in linears
    )


@torch.no_grad()
def _lay_adjacent(tensors: Sequence[nn.Parameter | None]) -> None:
    if not all(type(t) is nn.Parameter and t.device.type in STACKED_DEVICES for t in tensors):
        return
    if len({(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}) > 1:
        return
    parts = torch.cat([tensor.data for tensor in tensors]).split([len(tensor) for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.data = part
