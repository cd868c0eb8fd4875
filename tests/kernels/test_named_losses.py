"""Each named loss of the family against its published formula, in float64: value and gradient to 1e-12.

Autograd differentiates the formulas of named_losses.py. They are run through the rows of the reference,
`combination_loss` and `linear_combination_loss`.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from named_losses import NAMED, VOCAB, Named, Problem, kl, one_hot, soft
from torch import Tensor
from whp_kernels.losses import combination_loss, linear_combination_loss, reference
from whp_kernels.losses.combination import SELF, Identity, RowEdits, Whp
from whp_kernels.losses.rows import Rows
from whp_kernels.losses.rule import Rule

IGNORE = -100
ROWS, WIDTH = 12, 7
CLOSE = 1e-12

# --------------------------------------------------------------------------------------------- the problems


def problem_of(named: Named, seed: int = 0, heads=None) -> Problem:
    """Random logits; from hidden states and ``heads`` if those are given."""
    random = torch.Generator().manual_seed(seed)

    def logits(scale):
        return torch.randn(ROWS, VOCAB, generator=random, dtype=torch.float64) * scale

    student = logits(2.0)
    common = logits(2.0)
    count = named.teachers if isinstance(named.teachers, int) else 0
    teachers = [common + logits(1.0) for _ in range(count)]
    labels = torch.randint(0, VOCAB, (ROWS,), generator=random)
    if named.teachers == "refusal":
        teachers = [torch.log(one_hot(labels.flip(0)))]
    labels[2::5] = IGNORE
    # lists of no, one and several tokens, of which the base's favourite is one
    forbidden = [
        torch.randperm(VOCAB, generator=random)[: row % 4].tolist()
        + ([int(teachers[0][row].argmax())] if count and row % 2 else [])
        for row in range(ROWS)
    ]
    return Problem(student, teachers, labels, forbidden)


def edits_of(named: Named, x: Problem) -> RowEdits | None:
    if not named.edit:
        return None
    if named.edit[0] != "mean":
        return RowEdits.at_labels(x.labels, *named.edit)
    lengths = torch.tensor([0, *map(len, x.forbidden)])
    return RowEdits(lengths.cumsum(0), torch.tensor(sum(x.forbidden, [])), "mean")


def published(named: Named, x: Problem, weights: Tensor) -> Tensor:
    """The weighted sum of the formula over the rows that are not ignored."""
    kept = (x.labels != IGNORE).nonzero().squeeze(1)
    return (named.formula(x.only(kept)) * weights[kept]).sum()


def row_weights() -> Tensor:
    return torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    error = float((got - expected).norm() / expected.norm())
    assert got.shape == expected.shape and error < CLOSE, f"{what}: relative error {error:.3g}"


def expected_of(named: Named, x: Problem, weights: Tensor) -> tuple[Tensor, Tensor]:
    student = x.student.clone().requires_grad_()
    loss = published(named, replace(x, student=student), weights)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss) and float(gradient.norm()) > 1e-3
    return loss.detach(), gradient


each = pytest.mark.parametrize("named", NAMED, ids=lambda named: named.name.replace(" ", "_"))

# ----------------------------------------------------------------------------------------------- three ways


def rows_of(named: Named, x: Problem, student: Tensor) -> Rows:
    choices = dict(named.choices)
    divergence = choices.pop("divergence", "label")
    combination = choices.pop("combination", None if named.teachers == 0 else Identity())
    edits = edits_of(named, x)
    teachers = (student,) if named.teachers == "self" else tuple(x.teachers)
    return Rows(
        student=student,
        teachers=teachers,
        teacher_rows=(None,) * len(teachers),
        labels=x.labels,
        edit_offsets=None if edits is None else edits.offsets,
        edit_tokens=None if edits is None else edits.tokens,
        rule=Rule.of(combination, edits, divergence, **choices),
        ignore_index=IGNORE,
    )


@each
def test_rows_of_the_reference(named):
    x, weights = problem_of(named), row_weights()
    loss, gradient = expected_of(named, x, weights)
    got = torch.full_like(x.student, math.nan)
    per_row = reference.row_losses(rows_of(named, x, x.student), row_scale=weights, gradient=got)
    assert per_row.losses.dtype == torch.float64
    kept = x.labels != IGNORE
    assert_same(per_row.losses[kept], named.formula(x.only(kept.nonzero().squeeze(1))), "losses")
    assert_same((per_row.losses * weights).sum(), loss, "sum")
    assert_same(got, gradient, "gradient")
    for factor in (0, -1, 2):
        with pytest.raises(AssertionError):
            assert_same(got * factor, gradient, "gradient")
    in_place = x.student.clone()
    reference.row_losses(rows_of(named, x, in_place), row_scale=weights, gradient=in_place)
    assert torch.equal(in_place, got)


@pytest.mark.parametrize("how", ["forward", "backward", "none", "mean"])
@each
def test_combination_loss(named, how):
    x, weights = problem_of(named), row_weights()
    if how == "mean":
        weights = torch.ones_like(weights) / (x.labels != IGNORE).sum()
    loss, gradient = expected_of(named, x, weights)
    student = x.student.clone().requires_grad_()
    batch = (3, ROWS // 3)
    arguments = dict(
        **named.choices,
        teachers=SELF if named.teachers == "self" else [t.view(*batch, VOCAB) for t in x.teachers],
        row_edits=edits_of(named, x),
    )
    if how == "mean":
        arguments |= dict(reduction="mean")
    else:
        arguments |= dict(weights=weights.view(batch), reduction="none" if how == "none" else "sum")
        arguments |= dict(gradient=how) if how != "none" else {}
    got = combination_loss(student.view(*batch, VOCAB), x.labels.view(batch), **arguments).sum()
    got.backward()
    assert_same(got.detach(), loss, "loss")
    assert_same(student.grad, gradient, "gradient")


@pytest.mark.parametrize("how", ["sum", "none"])
@each
def test_linear_combination_loss(named, how):
    if named.teachers == "refusal":
        pytest.skip("no finite head gives the logits of a one-hot distribution")
    x, weights = problem_of(named), row_weights()
    random = torch.Generator().manual_seed(1)

    def projection(width):
        return [
            torch.randn(*shape, generator=random, dtype=torch.float64)
            for shape in ((ROWS, width), (VOCAB, width), (VOCAB,))
        ]

    def logits(hidden, head, bias):
        return hidden @ head.t() + bias

    student, *teachers = (projection(WIDTH + k) for k in range(1 + len(x.teachers)))
    x = replace(x, teachers=[logits(*teacher) for teacher in teachers])
    leaves = [part.clone().requires_grad_() for part in student]
    loss = published(named, replace(x, student=logits(*leaves)), weights)
    gradients = torch.autograd.grad(loss, leaves)

    hidden, head, bias = (part.clone().requires_grad_() for part in student)
    got = linear_combination_loss(
        hidden,
        head,
        x.labels,
        bias=bias,
        **named.choices,
        teachers=SELF if named.teachers == "self" else teachers,
        row_edits=edits_of(named, x),
        weights=weights,
        reduction=how,
    ).sum()
    got.backward()
    assert_same(got.detach(), loss.detach(), "loss")
    for name, part, expected in zip(("hidden states", "head", "bias"), (hidden, head, bias), gradients):
        assert_same(part.grad, expected, f"gradient of {name}")


# ------------------------------------------------------------------------------------------ single statements


def target_of(rule: Rule, *teachers: list[float], edits: RowEdits | None = None) -> list[float]:
    rows = Rows(
        student=None,
        teachers=tuple(torch.tensor([t], dtype=torch.float64) for t in teachers),
        teacher_rows=(None,) * len(teachers),
        edit_offsets=None if edits is None else edits.offsets,
        edit_tokens=None if edits is None else edits.tokens,
        rule=rule,
    )
    return reference.target_logits(reference.teacher_logits(rows), rule)[0].tolist()


def test_worked_example_of_the_label():
    """Vocabulary {Paul, Orrin, he, the, it}: "Paul" is forbidden, the reinforced model says "Orrin"."""
    base, reinforced = [4.0, 1.0, 3.0, 2.5, 0.0], [1.0, 6.0, 3.5, 2.0, 0.0]
    edits = RowEdits(torch.tensor([0, 1]), torch.tensor([0]), "mean")
    target = target_of(Rule.of(Whp(5.0), edits, "hard"), base, reinforced, edits=edits)
    assert target == pytest.approx([2.1, -24.0, 0.5, 2.5, 0.0], abs=1e-12)
    assert max(range(5), key=target.__getitem__) == 3
    unedited = target_of(Rule.of(Whp(5.0), None, "hard"), base, reinforced)
    assert unedited == pytest.approx([4.0, -24.0, 0.5, 2.5, 0.0], abs=1e-12)


def test_two_forbidden_tokens_get_the_mean_of_the_row_as_it_was():
    edits = RowEdits(torch.tensor([0, 2]), torch.tensor([2, 0]), "mean")
    target = target_of(Rule.of(Identity(), edits, "hard"), [8.0, 0.0, 4.0, 0.0], edits=edits)
    assert target == [3.0, 0.0, 3.0, 0.0]


def test_undial_where_the_label_is_ignored_uses_the_teacher_as_it_is():
    """Also if the row itself is in the loss, as in published code that takes the mean over the prompt too."""
    named = next(n for n in NAMED if n.name == "undial")
    x = problem_of(named)
    rows = replace(rows_of(named, x, x.student), labels=None)
    losses = reference.row_losses(rows).losses
    for row, label in enumerate(x.labels.tolist()):
        teacher = x.teachers[0][row].clone()
        if label != IGNORE:
            teacher[label] -= 10
        expected = -(soft(teacher) * F.log_softmax(x.student[row], -1)).sum()
        assert_same(losses[row], expected, f"row {row}")


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_no_factor_of_the_squared_temperature(temperature):
    """Hinton's T^2 is left to the caller: the gradient shrinks with 1 / T."""
    named = next(n for n in NAMED if n.name == "kl to a frozen reference")
    x = problem_of(named)
    warm = replace(named, choices={**named.choices, "temperature": temperature})
    losses = reference.row_losses(rows_of(warm, x, x.student)).losses
    kept = x.labels != IGNORE
    expected = kl(soft(x.teachers[0], temperature), soft(x.student, temperature))
    assert_same(losses[kept], expected[kept], "losses")
