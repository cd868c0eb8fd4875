"""Tensors that are columns of one wider tensor, beside each other: such as q, k and v of a single product.

What reads them takes row strides; what makes their gradients writes these beside each other too, so that the
product's backward finds one tensor and copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def are_columns(tensors: Sequence[Tensor], trailing: int = 1) -> bool:
    """Whether the tensors lie beside each other, in their order, in rows of one storage.

    Args:
        tensors: [*rows, *columns], whose columns may differ in number.
        trailing: how many axes the columns have: 1, or 2 for heads and depth.
    """
    first = tensors[0]
    lead, place = first.dim() - trailing, first.storage_offset()
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.dim() != first.dim() or lead < 1:
            return False
        shape, strides = x.shape[lead:], x.stride()[lead:]
        adjacent = strides[-1] == 1 and (trailing == 1 or strides[0] == shape[1] or shape[0] == 1)
        if not adjacent or x.shape[:lead] != first.shape[:lead]:
            return False
        if any(a != b and n > 1 for a, b, n in zip(x.stride(), first.stride(), x.shape[:lead])):
            return False
        if x.dtype != first.dtype or x.device != first.device:
            return False
        if x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return False
        if x.storage_offset() != place:
            return False
        place += math.prod(shape)
    return first.shape[lead - 1] == 1 or first.stride(lead - 1) >= place - first.storage_offset()


def whole_of(tensors: Sequence[Tensor], trailing: int = 1) -> Tensor:
    """[*rows, all columns]: the memory of the tensors itself where they are columns of one, else a copy."""
    lead = tensors[0].dim() - trailing
    if are_columns(tensors, trailing):
        width = sum(math.prod(x.shape[lead:]) for x in tensors)
        first = tensors[0]
        size, stride = (*first.shape[:lead], width), (*first.stride()[:lead], 1)
        return first.as_strided(size, stride, first.storage_offset())
    return torch.cat([x.flatten(lead) for x in tensors], -1)


def split_columns(whole: Tensor, like: Sequence[Tensor], trailing: int = 1) -> list[Tensor]:
    """[*rows, all columns] as tensors of the shapes of ``like``."""
    lead = like[0].dim() - trailing
    parts = whole.split([math.prod(x.shape[lead:]) for x in like], -1)
    return [part.unflatten(-1, x.shape[lead:]) for part, x in zip(parts, like)]


def empty_columns(like: Sequence[Tensor], trailing: int = 1) -> list[Tensor]:
    """New tensors of the shapes and the dtype of ``like``, beside each other."""
    lead = like[0].dim() - trailing
    width = sum(math.prod(x.shape[lead:]) for x in like)
    whole = torch.empty((*like[0].shape[:lead], width), dtype=like[0].dtype, device=like[0].device)
    return split_columns(whole, like, trailing)
