"""The reference against plain loops over Python floats, and its targets case by case."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import (
    loop_argmax,
    loop_capped,
    loop_edited,
    loop_log_softmax,
    loop_loss,
    loop_target,
    loop_unusable,
)
from whp_kernels.losses import reference
from whp_kernels.losses.combination import Identity, Offset, RelativeTop, RowEdits, StudentOffset, Whp
from whp_kernels.losses.rows import Rows
from whp_kernels.losses.rule import SOFT, Rule

INF, NAN = math.inf, math.nan
IGNORE = -100


def rows_of(student=None, *teachers, rule, labels=None, index=None, edits=None, ignore_index=IGNORE):
    """Rows of tensors or nested lists (float64)."""

    def tensor(values, dtype=torch.float64):
        return (
            values
            if values is None or isinstance(values, torch.Tensor)
            else torch.tensor(values, dtype=dtype)
        )

    return Rows(
        student=tensor(student),
        teachers=tuple(tensor(t) for t in teachers),
        teacher_rows=tuple(tensor(i, torch.int64) for i in (index or [None] * len(teachers))),
        labels=tensor(labels, torch.int64),
        edit_offsets=None if edits is None else edits.offsets,
        edit_tokens=None if edits is None else edits.tokens,
        rule=rule if edits is None else dataclasses.replace(rule, edit=edits.kind, edit_value=edits.value),
        ignore_index=ignore_index,
    )


def run(rows, scale=None, statistics=True):
    """(RowLosses, gradient), the gradient for a row scale of one; started as NaN so that a gap shows."""
    gradient = torch.full_like(rows.student, NAN)
    scale = torch.ones(rows.count) if scale is None else scale
    return reference.row_losses(rows, statistics=statistics, row_scale=scale, gradient=gradient), gradient


def edits_of(lists, kind, value=0.0):
    lengths = torch.tensor([0, *map(len, lists)])
    return RowEdits(lengths.cumsum(0), torch.tensor(sum(lists, []), dtype=torch.int64), kind, value)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------ the loops

# a coarse grid, so that ties are frequent and arithmetic is exact
FINITE = [-4.0, -2.5, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.0]
BANNED = [*FINITE, *FINITE, -INF, -INF, -INF]
ANYTHING = [*BANNED, *BANNED, INF, NAN]
COMBINATIONS = [("identity", 1), ("whp", 2), ("offset", 2), ("offset", 3)]


@st.composite
def problems(draw, divergences=("hard",), student_offset=False):
    """Rows with everything that may occur: (rows, student as lists, gathered and edited teachers or None)."""
    n, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    combination, count = draw(st.sampled_from(COMBINATIONS))
    divergence = draw(st.sampled_from(divergences))
    if divergence == "label":
        combination, count = ("student_offset", 2) if student_offset else ("none", 0)
    matrix = lambda values, m: [[draw(st.sampled_from(values)) for _ in range(vocab)] for _ in range(m)]  # noqa: E731
    values = draw(st.sampled_from([FINITE, FINITE, BANNED, ANYTHING]))
    filters = [(0.0, "keep"), (0.0, "keep"), (0.1, "mask"), (0.5, "mask"), (1.0, "mask")]
    if combination != "identity":
        filters += [(0.1, "keep"), (0.5, "keep"), (1.0, "keep")]
    top, outside = (
        draw(st.sampled_from(filters)) if combination in ("identity", "whp", "offset") else (0.0, "keep")
    )
    edit = (
        draw(st.sampled_from(["none", "add", "ban", "mean"]))
        if combination not in ("none", "student_offset")
        else "none"
    )
    rule = Rule(
        combination=combination,
        weight=draw(st.sampled_from([5.0, 1.0, 0.5, 0.0, -1.0])),
        relative_top=top,
        outside=outside,
        divergence=divergence,
        beta=draw(st.sampled_from([0.5, 0.2, 0.9])),
        temperature=draw(st.sampled_from([1.0, 0.5, 2.0])) if divergence in SOFT else 1.0,
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
    )
    teachers, index = [], []
    for _ in range(count):
        gathers = draw(st.booleans())
        m = draw(st.integers(1, 3)) if gathers else n
        teachers.append(matrix(values if combination != "student_offset" else FINITE, m))
        index.append([draw(st.integers(-1, m - 1)) for _ in range(n)] if gathers else None)
    lists = [draw(st.lists(st.integers(0, vocab + 1), max_size=3)) for _ in range(n)]
    edits = None if edit == "none" else edits_of(lists, edit, draw(st.sampled_from([-3.0, 0.5])))
    labels = [draw(st.sampled_from([IGNORE, *range(vocab)])) for _ in range(n)]
    student = matrix(draw(st.sampled_from([FINITE, BANNED, ANYTHING])), n)
    rows = rows_of(
        student,
        *teachers,
        rule=rule,
        index=index,
        edits=edits,
        labels=labels if divergence == "label" or draw(st.booleans()) else None,
    )
    rule = rows.rule
    seen = []
    for i in range(n):
        if any(k is not None and k[i] < 0 for k in index) or (
            rows.labels is not None and labels[i] == IGNORE
        ):
            seen.append(None)
            continue
        row = [loop_capped(t[i if k is None else k[i]], rule.softcap) for t, k in zip(teachers, index)]
        if edits is not None:
            row[0] = loop_edited(row[0], lists[i], rule)
        seen.append(row)
    return rows, student, seen


@settings(max_examples=200)
@given(problems())
def test_labels_are_those_of_a_loop(problem):
    rows, _, seen = problem
    weights = [rows.rule.weight, 0.0, 2.5]
    labels, own = reference.row_labels(dataclasses.replace(rows, student=None), weights)
    for i, teachers in enumerate(seen):
        expected, expected_own = [IGNORE] * 3, IGNORE
        if teachers is not None:
            for k, weight in enumerate(weights):
                target = loop_target(teachers, dataclasses.replace(rows.rule, weight=weight))
                expected[k] = IGNORE if loop_unusable(teachers, target) else loop_argmax(target)
            first = teachers[0]
            expected_own = IGNORE if loop_unusable([], first) else loop_argmax(first)
        assert labels[:, i].tolist() == expected and int(own[i]) == expected_own


def same(got, expected):
    return got == pytest.approx(expected, rel=1e-10, abs=1e-11, nan_ok=True)


def check_losses(rows, student, seen):
    rule = rows.rule
    result, gradient = run(rows)
    for i, teachers in enumerate(seen):
        own = loop_capped(student[i], rule.softcap)
        if all(not math.isnan(x) for x in own) and rule.combination != "student_offset":
            assert int(result.predicted[i]) == loop_argmax(own)
        target = None
        if teachers and rule.combination != "student_offset":
            target = loop_target(teachers, rule)
        if teachers is None or (target is not None and loop_unusable(teachers, target)):
            assert (float(result.losses[i]), int(result.targets[i]), float(result.entropy[i])) == (
                0,
                IGNORE,
                0,
            )
            assert not gradient[i].any()
            continue
        label = int(rows.labels[i]) if rows.labels is not None else None

        def loss_of(row, teachers=teachers, target=target, label=label):
            row = loop_capped(row, rule.softcap)
            if rule.combination == "student_offset":
                row = [b + rule.weight * (s - z) for b, s, z in zip(teachers[0], row, teachers[1])]
            return loop_loss(row, target, label, rule)

        expected = loss_of(student[i])
        assert same(float(result.losses[i]), expected)
        taught = label if rule.divergence == "label" else loop_argmax(target)
        assert int(result.targets[i]) == taught
        if rule.divergence in SOFT:
            log_t = loop_log_softmax([x / rule.temperature for x in target])
            assert same(float(result.entropy[i]), -sum(math.exp(a) * a for a in log_t if a != -INF))
        if not math.isfinite(expected):
            continue
        for v, x in enumerate(student[i]):
            slope = 0.0  # of a column without probability
            if math.isfinite(x):
                step = 1e-5
                moved = ([*student[i][:v], x + d, *student[i][v + 1 :]] for d in (step, -step))
                up, down = (loss_of(row) for row in moved)
                slope = (up - down) / (2 * step)
            assert float(gradient[i, v]) == pytest.approx(slope, rel=1e-6, abs=1e-7)


@settings(max_examples=250)
@given(problems(divergences=[*SOFT, "hard"]))
def test_losses_and_gradients_are_those_of_a_loop(problem):
    check_losses(*problem)


@settings(max_examples=80)
@given(problems(divergences=["label"], student_offset=True))
def test_student_offset_is_that_of_a_loop(problem):
    check_losses(*problem)


@settings(max_examples=80)
@given(problems(divergences=["label"]))
def test_cross_entropy_is_that_of_a_loop(problem):
    check_losses(*problem)


# ----------------------------------------------------------------------------------------- the target


def labels_of(*teachers, weight=5.0, rule=None, **how):
    """(label, own choice) of each row for one weight."""
    rule = rule or Rule.of(Whp(weight) if len(teachers) == 2 else Identity(), None, "hard")
    labels, own = reference.row_labels(rows_of(None, *teachers, rule=rule, **how), [weight])
    return list(zip(labels[0].tolist(), own.tolist()))


def test_the_lowest_index_wins_a_tie():
    assert labels_of([[1.0, 7.0, 7.0], [7.0, 7.0, 7.0], [0.0, -0.0, -1.0]]) == [(1, 1), (0, 0), (0, 0)]
    wide = torch.zeros(1, 70001)
    wide[0, 69999:] = 3
    assert labels_of(wide) == [(69999, 69999)]
    # a tie of the target that is none of the teachers
    assert labels_of([[1.0, 3.0, 2.0]], [[0.0, 3.5, 2.0]], weight=4.0) == [(2, 1)]
    assert labels_of([[1.0, 3.0, 2.0]], [[0.0, 3.5, 2.0]], weight=2.0) == [(1, 1)]


def test_ruled_out_columns_stay_ruled_out_whatever_the_others_say():
    for other in (-INF, -7.0, 0.0, 7.0, INF):
        assert labels_of([[-INF, 1.0]], [[other, 0.0]]) == [(1, 1)]
        for weight in (2.0, -2.0, 0.0):
            rule = Rule.of(Offset(weight), None, "hard")
            assert labels_of([[-INF, 1.0]], [[other, 0.0]], rule=rule, weight=weight) == [(1, 1)]
    rule = Rule.of(Offset(1.0), None, "forward_kl")
    rows = rows_of([[0.0, 1.0, 2.0]], [[-INF, 0.0, 1.0]], [[9.0, 0.0, 0.0]], [[-INF, 0.0, 0.0]], rule=rule)
    result, gradient = run(rows)
    assert math.isfinite(result.losses[0]) and int(result.targets[0]) == 2
    assert float(gradient[0, 0]) == pytest.approx(float(torch.softmax(rows.student, -1)[0, 0]), rel=1e-14)


@pytest.mark.parametrize(
    "base, reinforced",
    [
        ([0.0, NAN], [0.0, 1.0]),
        ([0.0, 1.0], [NAN, 1.0]),
        ([-INF, 1.0], [NAN, 1.0]),  # even where the base rules the column out
        ([-INF, -INF], [0.0, 1.0]),
        ([0.0, INF], [0.0, 1.0]),
        ([0.0, 1.0], [INF, INF]),  # everything is pushed out
    ],
)
@pytest.mark.parametrize("divergence", ["hard", *SOFT])
def test_unusable_rows_are_left_out(base, reinforced, divergence):
    rule = Rule.of(Whp(5.0), None, divergence)
    good = [0.5, 0.25]
    rows = rows_of([[3.0, 1.0]] * 3, [good, base, good], [good, reinforced, good], rule=rule, ignore_index=-7)
    result, gradient = run(rows)
    labels, _ = reference.row_labels(dataclasses.replace(rows, student=None), [5.0])
    assert labels.tolist() == [[0, -7, 0]] and result.targets.tolist() == [0, -7, 0]
    assert float(result.losses[1]) == float(result.entropy[1]) == 0 and not gradient[1].any()
    assert (result.losses[[0, 2]] > 0).all() and gradient[[0, 2]].all()


@pytest.mark.parametrize(
    "place, values", [(0, [NAN, 0.0]), (1, [NAN, 0.0]), (0, [-INF, -INF]), (0, [INF, 0.0])]
)
def test_unusable_rows_of_student_offset_are_left_out(place, values):
    teachers = [[[1.0, 2.0], [1.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]]]
    teachers[place][1] = values
    rule = Rule.of(StudentOffset(0.5), None, "label")
    result, gradient = run(rows_of([[3.0, 1.0]] * 2, *teachers, rule=rule, labels=[1, 1]))
    assert result.targets.tolist() == [1, IGNORE] and result.losses[0] > 0 and gradient[0].all()
    assert float(result.losses[1]) == 0 and not gradient[1].any()


def test_own_choice_needs_only_the_first_teacher():
    assert labels_of([[0.0, 1.0]], [[NAN, 0.0]]) == [(IGNORE, 1)]
    assert labels_of([[NAN, 1.0]], [[0.0, 0.0]]) == [(IGNORE, IGNORE)]
    assert labels_of([[0.0, 1.0]], [[0.0, 9.0]], labels=[IGNORE]) == [(IGNORE, IGNORE)]
    labels, own = reference.row_labels(
        rows_of(None, [[0.0, 1.0]], [[0.0, 9.0]], rule=Rule.of(Whp(5.0), None, "hard")), []
    )
    assert labels.shape == (0, 1) and labels.dtype == own.dtype == torch.int64 and own.tolist() == [1]


def test_edits_are_made_to_the_first_teacher_alone():
    identity, base = Rule.of(Identity(), None, "hard"), [[4.0, 1.0, 3.0]]

    def edited(lists, kind, value=0.0, teacher=base):
        rows = rows_of(None, teacher, rule=identity, edits=edits_of(lists, kind, value))
        return reference.teacher_logits(rows)[0].tolist()

    assert edited([[0]], "add", -2.5) == [[1.5, 1.0, 3.0]]
    assert edited([[0, 2, 0]], "add", -2.5) == [[-1.0, 1.0, 0.5]]  # twice
    assert edited([[1, 1]], "ban") == [[4.0, -INF, 3.0]]
    assert edited([[1, 0, 1]], "mean", teacher=[[4.0, 1.0, 4.0]]) == [[3.0, 3.0, 4.0]]  # before any edit
    for kind in ("add", "ban", "mean"):
        assert edited([[3, 400]], kind, 1.0) == base  # tokens outside the vocabulary
        assert edited([[], [2], []], kind, 1.0, base * 3)[::2] == base * 2
    rule = Rule.of(Whp(1.0), None, "hard")
    rows = rows_of(None, base, base, rule=rule, edits=edits_of([[0]], "ban"))
    first, second = reference.teacher_logits(rows)
    assert first.tolist() == [[-INF, 1.0, 3.0]] and second.tolist() == base
    assert reference.row_labels(rows, [1.0])[0].tolist() == [[2]]


def test_edits_belong_to_the_rows_of_the_student_not_to_those_of_the_teacher():
    base = [[1.0, 2.0], [6.0, 5.0]]
    rows = rows_of(
        None,
        base,
        rule=Rule.of(Identity(), None, "hard"),
        index=[[1, 1, 0, -1]],
        edits=edits_of([[], [0], [1], [0]], "add", -9.0),
    )
    assert reference.teacher_logits(rows)[0].tolist()[:3] == [[6.0, 5.0], [-3.0, 5.0], [1.0, -7.0]]
    assert reference.row_labels(rows, [1.0])[0].tolist() == [[0, 1, 0, IGNORE]]
    assert rows.teachers[0].tolist() == base  # the teacher itself is as it was


def test_relative_top_speaks_of_the_edited_first_teacher():
    base, other = [[0.0, -0.5, -3.0, -INF]], [[5.0, 7.0, 9.0, 9.0]]

    def target(outside, fraction=0.5, edits=None, weight=1.0):
        rule = Rule.of(Offset(weight, RelativeTop(fraction, outside)), edits, "hard")
        rows = rows_of(None, base, other, rule=rule, edits=edits)
        return reference.target_logits(reference.teacher_logits(rows), rule)[0].tolist()

    probable = [5.0, 6.5]  # exp(-0.5) = 0.61 of the highest
    assert target("keep") == [*probable, -3.0, -INF] and target("mask") == [*probable, -INF, -INF]
    assert target("keep", 0.61) == [5.0, -0.5, -3.0, -INF][:1] + [-0.5, -3.0, -INF]
    assert target("keep", 0.6) == [*probable, -3.0, -INF]
    assert target("mask", 1.0) == [5.0, -INF, -INF, -INF]
    assert target("mask", 1e-9) == [*probable, 6.0, -INF]
    banned = edits_of([[0]], "ban")
    assert target("mask", 0.5, banned) == [-INF, 6.5, -INF, -INF]  # the highest is now the second


def test_rows_count_those_of_the_student_or_of_the_first_index():
    teacher = normal(7, 3)
    assert rows_of(normal(2, 3), teacher, rule=Rule(), index=[[0, 5]]).count == 2
    assert rows_of(None, teacher, rule=Rule()).count == 7
    assert rows_of(None, teacher, rule=Rule(), index=[[0, 5, 6]]).count == 3
    assert rows_of(None, teacher, rule=Rule()).first is teacher
