"""SwiGLU (arXiv 2002.05202): the gated activation of a Llama's MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.layers.columns import are_columns
from whp_kernels.layers.dispatch import backend


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32 or wider and rounded once. The backward needs gate and up only.

    Of a gate and up that are columns of one tensor the gradients are columns of one tensor too.

    Args:
        gate, up: [..., width] of one dtype.

    Returns:
        the shape and dtype of gate.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}, "
            "expected the same shape and dtype"
        )
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.in_one = not torch.compiler.is_compiling() and are_columns((gate, up))
        return backend(gate, up).swiglu(gate, up)

    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        return backend(g, gate, up).swiglu_backward(g, gate, up, ctx.in_one)
