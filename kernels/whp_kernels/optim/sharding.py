"""What a parameter is on this process: a plain tensor, or the local shard of a DTensor and its place."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    # whoever has a DTensor has imported its module, which is slow to import
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The tensor, or this process's shard of it; the same memory, without autograd."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """Where the local shard starts along dimension 0 of the whole tensor.

    Raises:
        ValueError: sharded along another dimension, twice, or by another rule than ``torch.chunk``'s.
    """
    if not is_sharded(tensor):
        return 0
    shards = [(i, placed) for i, placed in enumerate(tensor.placements) if not placed.is_replicate()]
    if not shards:
        return 0
    dimension, placement = shards[0]
    if len(shards) > 1 or type(placement).__name__ != "Shard" or placement.dim != 0:
        raise ValueError(
            f"a parameter has the placements {tensor.placements}; AdamW takes replicated parameters and "
            "those sharded along dimension 0 by one dimension of the mesh"
        )
    rows, parts = tensor.shape[0], tensor.device_mesh.size(dimension)
    chunk = -(-rows // parts)
    dimension_rank = tensor.device_mesh.get_local_rank(dimension)
    start = min(dimension_rank * chunk, rows)
    expected, found = min(chunk, rows - start), tensor.to_local().shape[0]
    if found != expected:
        raise ValueError(
            f"the shard of {rows} rows on process {dimension_rank} of {parts} has {found} rows, "
            f"expected {expected}"
        )
    return start
