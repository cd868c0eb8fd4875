"""A step on GPUs: one launch of one Triton kernel a parameter, one pass over its memory.

The bits are those of the reference: fused multiply-adds only where it has them, division and square root
rounded to nearest, bfloat16 by integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whp_kernels.losses.triton.launch import Launch
from whp_kernels.optim.moments import BLOCK
from whp_kernels.optim.update import Numbers, Tensors

_TILE, _WARPS = 1, 4  # blocks of 1024 elements a program: 8 elements a lane


def update(tensors: Tensors, numbers: Numbers) -> None:
    """One step of one parameter, in place; see ``update.py``."""
    adamw_launch(tensors, numbers).run(tensors.weights.device)


def adamw_launch(tensors: Tensors, numbers: Numbers) -> Launch:
    """What :func:`update` runs."""
    coded = tensors.exp_avg.dtype == torch.int8
    rows, columns = tensors.weights.shape if coded else (1, tensors.weights.numel())
    across = triton.cdiv(columns, BLOCK)
    arguments = {
        "p_weights": _integers(tensors.weights),
        "p_remainder": tensors.remainder,
        "p_gradient": _integers(tensors.gradient),
        "p_m": _integers(tensors.exp_avg),
        "p_v": _integers(tensors.exp_avg_sq),
        "p_m_scale": tensors.exp_avg_scale,
        "p_v_scale": tensors.exp_avg_sq_scale,
        "p_grad_scale": tensors.grad_scale,
        **{name: getattr(numbers, name) for name in Numbers._fields[:7]},
        "key": numbers.key,
        "first": ((tensors.first + 2**31) % 2**32) - 2**31,  # as int32
        "columns": columns,
        "across": across,
        "blocks": rows * across,
        "FROM_GRADIENT": numbers.from_gradient,
        "MOMENTS": "int8" if coded else str(tensors.exp_avg.dtype).removeprefix("torch."),
        "TILE": _TILE,
        "BLOCK": BLOCK,
    }
    grid = (triton.cdiv(rows * across, _TILE),)
    return Launch(adamw_kernel, grid, arguments, _WARPS, fp_fusion=False)


def _integers(tensor: Tensor) -> Tensor:
    """bfloat16 as its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit(do_not_specialize=["key", "first"])
def adamw_kernel(
    p_weights,
    p_remainder,
    p_gradient,
    p_m,
    p_v,
    p_m_scale,
    p_v_scale,
    p_grad_scale,
    decay,
    weight,
    beta2,
    share2,
    correction,
    eps,
    rate,
    key,
    first,
    columns,
    across,
    blocks,
    FROM_GRADIENT: tl.constexpr,
    MOMENTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = (i_block % across * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    o_x = (i_block // across)[:, None] * columns + column
    m_block = i_block < blocks
    m_x = m_block[:, None] & (column < columns)

    b_g = _read(p_gradient + o_x, m_x)
    if p_grad_scale is not None:
        b_g = b_g * tl.load(p_grad_scale)
    if p_remainder is not None:
        b_high = tl.load(p_weights + o_x, mask=m_x, other=0).to(tl.int32) << 16
        b_w = (b_high + tl.load(p_remainder + o_x, mask=m_x, other=0).to(tl.int32)).to(
            tl.float32, bitcast=True
        )
    else:
        b_w = tl.load(p_weights + o_x, mask=m_x, other=0.0)
    if MOMENTS == "int8":
        b_unit = tl.div_rn(tl.load(p_m_scale + i_block, mask=m_block, other=0.0), 1984.0)
        b_root_unit = tl.div_rn(tl.load(p_v_scale + i_block, mask=m_block, other=0.0), 4032.0)
        b_code = tl.load(p_m + o_x, mask=m_x, other=0).to(tl.int32)
        b_m = _value(tl.abs(b_code), 4) * b_unit[:, None]
        b_m = tl.where(b_code < 0, -b_m, b_m)
        b_root = _value(tl.load(p_v + o_x, mask=m_x, other=0).to(tl.int32), 5) * b_root_unit[:, None]
        b_v = b_root * b_root
    else:
        b_m, b_v = _read(p_m + o_x, m_x), _read(p_v + o_x, m_x)

    b_w = b_w * decay
    b_m = tl.fma(tl.full([TILE, BLOCK], weight, tl.float32), b_g - b_m, b_g if FROM_GRADIENT else b_m)
    b_v = tl.fma(b_g * share2, b_g, b_v * beta2)
    b_root = tl.sqrt_rn(b_v)
    b_correction = tl.full([TILE, BLOCK], correction, tl.float32)
    b_w = b_w + tl.div_rn(b_m * rate, tl.div_rn(b_root, b_correction) + eps)

    if p_remainder is not None:
        b_bits = b_w.to(tl.int32, bitcast=True)
        tl.store(p_weights + o_x, ((b_bits + 0x8000) >> 16).to(tl.int16), mask=m_x)
        tl.store(p_remainder + o_x, b_bits.to(tl.int16), mask=m_x)
    else:
        tl.store(p_weights + o_x, b_w, mask=m_x)
    if MOMENTS == "float32":
        tl.store(p_m + o_x, b_m, mask=m_x)
        tl.store(p_v + o_x, b_v, mask=m_x)
    else:
        b_random = _random(key, first, o_x)
        if MOMENTS == "bfloat16":
            tl.store(p_m + o_x, _rounded(b_m, b_random), mask=m_x)
            tl.store(p_v + o_x, _rounded(b_v, b_random >> 16), mask=m_x)
        else:
            b_magnitude = tl.abs(b_m)
            b_scale, b_per_unit = _scale(b_magnitude, 1984.0)
            b_code = _code(b_magnitude * b_per_unit[:, None], b_random, 4)
            tl.store(p_m + o_x, tl.where(b_m < 0, -b_code, b_code).to(tl.int8), mask=m_x)
            tl.store(p_m_scale + i_block, b_scale, mask=m_block)
            b_scale, b_per_unit = _scale(b_root, 4032.0)
            b_code = _code(b_root * b_per_unit[:, None], b_random >> 14, 5)
            b_positive = (b_root > 0) & (b_scale > 0)[:, None]
            tl.store(p_v + o_x, tl.where(b_positive & (b_code == 0), 1, b_code).to(tl.uint8), mask=m_x)
            tl.store(p_v_scale + i_block, b_scale, mask=m_block)


@triton.jit
def _read(p, m):
    """float32, or bfloat16 as int16, as float32."""
    if p.dtype.element_ty == tl.int16:
        return (tl.load(p, mask=m, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(p, mask=m, other=0.0)


@triton.jit
def _random(key, first, o_x):
    x = (o_x.to(tl.uint32) + first.to(tl.uint32, bitcast=True)) ^ key.to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, random):
    """The bits of bfloat16, as int16, up or down by the lowest 16 bits of ``random``."""
    bits = (x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
    return tl.where(x != x, 0x7FC0, bits.to(tl.int32)).to(tl.int16)


@triton.jit
def _value(code, mantissa: tl.constexpr):
    """Units of the scale that a code stands for; see ``moments.Map``."""
    linear: tl.constexpr = 1 << mantissa
    bias: tl.constexpr = ((127 + mantissa) << mantissa) - linear
    upper = ((code + bias) << (23 - mantissa)).to(tl.float32, bitcast=True)
    return tl.where(code < linear, code.to(tl.float32), upper)


@triton.jit
def _code(t, random, mantissa: tl.constexpr):
    linear: tl.constexpr = 1 << mantissa
    dropped: tl.constexpr = 23 - mantissa
    bias: tl.constexpr = ((127 + mantissa) << mantissa) - linear
    low = random & ((1 << dropped) - 1)
    upper = ((t.to(tl.uint32, bitcast=True) + low) >> dropped).to(tl.int32) - bias
    small = t < linear
    unit = ((tl.where(small, t, 0.0) * (1 << dropped)).to(tl.int32) + low.to(tl.int32)) >> dropped
    return tl.minimum(tl.where(small, unit, upper), 8 * linear - 1)


@triton.jit
def _scale(magnitude, top):
    """The scale of each block and its reciprocal in units; the maximum of bits is NaN where there is one."""
    scale = tl.max(magnitude.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    scale = tl.where(scale < 7.888609052210118e-31, 0.0, scale)  # 2^-100
    return scale, tl.where(scale == 0, 0.0, tl.div_rn(tl.full(scale.shape, top, tl.float32), scale))
