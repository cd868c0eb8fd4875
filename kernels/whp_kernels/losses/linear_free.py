"""The mode of least memory behind the signatures of :mod:`whp_kernels.losses.linear_chunks`.

No [rows, V] tensor exists, not even for a chunk: logits live for a tile of the vocabulary, and the gradients
compute them again. Eager tiles (:mod:`whp_kernels.losses.store_free`), or GEMM tiles with the loss in their
epilogue on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from whp_kernels.losses import dispatch, store_free
from whp_kernels.losses.linear_chunks import LinearGradients
from whp_kernels.losses.linear_rows import LinearRows, Projection
from whp_kernels.losses.reference import softcapped
from whp_kernels.losses.rows import RowLosses
from whp_kernels.losses.rule import Rule


def losses_and_gradients(
    rows: LinearRows,
    *,
    statistics: bool,
    row_scale: Tensor | None,
    needs: tuple[bool, bool, bool],
    token_set: Tensor | None,
    compute_dtype: torch.dtype | None,
    chunk_mib: int,
    impl: str,
) -> tuple[RowLosses, Tensor | None, LinearGradients]:
    """As :func:`whp_kernels.losses.linear_chunks.losses_and_gradients`; ``chunk_mib`` bounds the tiles."""
    hidden_dtype = rows.hidden.dtype
    rows = _in_dtype(rows, compute_dtype)
    module, tile = _implementation(rows, impl), _tile(rows, chunk_mib)
    per_row, state = module.losses(rows, statistics=statistics, tile=tile)
    gradients = (None, None, None)
    if any(needs):
        gradients = module.gradients(
            rows,
            state,
            row_scale,
            needs_hidden=needs[0],
            needs_weight=needs[1],
            needs_bias=needs[2],
            tile=tile,
        )
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        d_hidden = d_hidden.to(torch.float32 if hidden_dtype == torch.float16 else hidden_dtype)
    probability = None
    if token_set is not None:
        probability = _token_set_probability(rows, token_set, module, tile)
    return per_row, probability, LinearGradients(d_hidden, d_weight, d_bias)


def row_labels(
    rows: LinearRows,
    weights: Sequence[float],
    *,
    compute_dtype: torch.dtype | None,
    chunk_mib: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`whp_kernels.losses.linear_chunks.row_labels`."""
    rows = _in_dtype(rows, compute_dtype)
    return _implementation(rows, impl).row_labels(rows, weights, tile=_tile(rows, chunk_mib))


def _implementation(rows: LinearRows, impl: str) -> ModuleType:
    """The GEMM tiles in Triton where they run, eager tiles elsewhere (there is no compiled version for
    CPUs)."""
    if impl == "triton" or (impl == "auto" and rows.device.type == "cuda" and rows.dtype != torch.float64):
        reason = dispatch.backends()["triton"]
        if reason == "available":
            from whp_kernels.losses.triton import linear_loss

            return linear_loss
        if impl == "triton":
            raise ValueError(f"impl='triton' is not available: {reason}")
    if impl in ("cpp", "cuda"):
        raise ValueError(f"store_free has the implementations 'reference' and 'triton', not {impl!r}")
    return store_free


def _tile(rows: LinearRows, chunk_mib: int) -> int:
    """Columns of a tile: a dozen temporaries of [1024 rows, tile] in the budget; at least 128, at most
    4096."""
    columns = (chunk_mib << 20) // (12 * min(max(1, rows.count), store_free.ROW_BLOCK) * rows.dtype.itemsize)
    return int(min(4096, max(128, columns // 128 * 128)))


def _in_dtype(rows: LinearRows, compute_dtype: torch.dtype | None) -> LinearRows:
    def projection(model: Projection) -> Projection:
        dtype = compute_dtype or torch.promote_types(model.hidden.dtype, model.weight.dtype)
        return Projection(model.hidden.to(dtype), model.weight.to(dtype), model.bias)

    student = None if rows.hidden is None else projection(rows.student)
    teachers = tuple(
        student if student is not None and teacher.same_as(rows.student) else projection(teacher)
        for teacher in rows.teachers
    )
    if student is None:
        return dataclasses.replace(rows, teachers=teachers)
    return dataclasses.replace(rows, hidden=student.hidden, weight=student.weight, teachers=teachers)


def _token_set_probability(rows: LinearRows, token_set: Tensor, module: ModuleType, tile: int) -> Tensor:
    """[n]; the loss for the set's likeliest token gives the log-sum-exp, for one more pass over the
    vocabulary."""
    if not token_set.numel():
        return rows.hidden.new_zeros(rows.count, dtype=torch.float32)
    picked = rows.hidden.to(rows.dtype) @ rows.weight[token_set].to(rows.dtype).t()
    if rows.bias is not None:
        picked = picked + rows.bias[token_set].to(rows.dtype)
    highest, position = softcapped(picked, rows.rule.softcap).max(dim=-1)
    plain = dataclasses.replace(
        rows,
        teachers=(),
        labels=token_set.long()[position],
        edit_offsets=None,
        edit_tokens=None,
        rule=Rule(divergence="label", softcap=rows.rule.softcap),
    )
    log_sum_exp = module.losses(plain, statistics=False, tile=tile)[0].losses + highest
    probability = (softcapped(picked, rows.rule.softcap) - log_sum_exp.unsqueeze(1)).exp().sum(-1)
    return torch.where(torch.isneginf(highest), 0.0, probability)
