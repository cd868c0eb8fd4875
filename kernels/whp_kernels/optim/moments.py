"""How AdamW's two moments are kept: float32, bfloat16 or 8 bits. The definition, in eager torch.

**Rounding is stochastic** in bfloat16 and in 8 bits: up or down with the probabilities that keep the mean (in
8 bits that of the second moment's root, which is what Adam divides by). To nearest, a moment stands still
where a step changes it by less than half a unit in its last place (bfloat16: 2^-9 to 2^-8 of it). A first
moment (beta1 = 0.9) would stop 2 to 4 % before a constant gradient, a second one 10 to 20 % before its square
at beta2 = 0.98, and from 0.998 on it would never fall; in 8 bits (half a unit of the root: 0.8 to 1.6 %)
about half of the values would not fall at 0.98. The random bits are a hash of (step, number of the parameter
in the optimizer, place of the element in the whole parameter): the same on every device, however the
parameter is sharded, and after a restart.

**8 bits.** Blocks of 1024 columns of a row (fewer at its end; never across rows, so sharding along
dimension 0 changes nothing) share a float32 scale: the largest magnitude of the first moment, the largest
square root of the second. A code is a small floating-point number in units of the scale:

    first moment, int8          sign, 3 bits of exponent, 4 of mantissa     0 ... 1984 = the scale
    second moment's root, uint8       3 bits of exponent, 5 of mantissa     0 ... 4032 = the scale

so that an element is relatively precise over two orders of magnitude below the largest of its block (four for
the second moment itself), which Adam needs: its step is the quotient of the two. Error of a stored element:

    |m' - m|             <= max(|m| / 16, scale / 1984)
    |sqrt(v') - sqrt(v)| <= max(sqrt(v) / 32, scale / 4032)

(and a few units of float32). A positive second moment is never stored as 0: the step would be divided by eps.
Blocks whose scale is below 2^-100 are stored as zeros.
Scales of 1024 columns in the place of 256 take 0.16 GB less for 7e9 weights, and the error of the weights'
move grows from 2.0 to 2.2 % of it (``benchmarks/small_updates.py``; with rows of 4096 columns 2.2 to 2.9 %).

The forms follow the block-wise 8-bit optimizers of Dettmers et al. (arXiv 2110.02861); the map is another.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FORMATS = ("float32", "bfloat16", "int8")
BLOCK = 1024
"""Columns that share a scale."""
SMALLEST = 4096
"""Parameters with fewer elements, and those with one dimension, keep float32 moments."""
TINY = 2.0**-100
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Map:
    """Codes of magnitudes: floating-point numbers with 3 bits of exponent, gradual towards 0.

    Attributes:
        mantissa: bits of it.
        dropped: bits of a float32 mantissa that a code has not.
        linear: codes below this (2^mantissa) stand for themselves.
        largest: the largest code.
        top: what the largest code stands for; 1 stands for 1.
        bias: what the upper bits of a float32 number exceed its code by.
    """

    mantissa: int

    @property
    def dropped(self) -> int:
        return 23 - self.mantissa

    @property
    def linear(self) -> int:
        return 1 << self.mantissa

    @property
    def largest(self) -> int:
        return 8 * self.linear - 1

    @property
    def top(self) -> float:
        return float((2 * self.linear - 1) << 6)

    @property
    def bias(self) -> int:
        return ((127 + self.mantissa) << self.mantissa) - self.linear


FIRST, SECOND = Map(4), Map(5)


def format_of(moments: str, shape: Sequence[int]) -> str:
    """The format of a parameter whose whole (not sharded) shape is ``shape``."""
    small = len(shape) < 2 or torch.Size(shape).numel() < SMALLEST
    return "float32" if small else moments


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a parameter (or shard along dimension 0) of ``shape``."""
    return (*shape[:-1], -(-shape[-1] // BLOCK))


# --------------------------------------------------------------------------------------------- random bits


def key_of(step: int, number: int) -> int:
    """The key of a parameter's random bits at a step, as int32: it is an argument of kernels."""
    x = _mixed((step * 0x9E3779B1) & _MASK) ^ ((number * 0x85EBCA77) & _MASK)
    return struct.unpack("i", struct.pack("I", _mixed(x)))[0]


def random_bits(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """32 random bits each, int64 [count], for the elements from number ``first`` of the parameter on."""
    index = torch.arange(first, first + count, device=device)
    return _mixed((index & _MASK) ^ (key & _MASK))


def _mixed(x):
    """32 bits to 32 bits (https://github.com/skeeto/hash-prospector, lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - (1 << 32))) & _MASK  # negative: the product fits into 64 bits
    return x ^ (x >> 16)


# -------------------------------------------------------------------------------------------------- bfloat16


def to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16, up or down by the lowest 16 bits of ``random`` (int64, the same shape)."""
    bits = (x.view(torch.int32).to(torch.int64) & _MASK) + (random & 0xFFFF)
    high = torch.where(x.isnan(), 0x7FC0, bits >> 16)  # a NaN could leave 32 bits
    return _as_int16(high).view(torch.bfloat16)


def _as_int16(bits: Tensor) -> Tensor:
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16)


# ---------------------------------------------------------------------------------------------------- 8 bits


def encode_first(m: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [R, C] and scales float32 [R, B] of a first moment [R, C], float32."""
    codes, scale = _encode(m.abs(), random, FIRST)
    return torch.where(m < 0, -codes, codes).to(torch.int8), scale


def decode_first(codes: Tensor, scale: Tensor) -> Tensor:
    """The first moment float32 [R, C] of its codes and scales."""
    wide = codes.to(torch.int32)
    values = _decode(wide.abs(), scale, FIRST)
    return torch.where(wide < 0, -values, values)


def encode_second(root: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, C] and scales float32 [R, B] of the square roots [R, C] of a second moment, float32."""
    codes, scale = _encode(root, random, SECOND)
    kept = (root > 0) & (_spread(scale, root.shape[1]) > 0)
    return torch.where(kept, codes.clamp_min(1), codes).to(torch.uint8), scale


def decode_second(codes: Tensor, scale: Tensor) -> Tensor:
    """The second moment float32 [R, C] of its codes and scales."""
    root = _decode(codes.to(torch.int32), scale, SECOND)
    return root * root


def _encode(magnitude: Tensor, random: Tensor, kind: Map) -> tuple[Tensor, Tensor]:
    columns = magnitude.shape[1]
    padded = F.pad(magnitude, (0, -columns % BLOCK))
    scale = padded.unflatten(1, (-1, BLOCK)).amax(2)
    scale = torch.where(scale < TINY, 0.0, scale)
    per_unit = torch.where(scale == 0, 0.0, kind.top / scale)
    t = magnitude * _spread(per_unit, columns)
    low = random & ((1 << kind.dropped) - 1)
    upper = ((t.view(torch.int32).to(torch.int64) + low) >> kind.dropped) - kind.bias
    linear = t < kind.linear
    unit = ((torch.where(linear, t, 0.0) * (1 << kind.dropped)).to(torch.int64) + low) >> kind.dropped
    return torch.where(linear, unit, upper).clamp_max(kind.largest), scale


def _decode(codes: Tensor, scale: Tensor, kind: Map) -> Tensor:
    upper = ((codes + kind.bias) << kind.dropped).view(torch.float32)
    values = torch.where(codes < kind.linear, codes.to(torch.float32), upper)
    return values * _spread(scale / kind.top, codes.shape[1])


def _spread(scale: Tensor, columns: int) -> Tensor:
    """Each block's number for each of its columns."""
    return scale.repeat_interleave(BLOCK, 1)[:, :columns]
