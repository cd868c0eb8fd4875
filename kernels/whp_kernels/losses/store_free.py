"""The family from hidden states in the least memory, in eager torch: any device, float64 as well.

No [n, V] tensor ever exists, neither for the batch nor for a part of its rows: logits live for one tile of
the vocabulary and one block of rows. The forward pass goes over the vocabulary once and keeps running sums
(:mod:`whp_kernels.losses.online`); the gradients compute the tiles anew. Numbers are those of
``reference.row_losses`` on the logits.

    passes over the vocabulary               forward    gradients
    label, hard, cross-entropy, KL              1           1
    jsd (its mixture needs both sums first)     2           1
    relative_top (the first teacher's maximum)  + 1 for the first teacher
    edit "mean" with softcap                    + 1 for the first teacher
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whp_kernels.gemm import from_accumulator, product
from whp_kernels.losses.linear_rows import LinearRows, LinearState, Projection, Row, float16_scale
from whp_kernels.losses.online import Best, Sum, loss_and_entropy, merged, nothing, sums_of_tile, weighted
from whp_kernels.losses.reference import softcapped, target_logits
from whp_kernels.losses.rows import RowLosses

ROW_BLOCK = 1024  # rows whose logits exist at a time; a tile's dozen temporaries are [ROW_BLOCK, tile] each


def losses(rows: LinearRows, *, statistics: bool, tile: int = 2048) -> tuple[RowLosses, LinearState]:
    """The loss of each row, and what :func:`gradients` needs.

    Args:
        rows: at least the student; see :class:`whp_kernels.losses.linear_rows.LinearRows`.
        statistics: also the argmax of the student, and of the target in soft divergences.
        tile: columns of the vocabulary whose logits exist at a time.
    """
    rule, n, device = rows.rule, rows.count, rows.device
    state = _new_state(rows, tile)
    sums = nothing(n, rows.dtype, device)
    soft, label = rule.soft, rule.divergence == "label"
    usable = rows.kept
    target_best = Best.empty(n, rows.dtype, device)
    student_best = Best.empty(n, rows.dtype, device)
    label_logit = torch.full((n,), math.nan, dtype=rows.dtype, device=device)
    for part in _tiles(rows, state, tile):
        block, taught, target = part.block, part.taught, part.target
        usable[block] &= ~part.has_nan
        if target is None and rule.combination == "student_offset":
            target_best.see(block, part.teachers[0], part.start)
        elif target is not None:
            found = target_best.see(block, target, part.start)
            if rule.divergence == "hard":
                at_target = taught.gather(1, target_best.index_in(block, part.start).unsqueeze(1)).squeeze(1)
                label_logit[block] = torch.where(found, at_target, label_logit[block])
        if statistics:
            student_best.see(block, taught, part.start)
        if label:
            column = rows.labels[block] - part.start
            inside = (column >= 0) & (column < taught.shape[1])
            at_label = taught.gather(1, torch.where(inside, column, 0).unsqueeze(1)).squeeze(1)
            label_logit[block] = torch.where(inside, at_label, label_logit[block])
        tile_sums = sums_of_tile(taught, target if soft else None, rule)
        sums[:, block] = merged(torch.stack([sums[:, block], tile_sums], dim=1), rule)
    if rule.combination != "none":
        usable &= torch.isfinite(target_best.value)
    state.numbers[:4] = sums[:4]
    state.numbers[Row.USED].copy_(usable)
    if not soft:
        values = sums[Sum.STUDENT_SUM].log() - (label_logit - sums[Sum.STUDENT_MAX])
        entropy = torch.zeros_like(values)
        targets = rows.labels if label else target_best.index
        state.targets.copy_(torch.where(usable, targets, 0))
    else:
        values, entropy = loss_and_entropy(sums, rule)
        targets = target_best.index if statistics else torch.zeros_like(state.targets)
        if rule.divergence == "jsd":
            values, state.numbers[Row.PART][:] = _jensen_shannon(rows, state, tile)
        else:
            state.numbers[Row.PART].copy_(values)
    predicted = student_best.index
    if statistics:
        predicted = torch.where(torch.isnan(sums[Sum.STUDENT_MAX]), 0, predicted)
    return RowLosses(
        torch.where(usable, values, 0.0),
        torch.where(usable, targets, rows.ignore_index),
        torch.where(usable, entropy, 0.0),
        predicted,
    ), state


def gradients(
    rows: LinearRows,
    state: LinearState,
    row_scale: Tensor,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    tile: int = 2048,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum_n row_scale[n] * loss[n]`` with respect to the student's tensors.

    Args:
        rows, tile: those of :func:`losses`; state: what it returned.
        row_scale: [n].

    Returns:
        d_hidden [n, H] in the dtype of ``hidden`` (float32 for float16, where small numbers are lost),
        d_weight [V, H] and d_bias [V] in float32 (float64), each None where not needed. The gradient of a
        tile of logits is rounded once, to the dtype of the products.
    """
    n, dtype, device = rows.count, rows.dtype, rows.device
    hidden = torch.zeros(n, rows.hidden.shape[1], dtype=dtype, device=device) if needs_hidden else None
    weight = torch.zeros(rows.weight.shape, dtype=dtype, device=device) if needs_weight else None
    bias = torch.zeros(rows.vocabulary, dtype=dtype, device=device) if needs_bias else None
    shift, row_scale = float16_scale(row_scale.to(dtype), _product_dtype(rows.student, dtype))
    unused = state.numbers[Row.USED] == 0
    for part in _tiles(rows, state, tile):
        d_logits = _gradient(part, rows, state)
        d_logits *= row_scale[part.block].unsqueeze(1)
        d_logits.masked_fill_(unused[part.block].unsqueeze(1), 0.0)
        if bias is not None:
            bias[part.columns] += d_logits.sum(0)
        d_logits = d_logits.to(part.head.dtype)
        if hidden is not None:
            product(d_logits, part.head, out_dtype=dtype, out=hidden[part.block], accumulate=True)
        if weight is not None:
            block = rows.hidden[part.block].to(part.head.dtype)
            product(d_logits.t(), block, out_dtype=dtype, out=weight[part.columns], accumulate=True)
    if shift is not None:
        for values in (hidden, weight, bias):
            if values is not None:
                values.mul_(shift)
    if hidden is not None and rows.hidden.dtype != torch.float16:
        hidden = hidden.to(rows.hidden.dtype)
    return hidden, weight, bias


def row_labels(rows: LinearRows, weights: Sequence[float], *, tile: int = 2048) -> tuple[Tensor, Tensor]:
    """As ``reference.row_labels``: labels int64 [A, n], the argmax of the target for each weight of the
    combination, and the edited first teacher's own argmax int64 [n]; ``ignore_index`` where unusable."""
    n, dtype, device = rows.count, rows.dtype, rows.device
    rows = dataclasses.replace(rows, hidden=None, weight=None, bias=None)
    state = _new_state(rows, tile)
    rules = [None, *(dataclasses.replace(rows.rule, weight=weight) for weight in weights)]
    best = [Best.empty(n, dtype, device) for _ in rules]
    usable = rows.kept.repeat(len(rules), 1)
    for part in _tiles(rows, state, tile, target=False):
        usable[0, part.block] &= ~part.teachers[0].isnan().any(-1)
        usable[1:, part.block] &= ~part.has_nan
        for k, rule in enumerate(rules):
            target = part.teachers[0] if rule is None else _target(part.teachers, rule, part.first_max)
            best[k].see(part.block, target, part.start)
            usable[k, part.block] &= ~target.isnan().any(-1)
    usable &= torch.isfinite(torch.stack([b.value for b in best]))
    labels = torch.where(usable, torch.stack([b.index for b in best]), rows.ignore_index)
    return labels[1:], labels[0]


@dataclass
class _Tile:
    """One block of rows times one tile of the vocabulary."""

    block: slice
    columns: slice
    head: Tensor | None  # the student's [c, H], in the dtype of the products
    student: Tensor | None  # [r, c], soft-capped
    teachers: list[Tensor]  # [r, c] each, soft-capped and edited
    first_max: Tensor  # [r]
    has_nan: Tensor  # bool [r]: a teacher or the target has a NaN here
    target: Tensor | None = None
    taught: Tensor | None = None  # what goes into the divergence: the student, or the sum it is part of

    @property
    def start(self) -> int:
        return self.columns.start


def _tiles(rows: LinearRows, state: LinearState, tile: int, *, target: bool = True) -> Iterator[_Tile]:
    """Tile after tile, and in each block after block of rows: a tile of a head is converted once. Every pass
    computes the same products, so that comparisons between passes (relative_top) are exact."""
    rule, edits = rows.rule, _Edits(rows, state)
    for columns in _slices(rows.vocabulary, tile):
        heads = [_head_tile(model, columns, rows.dtype) for model in rows.models]
        for block in _slices(rows.count, ROW_BLOCK):
            values = _logits(rows, heads, block, columns)
            student = values.pop(0) if rows.hidden is not None else None
            if values:
                values[0] = edits.apply(values[0], block, columns)
            part = _Tile(
                block,
                columns,
                heads[0][0] if student is not None else None,
                student,
                values,
                state.numbers[Row.FIRST_MAX][block],
                torch.zeros(block.stop - block.start, dtype=torch.bool, device=rows.device),
                taught=student,
            )
            if rule.combination == "student_offset" and student is not None:
                summed = values[0] + rule.weight * (student - values[1])
                part.taught = torch.where(values[0].isneginf(), values[0], summed)
            elif rule.combination != "none" and target:
                part.target = _target(values, rule, part.first_max)
            for t in (*values, *(() if part.target is None else (part.target,))):
                part.has_nan |= t.isnan().any(-1)
            yield part


def _target(teachers: Sequence[Tensor], rule, first_max: Tensor) -> Tensor:
    """The combination on a tile; the maximum of the whole row comes from outside."""
    target = target_logits(teachers, dataclasses.replace(rule, relative_top=0.0))
    if not rule.relative_top:
        return target
    base = teachers[0]
    within = base >= first_max.unsqueeze(1) + math.log(rule.relative_top)
    return torch.where(within, target, base if rule.outside == "keep" else -math.inf)


def _gradient(part: _Tile, rows: LinearRows, state: LinearState) -> Tensor:
    """d loss / d logits of the student [r, c] on a tile."""
    rule, block = rows.rule, part.block
    m_s, l_s, m_t, l_t, row_part = (v[block].unsqueeze(1) for v in state.numbers[:5])
    s = (part.taught - m_s) / rule.temperature
    p_s = s.exp() / l_s
    if not rule.soft:
        columns = torch.arange(part.columns.start, part.columns.stop, device=p_s.device)
        gradient = p_s - (columns == state.targets[block].unsqueeze(1)).to(p_s.dtype)
    else:
        t = (part.target - m_t) / rule.temperature
        if rule.divergence in ("cross_entropy", "forward_kl"):
            gradient = p_s - t.exp() / l_t
        else:
            s, t = s - l_s.log(), t - l_t.log()
            if rule.divergence == "jsd":
                t = torch.logaddexp(t + math.log(rule.beta), s + math.log1p(-rule.beta))
            gradient = torch.where(p_s == 0, 0.0, p_s * (s - t)) - p_s * row_part
            gradient *= 1 - rule.beta if rule.divergence == "jsd" else 1.0
        gradient /= rule.temperature
    if rule.softcap:
        gradient *= 1 - (part.student / rule.softcap) ** 2
    if rule.combination == "student_offset":
        gradient *= rule.weight
    return gradient


def _jensen_shannon(rows: LinearRows, state: LinearState, tile: int) -> tuple[Tensor, Tensor]:
    """The loss [n] and KL(p_s, m) [n]; a pass of its own, as the mixture needs both normalisers."""
    beta, temperature = rows.rule.beta, rows.rule.temperature
    target_part, student_part = torch.zeros_like(state.numbers[:2])
    for part in _tiles(rows, state, tile):
        m_s, l_s, m_t, l_t = (v[part.block].unsqueeze(1) for v in state.numbers[:4])
        s = (part.taught - m_s) / temperature - l_s.log()
        t = (part.target - m_t) / temperature - l_t.log()
        m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
        target_part[part.block] += weighted(t.exp(), t - m)
        student_part[part.block] += weighted(s.exp(), s - m)
    return beta * target_part + (1 - beta) * student_part, student_part


def _new_state(rows: LinearRows, tile: int) -> LinearState:
    """An empty state, but for what the first pass over the vocabulary has to know of the first teacher."""
    numbers = torch.zeros(len(Row), rows.count, dtype=rows.dtype, device=rows.device)
    state = LinearState(numbers, torch.zeros(rows.count, dtype=torch.int64, device=rows.device))
    if not rows.teachers:
        return state
    first = dataclasses.replace(rows, hidden=None, weight=None, bias=None, teachers=rows.teachers[:1])
    if rows.rule.edit == "mean" and rows.edit_offsets is not None:
        if rows.rule.softcap:
            unedited = dataclasses.replace(first, edit_offsets=None, edit_tokens=None)
            for part in _tiles(unedited, state, tile, target=False):
                state.numbers[Row.FIRST_MEAN][part.block] += part.teachers[0].sum(-1)
            state.numbers[Row.FIRST_MEAN].div_(rows.vocabulary)
        else:
            state.numbers[Row.FIRST_MEAN].copy_(_mean_logit(rows.teachers[0], rows.dtype, tile))
    if rows.rule.relative_top:
        highest = state.numbers[Row.FIRST_MAX].fill_(-math.inf)
        for part in _tiles(first, state, tile, target=False):
            highest[part.block] = torch.maximum(highest[part.block], part.teachers[0].amax(-1))
    return state


def _mean_logit(model: Projection, dtype: torch.dtype, tile: int) -> Tensor:
    """The mean over the vocabulary [n] of logits without a soft cap: a product with the mean of the head."""
    vocabulary = model.weight.shape[0]
    mean = torch.zeros(model.weight.shape[1], dtype=dtype, device=model.weight.device)
    for columns in _slices(vocabulary, tile):
        mean += model.weight[columns].to(dtype).sum(0)
    mean /= vocabulary
    result = torch.empty(model.hidden.shape[0], dtype=dtype, device=model.hidden.device)
    for block in _slices(len(result), ROW_BLOCK):
        result[block] = model.hidden[block].to(dtype) @ mean
    return result if model.bias is None else result + model.bias.to(dtype).mean()


class _Edits:
    """The edits of the first teacher, tile by tile."""

    def __init__(self, rows: LinearRows, state: LinearState):
        self.rule, self.state, self.offsets = rows.rule, state, None
        if rows.edit_offsets is not None and rows.count:
            # where each block's tokens begin, once: looking at a GPU's values waits for it
            ends = [block.stop for block in _slices(rows.count, ROW_BLOCK)]
            first, *ends = rows.edit_offsets[[0, *ends]].tolist()  # the first need not be 0
            self.offsets = [0, *(end - first for end in ends)]
            self.tokens = rows.edit_tokens[first : first + self.offsets[-1]]
            self.rows = torch.repeat_interleave(rows.edit_offsets.diff(), output_size=len(self.tokens))

    def apply(self, logits: Tensor, block: slice, columns: slice) -> Tensor:
        """The tile's logits [r, c] with the listed tokens of each row changed."""
        if self.offsets is None:
            return logits
        i = block.start // ROW_BLOCK
        part = slice(self.offsets[i], self.offsets[i + 1])
        token = self.tokens[part]
        inside = (token >= columns.start) & (token < columns.stop)
        row, token = self.rows[part][inside], token[inside] - columns.start
        if self.rule.edit == "add":
            value = torch.tensor(self.rule.edit_value, dtype=logits.dtype, device=logits.device)
            return logits.index_put((row - block.start, token), value, accumulate=True)
        value = torch.full_like(logits[:1, 0], -math.inf)
        if self.rule.edit == "mean":
            value = self.state.numbers[Row.FIRST_MEAN][row]
        return logits.index_put((row - block.start, token), value)


def _head_tile(model: Projection, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A tile of a head in the dtype of the products, and of its bias."""
    weight = model.weight[columns].to(_product_dtype(model, dtype))
    return weight, None if model.bias is None else model.bias[columns].to(dtype)


def _product_dtype(model: Projection, dtype: torch.dtype) -> torch.dtype:
    """Narrow tensors stay as they are where float32 results of them come from the accumulator; others become
    ``dtype``."""
    narrow = model.weight.dtype
    return narrow if model.hidden.dtype == narrow and from_accumulator(narrow, model.weight.device) else dtype


def _logits(rows: LinearRows, heads: list, block: slice, columns: slice) -> list[Tensor]:
    """The soft-capped logits [r, c] of each model; those of the same tensors are computed once."""
    result: list[Tensor] = []
    for k, (model, (weight, bias)) in enumerate(zip(rows.models, heads)):
        twin = next((j for j in range(k) if model.same_as(rows.models[j])), None)
        if twin is not None:
            result.append(result[twin])
            continue
        logits = product(model.hidden[block].to(weight.dtype), weight.t(), out_dtype=rows.dtype)
        if bias is not None:
            logits += bias
        result.append(softcapped(logits, rows.rule.softcap))
    return result


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
