"""Matrix products whose results are wider than their operands, without a rounding in between.

Logits in bfloat16 change 2-5 % of the labels of "Who's Harry Potter?" and put 6-14 % error on the gradient of
its soft loss, so the fused linear losses need float32 logits of bfloat16 operands. Every processor has them
in the accumulators of its product; the question is only who hands them out:

    operands                 on                           product
    bfloat16 or float16      CUDA                         torch.mm(out_dtype=torch.float32)
    bfloat16                 CPU with AVX-512 BF16        whp_kernels_C::mm_bf16_f32_ (csrc/cpu/gemm.cpp)
    any other narrow ones    anywhere                     float32 copies of them, a piece at a time

All three give the same numbers up to the order of the sums: a product of two bfloat16 or float16 numbers is
exact in float32. On two cores of Zen 5, 1024 x 1024 by 1024 x 32000, the operator gave 680 GFLOP/s, torch's
bfloat16 product (whose results are rounded to bfloat16) 650, its float32 product 180.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from whp_kernels import extension

NARROW = (torch.bfloat16, torch.float16)
PIECE_ELEMENTS = 1 << 24
"""Elements of both operands that are copied to a wider dtype at a time: 64 MiB in float32."""


@torch.no_grad()
def product(
    a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """``a @ b`` from sums in ``out_dtype`` or wider; with ``accumulate`` added to ``out``.

    Autograd does not see it: it is meant for the insides of functions with a backward of their own.

    The CPU operator takes subnormal operands and sums for zero. With it, a row of the result depends neither
    on the other rows nor on the number of threads, bit for bit.

    Args:
        a: [M, K], any strides (also a transpose: nothing is copied as a whole).
        b: [K, N], any strides.
        out_dtype: at least as wide as both operands. If it is their own dtype, this is torch's product.
        out: [M, N] of ``out_dtype``, where the result goes: adjacent columns, any distance between rows, no
            memory shared with ``a`` or ``b``.
        accumulate: add to ``out`` instead of overwriting it.

    Returns:
        ``out``, or a new tensor [M, N].

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or ``accumulate`` without ``out``.
    """
    _check(a, b, out_dtype, out, accumulate)
    direct = out_dtype == torch.float32 and a.dtype == b.dtype and from_accumulator(a.dtype, a.device)
    if out is None:
        if direct and a.is_cuda:
            return torch.mm(a, b, out_dtype=out_dtype)
        out = torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype, device=a.device)
    if direct and a.is_cuda:
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=out_dtype, out=out)
        return torch.mm(a, b, out_dtype=out_dtype, out=out)
    if direct:
        torch.ops.whp_kernels_C.mm_bf16_f32_(out, a, b, accumulate)
        torch.autograd.graph.increment_version(out)  # an operator without autograd does not
        return out
    if a.dtype == b.dtype == out_dtype:
        return _torch_product(a, b, out, accumulate)
    return _copied_product(a, b, out, accumulate)


def from_accumulator(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether float32 products of two operands of ``dtype`` need no float32 copies of them on ``device``."""
    if device.type == "cuda":
        return dtype in NARROW
    return device.type == "cpu" and dtype == torch.bfloat16 and _has_cpu_operator()


@functools.cache
def _has_cpu_operator() -> bool:
    return extension.load() is not None and torch.ops.whp_kernels_C.has_avx512_bf16()


def _torch_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)


def _copied_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """The product of copies in the dtype of ``out``, halved along its longest side until they are small."""
    (m, k), n = a.shape, b.shape[1]
    if (m + n) * k <= PIECE_ELEMENTS:
        return _torch_product(a.to(out.dtype), b.to(out.dtype), out, accumulate)
    longest = max(m, k, n)
    first, second = slice(0, longest // 2), slice(longest // 2, longest)
    for half in (first, second):
        if longest == k:
            _copied_product(a[:, half], b[half], out, accumulate or half is second)
        elif longest == n:
            _copied_product(a, b[:, half], out[:, half], accumulate)
        else:
            _copied_product(a[half], b, out[half], accumulate)
    return out


def _check(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"product: expected a [M, K] and b [K, N], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    for dtype in (a.dtype, b.dtype):
        if torch.promote_types(dtype, out_dtype) != out_dtype:
            raise ValueError(f"product: operands of {dtype} cannot give {out_dtype}, give a wider out_dtype")
    if out is None:
        if accumulate:
            raise ValueError("product: accumulate adds to out, but no out is given")
        return
    shape = (a.shape[0], b.shape[1])
    if out.shape != shape or out.dtype != out_dtype:
        raise ValueError(
            f"product: out is {tuple(out.shape)} of {out.dtype}, expected {shape} of {out_dtype}"
        )
    if (shape[1] > 1 and out.stride(1) != 1) or (shape[0] > 1 and out.stride(0) < shape[1]):
        raise ValueError(
            f"product: out has strides {out.stride()}, but its columns must be adjacent and its rows apart"
        )
