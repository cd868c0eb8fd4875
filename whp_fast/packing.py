"""Sequences laid after each other: no padding, and no position that is computed for nothing.

A packed batch is one row of tokens, ``[tokens]``, and a :class:`Packing` that says where each sequence of it
begins. All of it is known on the host before anything is sent to the device, so nobody ever asks the device
for a length.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the sequences of a packed batch begin.

    Attributes:
        lengths: of the sequences, on the host.
        cu_seqlens: int32 [n + 1]: where each begins, and where the last one ends.
        position_ids: int64 [tokens]: the place of each token in its own sequence.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor = field(repr=False)
    position_ids: Tensor = field(repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        """Of sequences of these lengths, on the CPU.

        Raises:
            ValueError: a negative length, or more tokens than int32 counts.
        """
        counts = np.asarray(lengths, dtype=np.int64).reshape(-1)
        ends = np.concatenate([[0], np.cumsum(counts)])
        if (counts < 0).any() or ends[-1] > np.iinfo(np.int32).max:
            raise ValueError(f"lengths are {list(lengths)}: none may be below 0, their sum below 2^31")
        places = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
        return cls(tuple(counts.tolist()), torch.from_numpy(ends.astype(np.int32)), torch.from_numpy(places))

    @classmethod
    def uniform(cls, count: int, length: int, device: torch.device | str = "cpu") -> Packing:
        """Of ``count`` sequences of one length; made on the device, nothing is sent there."""
        ends = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        return cls((length,) * count, ends, torch.arange(length, device=device).repeat(count))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return self.starts[-1]

    @functools.cached_property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Of each sequence its first token's place in the batch, and last the number of all tokens."""
        return tuple(itertools.accumulate(self.lengths, initial=0))

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, sequences, length) of neighbours of one length; those of length 0 are left out."""
        found, at = [], 0
        for length, group in itertools.groupby(self.lengths):
            count = sum(1 for _ in group)
            if length:
                found.append((at, count, length))
            at += count * length
        return tuple(found)

    def pin(self) -> Packing:
        """The same in page-locked memory, from where copies to a GPU do not wait."""
        return Packing(self.lengths, self.cu_seqlens.pin_memory(), self.position_ids.pin_memory())

    def to(self, device: torch.device | str) -> Packing:
        """The same on a device; from page-locked memory the copy is not waited for."""
        return Packing(
            self.lengths,
            self.cu_seqlens.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
        )


def pack(rows: Sequence[np.ndarray]) -> tuple[Tensor, Packing]:
    """Rows of token ids after each other.

    Args:
        rows: integer arrays [length], of any width of integers.

    Returns:
        input_ids int64 [tokens], and where the rows are; both on the CPU.
    """
    packing = Packing.of([len(row) for row in rows])
    ids = np.empty(packing.tokens, dtype=np.int64)
    for start, row in zip(packing.starts, rows):
        ids[start : start + len(row)] = row
    return torch.from_numpy(ids), packing
