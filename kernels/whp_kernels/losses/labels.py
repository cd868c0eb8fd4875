"""Generic labels from hidden states or logits, without logits for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whp_kernels.losses import reference


def generic_labels(
    base: Tensor,
    reinforced: Tensor,
    alphas: Sequence[float] = (5.0,),
    *,
    base_head: Tensor | None = None,
    reinforced_head: Tensor | None = None,
    row_offsets: Tensor | None = None,
    mean_tokens: Tensor | None = None,
    ignore_index: int = -100,
    chunk_mib: int = 256,
) -> tuple[Tensor, Tensor]:
    """``argmax(v_base - alpha * relu(v_reinforced - v_base))`` for one or several alphas in one pass.

    Args:
        base, reinforced: hidden states [N, H] when the heads are given, logits [N, V] when not. Logits are
            computed and combined in float32 (float64 if given so): rounding to bfloat16 would change 2-5 % of
            the labels.
        alphas: one label set for each.
        base_head, reinforced_head: LM head weights [V, H].
        row_offsets, mean_tokens: tokens whose base logit is set to the row mean first; see
            :func:`whp_kernels.losses.reference.set_to_row_mean`.
        ignore_index: label of rows without a finite target, or with a NaN.
        chunk_mib: memory for the logits of one chunk of rows, in MiB; never more than a chunk is held.

    Returns:
        labels int64 [len(alphas), N], and the base's own choice int64 [N] (argmax of the edited base logits).

    Raises:
        ValueError: shapes that do not fit, or one head without the other.
    """
    if (base_head is None) != (reinforced_head is None):
        raise ValueError(
            "give both base_head and reinforced_head, or neither (then base and reinforced are logits)"
        )
    if base.shape[0] != reinforced.shape[0]:
        raise ValueError(f"base has {base.shape[0]} rows but reinforced has {reinforced.shape[0]}")
    n = base.shape[0]
    vocab = base.shape[1] if base_head is None else base_head.shape[0]
    other = reinforced.shape[1] if reinforced_head is None else reinforced_head.shape[0]
    if other != vocab:
        raise ValueError(f"base has a vocabulary of {vocab} but reinforced has {other}")
    if (row_offsets is None) != (mean_tokens is None):
        raise ValueError("give both row_offsets and mean_tokens, or neither")
    if row_offsets is not None and row_offsets.shape != (n + 1,):
        raise ValueError(f"row_offsets has shape {tuple(row_offsets.shape)}, expected [{n + 1}]")
    rows = max(
        1, (chunk_mib << 20) // (vocab * 4 * 5)
    )  # two sets of logits and three temporaries of their size
    labels = torch.empty((len(alphas), n), dtype=torch.int64, device=base.device)
    own = torch.empty(n, dtype=torch.int64, device=base.device)
    base_head, reinforced_head = _prepared(base_head, base), _prepared(reinforced_head, reinforced)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        v_base = _logits(base[part], base_head)
        v_reinforced = _logits(reinforced[part], reinforced_head)
        if row_offsets is not None:
            offsets = row_offsets[part.start : part.stop + 1]
            v_base = reference.set_to_row_mean(
                v_base, offsets - offsets[0], mean_tokens[offsets[0] : offsets[-1]]
            )
        own[part] = reference.generic_labels(v_base, v_base, 0.0, ignore_index)
        for k, alpha in enumerate(alphas):
            labels[k, part] = reference.generic_labels(v_base, v_reinforced, alpha, ignore_index)
    return labels, own


def _logits(rows: Tensor, head: Tensor | None) -> Tensor:
    """Float32 logits (float64 stays): from the accumulator of the product, never rounded before."""
    if head is None:
        return rows if rows.dtype == torch.float64 else rows.float()
    if head.dtype.itemsize == 2:  # on a GPU, see _prepared
        return torch.mm(rows, head.t(), out_dtype=torch.float32)
    return rows.to(head.dtype) @ head.t()


def _prepared(head: Tensor | None, rows: Tensor) -> Tensor | None:
    """The head in the dtype of its product, once for all chunks: as it is where a GPU gives float32 results
    of narrow operands, else in float32 (or float64)."""
    if head is None or (rows.is_cuda and rows.dtype == head.dtype and rows.dtype.itemsize == 2):
        return head
    return head.to(torch.promote_types(torch.promote_types(rows.dtype, head.dtype), torch.float32))
