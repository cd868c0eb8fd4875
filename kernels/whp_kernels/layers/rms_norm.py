"""RMSNorm (arXiv 1910.07467), alone or with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.layers.dispatch import backend


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in float32 or wider and rounded once.

    Args:
        x: [..., width].
        weight: [width].
        eps: added to the mean of the squares.
        dtype: of the result; default: that of the weight.

    Returns:
        the shape of x, in ``dtype``.
    """
    return residual_rms_norm(x, None, weight, eps, dtype)[1]


def residual_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The new residual stream x + branch and its norm, in one pass; so is their backward.

    The stream is to be read from the first result only: then its gradient is added within the backward pass
    instead of in a pass of its own, and reaches x and the branch, each in its dtype.

    Args:
        x: [..., width], the residual stream.
        branch: the shape of x, what a layer adds to it; None: nothing.
        weight: [width].
        eps: added to the mean of the squares.
        dtype: of the norm; default: that of the weight.

    Returns:
        x + branch in the dtype of x, and its norm in ``dtype``.

    Raises:
        ValueError: shapes that do not fit.
    """
    if weight.shape != x.shape[-1:] or (branch is not None and branch.shape != x.shape):
        raise ValueError(
            f"residual_rms_norm: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
            + ("" if branch is None else f", branch {tuple(branch.shape)}")
            + "; expected [..., width], [width] and the shape of x"
        )
    return _ResidualRMSNorm.apply(x, branch, weight, eps, dtype or weight.dtype)


class _ResidualRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, eps, dtype):
        total, out, scale = backend(x, branch, weight).rms_norm(x, branch, weight, eps, dtype)
        ctx.save_for_backward(total, weight, scale)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return x if branch is None else total, out

    @staticmethod
    def backward(ctx, g_sum, g_out):
        branch_dtype = ctx.branch_dtype
        if g_out is None:  # the norm was not used
            whole = g_sum is None or branch_dtype is None
            return g_sum, None if whole else g_sum.to(branch_dtype), None, None, None
        total, weight, scale = ctx.saved_tensors
        g_x, g_branch, g_weight = backend(g_out, g_sum, total, weight).rms_norm_backward(
            g_out, g_sum, total, weight, scale, branch_dtype, ctx.needs_input_grad[2]
        )
        return g_x, g_branch, g_weight, None, None
