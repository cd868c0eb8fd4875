"""Linear layers whose three matrix products run in 8-bit floats, with scales made anew for every call.

    product           operands                              one scale for
                      tensorwise        rowwise             tensorwise   rowwise
    y  = x W^T        e4m3, e4m3        e4m3, e4m3          a tensor     a row of x, a row of W
    dX = g W          e5m2, e4m3        e4m3, e4m3          a tensor     a row of g, a column of W
    dW = g^T x        e5m2, e4m3        e4m3, e4m3          a tensor     a column of g, a column of x

Sums are float32. A scale is the power of two that brings the largest magnitude just below the format's: such
a factor is exact in bfloat16, nothing is rounded twice and nothing overflows, so no clamp is needed. It is
made on the device, nothing waits for it. For the backward pass x is kept in 8 bits, and weights are not kept
at all: they are quantised again, so that shards which were given back are not held.

``product_reference`` says what the products are. On NVIDIA GPUs from sm_89 on they are ``torch._scaled_mm``,
elsewhere the reference itself, whose operands, exact in bfloat16, go through ``whp_kernels.gemm``. The dtypes
of the table are those of torchao's float8 recipes; one function for all three products as in nanochat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from whp_kernels import gemm

Scaling = Literal["tensorwise", "rowwise"]

MULTIPLE = 16
"""Both dimensions of a weight must be divisible by this: ``torch._scaled_mm`` takes no others."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-100
"""Largest magnitudes below this count as this, so that zeros have a scale."""


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scaling: Scaling = "tensorwise"
) -> Tensor:
    """x W^T + bias with products in 8-bit floats, forward and backward; see ``fp8_linears``."""
    return fp8_linears(x, [weight], [bias], scaling)[0]


def fp8_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    scaling: Scaling = "tensorwise",
) -> tuple[Tensor, ...]:
    """Several linear layers that read the same x, which is quantised once.

    Non-finite numbers come through as NaN: an infinity makes all of what shares its scale NaN.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        weights: each [N, K], N and K divisible by 16, bfloat16, float16 or float32.
        biases: each [N] or None; added after the product was rounded.
        scaling: one scale for a tensor, or for each row of an operand.

    Returns:
        [..., N] for each weight, in the dtype of x (under autocast: in its). A weight's gradient has the
        dtype that its ``grad_dtype`` asks for.

    Raises:
        ValueError: dimensions that do not fit, or an unknown scaling.
    """
    if scaling not in ("tensorwise", "rowwise"):
        raise ValueError(f'scaling is {scaling!r}, expected "tensorwise" or "rowwise"')
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or not fits(weight.shape):
            raise ValueError(
                f"fp8_linears: a weight is {tuple(weight.shape)} and x {tuple(x.shape)}, expected "
                f"[N, {x.shape[-1]}] with both dimensions divisible by {MULTIPLE}"
            )
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    wanted = tuple(_gradient_dtype(weight) for weight in weights)
    results = _Linears.apply(x, scaling, dtype, wanted, *weights)
    if biases is None:
        return results
    return tuple(y if b is None else y + b.to(dtype) for y, b in zip(results, biases, strict=True))


def fits(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape [N, K] can be multiplied in 8 bits."""
    return all(size % MULTIPLE == 0 for size in shape)


def has_fp8(device: torch.device) -> bool:
    """Whether this device multiplies 8-bit floats itself; elsewhere the products are emulated, slowly."""
    return (
        device.type == "cuda"
        and torch.version.hip is None  # their formats are others
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


class Quantised(NamedTuple):
    """``values * inverse`` is about the matrix that was quantised.

    Attributes:
        values: [M, K] float8, contiguous.
        inverse: float32, of one scale for all [] or for each row [M, 1] or column [1, K].
    """

    values: Tensor
    inverse: Tensor

    def transposed(self) -> Quantised:
        return Quantised(self.values.t().contiguous(), _turned(self.inverse))


def _turned(inverse: Tensor) -> Tensor:
    """[n, 1] as [1, n] and back, with the strides of a new tensor: ``torch._scaled_mm`` looks at them."""
    return inverse.reshape(inverse.shape[::-1])


def quantise(
    x: Tensor, dtype: torch.dtype, axis: int | None = None, inverse: Tensor | None = None
) -> Quantised:
    """x [M, K] in 8 bits.

    Args:
        dtype: a float8 dtype of torch.
        axis: what a scale is shared along; None: along both.
        inverse: a scale known already, in the place of one made here.
    """
    if x.dtype == torch.float16:  # whose range the scales leave
        x = x.float()
    if inverse is None:
        largest = _largest(x, axis).float()
        ratio = torch.finfo(dtype).max / largest.clamp(min=SMALLEST)
        # without its fraction a float32 is the power of two below it
        scale = (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)
        inverse = scale.reciprocal() + 0 * largest  # NaN if that is not finite
    else:
        scale = inverse.reciprocal()
    values = (x * scale.to(x.dtype)).to(dtype).contiguous()
    return Quantised(values, inverse)


def _largest(x: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude; a NaN stays one."""
    if x.is_cuda:  # reads x once and writes nothing
        return torch.linalg.vector_norm(x, math.inf, dim=axis, keepdim=axis is not None)
    return x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)


def product(a: Quantised, b: Quantised, out_dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """a b^T in 8 bits on this device.

    Args:
        a: [M, K].
        b: [N, K]; both with one scale, or with one for each row.
        fast: allow sums of fewer bits (``use_fast_accum``): for the forward pass alone.

    Returns:
        [M, N]. Row-wise products come rounded to bfloat16 from a GPU whatever ``out_dtype`` is.
    """
    if not has_fp8(a.values.device):
        return product_reference(a, b, out_dtype)
    return _scaled_mm(a, b, out_dtype, fast)


def _scaled_mm(a: Quantised, b: Quantised, out_dtype: torch.dtype, fast: bool) -> Tensor:
    given = out_dtype if a.inverse.ndim == 0 else torch.bfloat16  # rows: no other is implemented
    out = torch._scaled_mm(
        a.values,
        b.values.t(),  # the second operand has to lie column by column
        scale_a=a.inverse,
        scale_b=_turned(b.inverse),
        out_dtype=given,
        use_fast_accum=fast,
    )
    return out.to(out_dtype)


def product_reference(a: Quantised, b: Quantised, out_dtype: torch.dtype) -> Tensor:
    """The definition: both operands as the numbers they stand for, their product with sums in float32 (for
    ``out_dtype`` float64: in that), rounded once to ``out_dtype``."""
    with torch.autocast(a.values.device.type, enabled=False):
        if out_dtype == torch.float64 or torch.compiler.is_compiling():
            wide = torch.promote_types(out_dtype, torch.float32)
            out = a.values.to(wide) @ b.values.to(wide).t()
        else:
            out = gemm.product(_bfloat16(a.values), _bfloat16(b.values).t(), out_dtype=torch.float32)
        return (out * a.inverse * b.inverse.t()).to(out_dtype)


def _bfloat16(values: Tensor) -> Tensor:
    """8-bit floats in bfloat16, exactly; by a table: torch's conversion takes 9 times as long on a CPU."""
    codes = values.view(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8, device=values.device).view(values.dtype)
    return every.to(torch.bfloat16).index_select(0, codes.flatten().int()).view(values.shape)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scaling, dtype, wanted, *weights):
        rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
        axis = None if scaling == "tensorwise" else 1
        small = quantise(rows, E4M3, axis)
        results, inverses = [], []
        for weight in weights:
            q = quantise(weight, E4M3, axis)
            results.append(product(small, q, dtype, fast=True).view(*x.shape[:-1], -1))
            inverses.append(q.inverse)
        ctx.scaling, ctx.wanted, ctx.x_dtype, ctx.x_shape = scaling, wanted, x.dtype, x.shape
        if any(ctx.needs_input_grad[4:]):
            kept = small if scaling == "tensorwise" else quantise(rows, E4M3, 0)
        else:
            kept = (None, None)
        ctx.save_for_backward(*kept, *weights, *inverses)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        values, inverse, *rest = ctx.saved_tensors
        n = len(gradients)
        weights, inverses = rest[:n], rest[n:]
        x = None if values is None else _whole_rows(Quantised(values, inverse).transposed())
        tensorwise = ctx.scaling == "tensorwise"
        d_x, d_weights = None, [None] * n
        for i, (g, weight) in enumerate(zip(gradients, weights)):
            g = g.reshape(-1, weight.shape[0])
            q = quantise(g, E5M2 if tensorwise else E4M3, None if tensorwise else 1)
            if ctx.needs_input_grad[0]:
                w = quantise(weight, E4M3, *((None, inverses[i]) if tensorwise else (0,)))
                part = product(q, w.transposed(), torch.float32 if n > 1 else ctx.x_dtype)
                d_x = part if d_x is None else d_x.add_(part)
            if ctx.needs_input_grad[4 + i]:
                q = q if tensorwise else quantise(g, E4M3, 0)
                d_weights[i] = product(_whole_rows(q.transposed()), x, ctx.wanted[i])
        if d_x is not None:
            d_x = d_x.to(ctx.x_dtype).view(ctx.x_shape)
        return d_x, None, None, None, *d_weights


def _whole_rows(q: Quantised) -> Quantised:
    """With zeros behind its rows until their length is a multiple of 16."""
    lacking = -q.values.shape[1] % MULTIPLE
    if not lacking:
        return q
    return Quantised(F.pad(q.values.view(torch.uint8), (0, lacking)).view(q.values.dtype), q.inverse)


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    """What autograd will turn the gradient into, so that it is rounded to nothing narrower before."""
    if torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.dtype
    return getattr(weight, "grad_dtype", None) or weight.dtype
