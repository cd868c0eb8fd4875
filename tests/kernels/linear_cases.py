"""Rows with hidden states and heads for the mode without stored logits, and what they must give."""

import dataclasses

import torch
from whp_kernels.losses import reference
from whp_kernels.losses.linear_rows import LinearRows, Projection
from whp_kernels.losses.rows import Rows
from whp_kernels.losses.rule import SOFT, Rule

TEACHERS = {"none": 0, "identity": 1, "whp": 2, "offset": 3, "student_offset": 2}
FAMILY = [
    *((c, "label") for c in ("none", "student_offset")),
    *((c, d) for c in ("identity", "whp", "offset") for d in ("hard", *SOFT)),
]


def rule(combination, divergence, **choices):
    temperature = 1.7 if divergence in SOFT else 1.0
    values = {"weight": 2.0, "beta": 0.3, "temperature": temperature, "edit_value": -2.0, **choices}
    return Rule(combination=combination, divergence=divergence, **values)


def projection(n, vocabulary, width, generator, *, bias=True, dtype=torch.float64, scale=0.5):
    def numbers(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return Projection(numbers(n, width), numbers(vocabulary, width), numbers(vocabulary) if bias else None)


def build(rule, *, n=7, vocabulary=53, width=12, bias=True, dtype=torch.float64, seed=0, teachers=None):
    """Random rows for a rule: every third label ignored, two edits in the first row, none in the second."""
    generator = torch.Generator().manual_seed(seed)
    count = TEACHERS[rule.combination] if teachers is None else teachers
    student = projection(n, vocabulary, width, generator, bias=bias, dtype=dtype)
    others = tuple(
        projection(n, vocabulary, width + k, generator, bias=bias, dtype=dtype) for k in range(count)
    )
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[2::3] = -100
    offsets = tokens = None
    if rule.edit != "none":
        counts = torch.tensor([2, 0, *([1] * n)])[:n]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        tokens = torch.randint(0, vocabulary, (int(offsets[-1]),), generator=generator)
        tokens[:2] = tokens[:2].sort().values
    return LinearRows(*student, others, labels, offsets, tokens, rule)


def double(rows):
    """The same rows in float64."""

    def wide(model):
        return Projection(*(None if t is None else t.double() for t in model))

    student = (None, None, None) if rows.hidden is None else wide(rows.student)
    teachers = tuple(wide(t) for t in rows.teachers)
    return dataclasses.replace(rows, hidden=student[0], weight=student[1], bias=student[2], teachers=teachers)


def logits(rows):
    """The rows of logits that these rows stand for."""

    def of(model):
        values = model.hidden.to(rows.dtype) @ model.weight.to(rows.dtype).T
        return values if model.bias is None else values + model.bias.to(rows.dtype)

    return Rows(
        None if rows.hidden is None else of(rows.student),
        tuple(of(t) for t in rows.teachers),
        (),
        rows.labels,
        rows.edit_offsets,
        rows.edit_tokens,
        rows.rule,
        rows.ignore_index,
    )


def expected(rows, row_scale):
    """By the reference: losses with statistics, and the gradients of the student's tensors."""
    stored = logits(rows)
    gradient = torch.empty_like(stored.student)
    losses = reference.row_losses(stored, statistics=True, row_scale=row_scale, gradient=gradient)
    wide = gradient.dtype
    return losses, (
        gradient @ rows.weight.to(wide),
        gradient.T @ rows.hidden.to(wide),
        gradient.sum(0),
    )


def error(found, wanted):
    """Relative error in the norm of ``wanted``; infinite unless both hold the same NaN and infinities."""
    found, wanted = found.double(), wanted.double()
    finite = torch.isfinite(wanted)
    same = torch.isfinite(found) == finite
    if found.shape != wanted.shape or not same.all():
        return float("inf")
    if not torch.equal(found[~finite].nan_to_num(7.0), wanted[~finite].nan_to_num(7.0)):
        return float("inf")
    norm = wanted[finite].norm()
    return float((found[finite] - wanted[finite]).norm() / (norm if norm > 0 else 1))
