"""The layers in plain torch: definitions, and what runs where nothing is compiled.

Arithmetic is in float32, or in float64 for float64 operands; every result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.layers.columns import split_columns, whole_of


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`whp_kernels.layers.residual_rms_norm`.

    Args:
        x, branch: [..., width].
        weight: [width].

    Returns:
        x + branch in the dtype of x (x itself without a branch), its norm in ``dtype``, and 1 / rms of the
        rows [...], float32 or wider.
    """
    total = x if branch is None else (x + branch).to(x.dtype)
    n = total.to(wide(x))
    r = torch.linalg.vector_norm(n, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return total, (n * r).mul_(weight).to(dtype), r.squeeze(-1)


def rms_norm_backward(
    g_out: Tensor,
    g_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    branch_dtype: torch.dtype | None,
    weight_too: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x and of the branch in their dtypes, and of the weight in float32 or wider: autograd
    rounds it to what the parameter asks for.

    With n = x * r and the incoming gradient g: dw = sum over rows of g * n,
    dx = r * (g * w - n * mean(g * w * n)) + g_sum.

    Args:
        g_out: [..., width], gradient of the norm.
        g_sum: [..., width], gradient of x + branch from elsewhere, or None.
        total, scale: x + branch and 1 / rms, from the forward pass.
        branch_dtype: of the branch; None if there is none.
        weight_too: whether the weight's gradient is wanted.
    """
    r = scale.unsqueeze(-1)
    n, w, g = total.to(r.dtype) * r, weight.to(r.dtype), g_out.to(r.dtype)
    gn = g * n
    mean = (gn * w).mean(-1, keepdim=True)  # no product of matrices: autocast would take it for one
    g_x = torch.addcmul(g * w, n, mean, value=-1).mul_(r)
    if g_sum is not None:
        g_x += g_sum
    g_branch = None if branch_dtype is None else g_x.to(branch_dtype)
    return g_x.to(total.dtype), g_branch, gn.flatten(0, -2).sum(0) if weight_too else None


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """See :func:`whp_kernels.layers.rope`; ``inverse``: the transposed rotation, which takes gradients back.

    Args:
        x: [B, T, heads, D].
        cos, sin: [T, 1, D] or [B, T, 1, D].
    """
    half = x.shape[-1] // 2
    if inverse:
        return torch.add(x * cos, (x * sin).roll(half, -1)).to(x.dtype)
    return torch.addcmul(x * cos, x.roll(half, -1), sin).to(x.dtype)


def rope_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    in_one: bool = False,
) -> tuple[Tensor, ...]:
    """:func:`rope` of queries and keys, and a copy of the values if they are given.

    Args:
        q, k, v: [B, T, heads, D], each with its number of heads.
        in_one: write the results beside each other, as columns of one tensor [B, T, all heads * D].
    """
    made = [rope(q, cos, sin, inverse), rope(k, cos, sin, inverse)] + ([] if v is None else [v.clone()])
    return tuple(split_columns(whole_of(made, 2), made, 2) if in_one else made)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up."""
    g = gate.to(wide(gate))
    return (torch.sigmoid(g).mul_(g).mul_(up)).to(gate.dtype)


def swiglu_backward(g: Tensor, gate: Tensor, up: Tensor, in_one: bool = False) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(gate): d_gate = g * up * s * (1 + gate * (1 - s)), d_up = g * gate * s.

    Args:
        in_one: write both beside each other, as the halves of one tensor [..., 2 * width].
    """
    x = gate.to(wide(gate))
    s = torch.sigmoid(x)
    d_up = s * x * g
    d_gate = torch.addcmul(torch.ones_like(s), x, 1 - s).mul_(s).mul_(up).mul_(g)
    made = [d_gate.to(gate.dtype), d_up.to(up.dtype)]
    return tuple(split_columns(whole_of(made), made) if in_one else made)
