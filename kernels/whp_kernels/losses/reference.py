"""The definitions, in eager torch: any device, any dtype; everything faster is tested against them.

Logits are computed with in float32 (float64 where any of them are), whatever dtype they come in. For a row
with student logits ``s`` and target logits ``t``, temperature ``T``, ``p_s = softmax(s / T)``, ``p_t =
softmax(t / T)``:

    divergence       loss                                       d loss / d s
    label            -log p_s[y], T = 1                         p_s - onehot(y)
    hard             the same with y = argmax t                 p_s - onehot(y)
    cross_entropy    -sum p_t log p_s                           (p_s - p_t) / T
    forward_kl       sum p_t log(p_t / p_s)                     (p_s - p_t) / T
    reverse_kl       sum p_s log(p_s / p_t)                     p_s (log(p_s / p_t) - loss) / T
    jsd(beta)        beta KL(p_t, m) + (1 - beta) KL(p_s, m)    (1 - beta) p_s (log(p_s / m) - KL(p_s, m)) / T
                     with m = beta p_t + (1 - beta) p_s

No factor T^2 is applied. A term with probability 0 is 0. Columns that the target rules out (-inf) make the
reverse KL infinite where the student has mass, as the formula says; its gradient is not defined then. A soft
cap comes before everything else and turns -inf into -cap: rule columns out by an edit, not before the cap.

A row is *unusable* if, after the edits, a teacher or the combination holds a NaN in it, or if its target has
no finite maximum (all -inf, or +inf): such rows are ignored (loss and gradient 0, target ``ignore_index``),
and the public functions count them. A NaN of the student is not hidden: it makes the loss NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.rule import Rule


def row_labels(rows: Rows, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Labels int64 [A, n], the argmax of the target for each weight (alpha) of the combination, and the
    edited first teacher's own argmax int64 [n]. The lowest index on ties; ``ignore_index`` where unusable."""
    teachers = teacher_logits(rows)
    kept = _not_ignored(rows)
    sets = []
    for weight in weights:
        target = target_logits(teachers, dataclasses.replace(rows.rule, weight=weight))
        sets.append(torch.where(kept & _usable(teachers, target), first_argmax(target), rows.ignore_index))
    own = torch.where(kept & _usable(teachers[:1], teachers[0]), first_argmax(teachers[0]), rows.ignore_index)
    empty = torch.empty((0, rows.count), dtype=torch.int64, device=own.device)
    return (torch.stack(sets) if sets else empty), own


def row_losses(
    rows: Rows, *, statistics: bool = False, row_scale: Tensor | None = None, gradient: Tensor | None = None
) -> RowLosses:
    """The loss of each row and, if ``gradient`` [n, V] is given, ``row_scale[n] * d loss / d student``
    written into it with one rounding (it may be the student's own storage). Ignored and unusable rows get
    zeros."""
    rule = rows.rule
    kept = _not_ignored(rows)
    teachers = teacher_logits(rows)
    student = softcapped(rows.student.to(_compute_dtype(rows)), rule.softcap)
    slope = 1.0
    if rule.softcap:
        slope = 1 - (student / rule.softcap) ** 2
    target = None
    if rule.combination == "student_offset":
        summed = teachers[0] + rule.weight * (student - teachers[1])
        student = torch.where(torch.isneginf(teachers[0]), teachers[0], summed)  # a padded column
        kept = kept & _usable(teachers, teachers[0])
        slope = slope * rule.weight
    elif rule.combination != "none":
        target = target_logits(teachers, rule)
        kept = kept & _usable(teachers, target)
    if rule.soft:
        targets = first_argmax(target) if statistics else torch.zeros_like(kept, dtype=torch.int64)
    else:
        targets = first_argmax(target) if rule.divergence == "hard" else rows.labels
    if rule.soft:
        losses, entropy, d_student = soft_divergence(student, target, rule, kept)
    else:
        losses, d_student = label_loss(student, torch.where(kept, targets, 0))
        entropy = torch.zeros_like(losses)
    predicted = first_argmax(student) if statistics else torch.zeros_like(targets)
    if gradient is not None:  # last: it may overwrite the student
        d_student = d_student * slope * row_scale.to(d_student.dtype).unsqueeze(1)
        gradient.copy_(torch.where(kept.unsqueeze(1), d_student, 0.0))
    return RowLosses(
        torch.where(kept, losses, 0.0),
        torch.where(kept, targets, rows.ignore_index),
        torch.where(kept, entropy, 0.0),
        predicted,
    )


def teacher_logits(rows: Rows) -> list[Tensor]:
    """The teachers' rows [n, V] as the combination sees them: gathered, soft-capped, the first one edited."""
    dtype = _compute_dtype(rows)
    teachers = []
    for k, teacher in enumerate(rows.teachers):
        index = rows.teacher_rows[k] if rows.teacher_rows else None
        values = teacher if index is None else teacher[index.clamp(min=0)]
        teachers.append(softcapped(values.to(dtype), rows.rule.softcap))
    if rows.edit_offsets is not None:
        teachers[0] = edited(teachers[0], rows.edit_offsets, rows.edit_tokens, rows.rule)
    return teachers


def edited(logits: Tensor, offsets: Tensor, tokens: Tensor, rule: Rule) -> Tensor:
    """A copy of ``logits`` [n, V] with the listed tokens of each row changed; see
    :class:`whp_kernels.losses.combination.RowEdits`. Tokens outside the vocabulary match no column."""
    rows = torch.repeat_interleave(offsets.diff())
    tokens = tokens[int(offsets[0]) : int(offsets[-1])]  # a chunk's offsets need not start at 0
    inside = tokens < logits.shape[1]
    rows, tokens = rows[inside], tokens[inside]
    result = logits.clone()
    if rule.edit == "add":
        value = torch.tensor(rule.edit_value, dtype=logits.dtype, device=logits.device)
        return result.index_put_((rows, tokens), value, accumulate=True)
    result[rows, tokens] = -math.inf if rule.edit == "ban" else logits.mean(dim=-1)[rows]
    return result


def target_logits(teachers: Sequence[Tensor], rule: Rule) -> Tensor:
    """The combination of the teachers' rows [n, V]: see :mod:`whp_kernels.losses.combination`."""
    base = teachers[0]
    if rule.combination == "identity":
        target = base
    elif rule.combination == "whp":
        target = base - rule.weight * torch.relu(teachers[1] - base)
    elif len(teachers) == 2:
        target = base + rule.weight * teachers[1]
    else:
        target = base + rule.weight * (teachers[1] - teachers[2])
    if rule.relative_top:
        within = base >= base.amax(dim=-1, keepdim=True) + math.log(rule.relative_top)
        target = torch.where(within, target, base if rule.outside == "keep" else -math.inf)
    return torch.where(torch.isneginf(base), base, target)


def label_loss(student: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [n] against index targets [n], and its gradient [n, V] with respect to the logits."""
    # both halves are shifted by the row's maximum: log l - (s_y - m) keeps its digits at any offset
    shifted = student - student.amax(dim=-1, keepdim=True)
    exponentials = shifted.exp()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses = sums.log().squeeze(1) - shifted.gather(1, targets.unsqueeze(1)).squeeze(1)
    probabilities = exponentials / sums
    one = torch.ones((), dtype=student.dtype, device=student.device)
    onehot = torch.zeros_like(student).scatter_(1, targets.unsqueeze(1), one.expand(len(targets), 1))
    return losses, probabilities - onehot


def soft_divergence(
    student: Tensor, target: Tensor, rule: Rule, usable: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [n], entropy of the target [n] and gradient [n, V] of a soft divergence; see the table above."""
    temperature = rule.temperature
    target = torch.where(usable.unsqueeze(1), target, 0.0)
    log_s = torch.log_softmax(student / temperature, dim=-1)
    log_t = torch.log_softmax(target / temperature, dim=-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    entropy = -_times(p_t, log_t).sum(-1)
    if rule.divergence in ("cross_entropy", "forward_kl"):
        losses = -_times(p_t, log_s).sum(-1) if rule.divergence == "cross_entropy" else _kl(p_t, log_t, log_s)
        return losses, entropy, (p_s - p_t) / temperature
    if rule.divergence == "reverse_kl":
        losses = _kl(p_s, log_s, log_t)
        d_student = _times(p_s, log_s - log_t) - p_s * losses.unsqueeze(1)
        return losses, entropy, d_student / temperature
    beta = rule.beta
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    student_part = _kl(p_s, log_s, log_m)
    losses = beta * _kl(p_t, log_t, log_m) + (1 - beta) * student_part
    d_student = (1 - beta) * (_times(p_s, log_s - log_m) - p_s * student_part.unsqueeze(1))
    return losses, entropy, d_student / temperature


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def first_argmax(values: Tensor) -> Tensor:
    """argmax over the last dimension, the lowest index on ties, on every device (rows without NaN)."""
    return (values == values.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)


def _times(probabilities: Tensor, values: Tensor) -> Tensor:
    """Their product, 0 where the probability is 0 (0 * inf is no NaN); a NaN probability stays one."""
    return torch.where(probabilities == 0, 0.0, probabilities * values)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return _times(p, log_p - log_q).sum(-1)


def _usable(teachers: Sequence[Tensor], target: Tensor) -> Tensor:
    without_nan = ~torch.stack([torch.isnan(t).any(dim=-1) for t in [*teachers, target]]).any(dim=0)
    return without_nan & torch.isfinite(target.amax(dim=-1))


def _not_ignored(rows: Rows) -> Tensor:
    kept = torch.ones(rows.count, dtype=torch.bool, device=rows.first.device)
    if rows.labels is not None:
        kept = kept & (rows.labels != rows.ignore_index)
    for index in rows.teacher_rows:
        if index is not None:
            kept = kept & (index >= 0)
    return kept


def _compute_dtype(rows: Rows) -> torch.dtype:
    tensors = [*rows.teachers, *([] if rows.student is None else [rows.student])]
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
