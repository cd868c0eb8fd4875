"""A step in eager torch: the definition, on any device that has float64."""

from __future__ import annotations

import torch
from torch import Tensor

from whp_kernels.optim import moments
from whp_kernels.optim.split import join, split
from whp_kernels.optim.update import Numbers, Tensors

PIECE_ELEMENTS = 1 << 20
"""Elements at a time: it takes about 100 bytes of temporary memory for each."""


def update(tensors: Tensors, numbers: Numbers) -> None:
    """One step of one parameter, in place; see ``update.py``."""
    for piece in tensors.pieces(PIECE_ELEMENTS):
        _update(piece, numbers)


def _update(p: Tensors, n: Numbers) -> None:
    g = p.gradient.to(torch.float32)
    if p.grad_scale is not None:
        g = g * p.grad_scale
    w = p.weights if p.remainder is None else join(p.weights, p.remainder)
    m, v = _load(p)

    w = w * n.decay
    m = fma(torch.full_like(g, n.weight), g - m, g if n.from_gradient else m)
    v = fma(g * n.share2, g, v * n.beta2)
    root = square_root(v)
    w = w + (m * n.rate) / (root / n.correction + n.eps)

    _store(p, n, m, v, root)
    if p.remainder is None:
        p.weights.copy_(w)
    else:
        high, low = split(w)
        p.weights.copy_(high)
        p.remainder.copy_(low)


def _load(p: Tensors) -> tuple[Tensor, Tensor]:
    if p.exp_avg.dtype == torch.int8:
        first = moments.decode_first(p.exp_avg, p.exp_avg_scale)
        return first, moments.decode_second(p.exp_avg_sq, p.exp_avg_sq_scale)
    return p.exp_avg.to(torch.float32), p.exp_avg_sq.to(torch.float32)


def _store(p: Tensors, n: Numbers, m: Tensor, v: Tensor, root: Tensor) -> None:
    if p.exp_avg.dtype == torch.float32:
        p.exp_avg.copy_(m)
        p.exp_avg_sq.copy_(v)
        return
    random = moments.random_bits(n.key, p.first, m.numel(), m.device).view_as(m)
    if p.exp_avg.dtype == torch.bfloat16:
        p.exp_avg.copy_(moments.to_bfloat16(m, random))
        p.exp_avg_sq.copy_(moments.to_bfloat16(v, random >> 16))
        return
    for codes, scale, (new_codes, new_scale) in (
        (p.exp_avg, p.exp_avg_scale, moments.encode_first(m, random)),
        (p.exp_avg_sq, p.exp_avg_sq_scale, moments.encode_second(root, random >> 14)),
    ):
        codes.copy_(new_codes)
        scale.copy_(new_scale)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd there (the last bit is set where it is not
    exact), after which rounding to float32 gives what one rounding would have given (Boldo and Melquiond,
    2008). ``torch.addcmul`` and ``torch.lerp`` round once on some devices and twice on others.
    """
    product, wide = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = product + wide
    part = total - product
    error = (product - (total - part)) + (wide - part)
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)  # of the bits, to where the exact sum lies
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, bits + towards, bits).view(torch.float64).to(torch.float32)


def square_root(x: Tensor) -> Tensor:
    """The square root of a float32 tensor, rounded to nearest, by way of float64.

    ``torch.sqrt`` is off by a unit in the last place for a fifth of all float32 numbers where it calls MKL.
    """
    return x.to(torch.float64).sqrt().to(torch.float32)
