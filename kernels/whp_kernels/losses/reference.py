"""The definitions, in eager torch: any device, any dtype; everything faster is tested against them.

target   t = v_base - alpha * relu(v_reinforced - v_base)          (arXiv 2310.02238, section 2)
label    y = argmax_v t_v, the lowest index on ties
"""

from __future__ import annotations

import torch
from torch import Tensor


def set_to_row_mean(logits: Tensor, row_offsets: Tensor, tokens: Tensor) -> Tensor:
    """Set listed tokens of each row to the mean of that row.

    Args:
        logits: [N, V], floating point.
        row_offsets: int64 [N + 1]; the tokens of row ``n`` are ``tokens[row_offsets[n]:row_offsets[n + 1]]``.
        tokens: int64 [M], vocabulary indices; repetitions do not matter.

    Returns:
        a new tensor [N, V]; the means are taken before any replacement.
    """
    rows = torch.repeat_interleave(row_offsets.diff())
    edited = logits.clone()
    edited[rows, tokens] = logits.mean(dim=-1)[rows]
    return edited


def whp_target(base: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """Combined target logits [N, V] of the base and the reinforced model's logits [N, V].

    A column that the base rules out (-inf) stays so: there the formula would give inf - inf.
    """
    target = base - alpha * torch.relu(reinforced - base)
    return torch.where(torch.isneginf(base) & ~torch.isnan(reinforced), base, target)


def generic_labels(base: Tensor, reinforced: Tensor, alpha: float, ignore_index: int = -100) -> Tensor:
    """int64 [N]: argmax of the target; ``ignore_index`` for rows without a finite value or with a NaN."""
    target = whp_target(base, reinforced, alpha)
    labels = target.argmax(dim=-1)
    usable = torch.isfinite(target).any(dim=-1) & ~torch.isnan(target).any(dim=-1)
    return torch.where(usable, labels, ignore_index)
