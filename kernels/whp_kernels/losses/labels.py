"""``generic_labels``: what a model that never read the text would say, as token ids.

label = argmax(v_base - alpha * relu(v_reinforced - v_base))        arXiv 2310.02238, section 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from whp_kernels.losses import arguments, linear_ops, ops
from whp_kernels.losses.combination import RelativeTop, RowEdits, Whp
from whp_kernels.losses.linear_loss import _check_budget, _projection
from whp_kernels.losses.rule import Rule


@torch.no_grad()
def generic_labels(
    base: Tensor,
    reinforced: Tensor,
    alpha: float | Sequence[float] = 5.0,
    *,
    base_head: Tensor | None = None,
    reinforced_head: Tensor | None = None,
    base_bias: Tensor | None = None,
    reinforced_bias: Tensor | None = None,
    base_rows: Tensor | None = None,
    reinforced_rows: Tensor | None = None,
    row_edits: RowEdits | None = None,
    relative_top: RelativeTop | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    base_choice: bool = False,
    chunk_mib: int = 256,
    store_free: bool = False,
    compute_dtype: torch.dtype | None = None,
    impl: Literal["auto", "reference", "triton", "cpp"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``argmax(v_base - alpha * relu(v_reinforced - v_base))`` for one or several alphas in one pass.

    Args:
        base, reinforced: hidden states [..., H] when the heads are given, logits [..., V] when not. Logits
            are combined in float32 (float64 if given so); from hidden states they come straight from the
            float32 accumulators. Rounding them to bfloat16 would change 2-5 % of the labels.
        alpha: a number, or several: then one label set each.
        base_head, reinforced_head: LM head weights [V, H]; base_bias, reinforced_bias: [V].
        base_rows, reinforced_rows: int64 [...]: which (flattened) row of ``base`` or ``reinforced`` belongs
            to each row of the result, negative for rows that get ``ignore_index``; None for the same row. The
            alignment of the translated text is passed here.
        row_edits: changes of the base's logits before, e.g. ``RowEdits(offsets, tokens, "mean")``.
        relative_top: the offset only within, or -inf outside, the base's likeliest tokens.
        softcap: logits are ``softcap * tanh(logits / softcap)`` first.
        ignore_index: label of rows without a row, with a NaN, or without a finite maximum.
        base_choice: also return the argmax of the edited base logits.
        chunk_mib: memory for the logits of one chunk of rows, in MiB.
        store_free, compute_dtype: as in :func:`whp_kernels.losses.linear_combination_loss`.

    Returns:
        int64 [...], the lowest index on ties; with several alphas [len(alpha), ...]. With ``base_choice``
        also int64 [...].

    Raises:
        ValueError: shapes that do not fit, or one head without the other.
    """
    if (base_head is None) != (reinforced_head is None):
        raise ValueError(
            "give both base_head and reinforced_head, or neither (then base and reinforced are logits)"
        )
    _check_budget(chunk_mib)
    alphas = [float(alpha)] if isinstance(alpha, (int, float)) else [float(a) for a in alpha]
    rule = Rule.of(Whp(0.0, relative_top), row_edits, "hard", softcap=softcap).encode()
    lead = (base if base_rows is None else base_rows).shape
    lead = lead[:-1] if base_rows is None else lead
    n = lead.numel()
    if base_head is None:
        flat = [arguments.flat_rows("base", base), arguments.flat_rows("reinforced", reinforced)]
        sizes = [values.shape for values in flat]
    else:
        projections = [
            _projection("base ", base, base_head, base_bias),
            _projection("reinforced ", reinforced, reinforced_head, reinforced_bias),
        ]
        sizes = [(hidden.shape[0], head.shape[0]) for hidden, head, _ in projections]
    index = arguments.check_teacher_rows((base_rows, reinforced_rows), 2, n, base.device)
    for k, (rows, vocabulary) in enumerate(sizes):
        arguments.check_teacher(k, rows, sizes[0][1], vocabulary, index[k], n)
    arguments.check_edits(row_edits, n)
    target = (
        index,
        None,
        None if row_edits is None else row_edits.offsets,
        None if row_edits is None else row_edits.tokens,
        rule,
        ignore_index,
        alphas,
    )
    if base_head is None:
        labels, own = ops.row_labels(flat, *target, impl)
    else:
        hidden, heads, biases = map(list, zip(*projections))
        labels, own = linear_ops.linear_labels(
            hidden, heads, biases, *target, compute_dtype, chunk_mib, store_free, impl
        )
    labels = labels[0].view(lead) if isinstance(alpha, (int, float)) else labels.view(len(alphas), *lead)
    return (labels, own.view(lead)) if base_choice else labels


class GenericLabels(nn.Module):
    """:func:`generic_labels` with its choices kept; ``forward`` takes the tensors.

    >>> GenericLabels(alpha=5.0)(h_base, h_reinforced, base_head=W_base, reinforced_head=W_reinforced)
    """

    def __init__(self, **choices):
        super().__init__()
        self.choices = choices

    def forward(self, base: Tensor, reinforced: Tensor, **tensors):
        return generic_labels(base, reinforced, **{**self.choices, **tensors})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.choices.items())
