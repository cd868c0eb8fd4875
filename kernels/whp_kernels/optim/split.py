"""A float32 number as a bfloat16 one and the 16 bits that are missing.

The bfloat16 half is the number rounded to nearest (ties away from zero), not cut: it is what the matrix
products see. The other half is the signed distance of the bit patterns, which always fits into 16 bits:

    high = (bits + 0x8000) >> 16        low = bits as int16 (its lowest 16 bits)
    bits = (high << 16) + low           both modulo 2^32

It holds for every bit pattern, also of infinities, NaN and numbers that round to infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 half and the int16 remainder of a float32 tensor of any shape."""
    if master.dtype != torch.float32:
        raise ValueError(f"split takes float32, got {master.dtype}")
    bits = master.view(torch.int32)
    high = (bits >> 16) + ((bits >> 15) & 1)  # 32768 where the sum leaves 16 bits
    return _lowest_16(high).view(torch.bfloat16), _lowest_16(bits)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor of which :func:`split` made ``high`` (bfloat16) and ``low`` (int16)."""
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        raise ValueError(f"join takes bfloat16 and int16, got {high.dtype} and {low.dtype}")
    low = low.to(torch.int32)
    upper = high.view(torch.int16).to(torch.int32) - (low < 0).to(torch.int32)
    return ((upper << 16) | (low & 0xFFFF)).view(torch.float32)


def _lowest_16(bits: Tensor) -> Tensor:
    """The lowest 16 bits as int16, by arithmetic that never leaves int32."""
    return (((bits & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)
