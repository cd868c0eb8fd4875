"""What must hold of every loss of the family, tried on the reference."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import normal, rows_of, run
from whp_kernels.losses import reference
from whp_kernels.losses.combination import Identity, Offset, RelativeTop, StudentOffset, Whp
from whp_kernels.losses.rule import SOFT, Rule

INF, NAN = math.inf, math.nan
IGNORE = -100


def rules(**how):
    """One rule for each divergence, and some more."""
    for divergence in ("hard", *SOFT):
        for combination in (Whp(3.0), Offset(-0.5, RelativeTop(0.01))):
            yield Rule.of(combination, None, divergence, **how)
    if not how:
        for divergence in SOFT:
            yield Rule.of(Whp(3.0), None, divergence, beta=0.2, temperature=0.5, softcap=3.0)
        yield Rule.of(None, None, "label")
        yield Rule.of(None, None, "label", softcap=3.0)
        yield Rule.of(StudentOffset(0.7), None, "label")


EVERY, PLAIN = list(rules()), list(rules(beta=0.3))
each_rule = pytest.mark.parametrize(
    "rule", EVERY, ids=lambda r: f"{r.combination}-{r.divergence}-{r.softcap:g}"
)
each_plain = pytest.mark.parametrize("rule", PLAIN, ids=lambda r: f"{r.combination}-{r.divergence}")


def example(rule, n=5, vocab=17, dtype=torch.float64, **how):
    teachers = {"none": 0, "identity": 1}.get(rule.combination, 2)
    tensors = [normal(n, vocab, seed=k, dtype=dtype) * 2 for k in range(1 + teachers)]
    labels = how.pop("labels", torch.arange(n) * 3 % vocab)
    return rows_of(*tensors, rule=rule, labels=labels, **how)


@each_rule
def test_ignored_rows_are_zero_whatever_they_hold(rule):
    rows = example(rule)
    expected, expected_gradient = run(rows)
    labels = rows.labels.clone()
    labels[[1, 3]] = -7
    for value in (NAN, INF, -INF):
        for tensor in (rows.student, *rows.teachers):
            tensor[[1, 3]] = value
        result, gradient = run(dataclasses.replace(rows, labels=labels, ignore_index=-7))
        assert (
            not result.losses[[1, 3]].any()
            and not gradient[[1, 3]].any()
            and not result.entropy[[1, 3]].any()
        )
        assert result.targets[[1, 3]].tolist() == [-7] * 2
        for field in ("losses", "targets", "entropy"):
            assert torch.equal(getattr(result, field)[::2], getattr(expected, field)[::2])
        assert torch.equal(gradient[::2], expected_gradient[::2])


@each_rule
def test_a_nan_of_the_student_is_not_hidden(rule):
    rows = example(rule)
    _, before = run(rows)
    rows.student[2, 5] = NAN
    result, gradient = run(rows)
    assert torch.isnan(result.losses).tolist() == [False, False, True, False, False]
    assert torch.isnan(gradient[2]).all() and torch.equal(gradient[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@each_rule
def test_the_gradient_may_take_the_place_of_the_student(rule):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows = example(rule, dtype=dtype)
        rows.labels[1] = IGNORE
        scale = torch.tensor([1.0, 2.0, -0.5, 0.0, 1.0])
        expected, gradient = run(rows, scale)
        memory = rows.student.clone()
        in_place = dataclasses.replace(rows, student=memory)
        result = reference.row_losses(in_place, statistics=True, row_scale=scale, gradient=memory)
        assert torch.equal(memory, gradient)
        assert all(torch.equal(a, b) for a, b in zip(result, expected))


@each_rule
def test_the_gradient_is_scaled_by_row_and_rounded_once(rule):
    rows = example(rule, dtype=torch.float32)
    scale = torch.tensor([1.0, 2.0, -0.3, 0.0, 1e-3])
    _, unit = run(example(rule, dtype=torch.float64))
    _, wide = run(rows, scale)
    assert (wide - unit * scale.unsqueeze(1)).norm() < 1e-5 * wide.norm()
    assert not wide[3].any()
    for dtype in (torch.bfloat16, torch.float16):
        gradient = torch.empty(rows.student.shape, dtype=dtype)
        reference.row_losses(rows, row_scale=scale, gradient=gradient)
        assert torch.equal(gradient, wide.to(dtype))


@each_rule
def test_losses_do_not_need_the_gradient_nor_statistics(rule):
    rows = example(rule)
    expected, _ = run(rows)
    for statistics in (True, False):
        result = reference.row_losses(rows, statistics=statistics)
        assert torch.equal(result.losses, expected.losses) and torch.equal(result.entropy, expected.entropy)
        if statistics or not rule.soft:
            assert torch.equal(result.targets, expected.targets)
        else:
            assert not result.targets.any()
        assert torch.equal(result.predicted, expected.predicted if statistics else expected.predicted * 0)


@each_rule
def test_narrow_logits_are_computed_with_in_float32(rule):
    narrow = example(rule, dtype=torch.bfloat16)
    values = dict(student=narrow.student.float(), teachers=tuple(t.float() for t in narrow.teachers))
    (a, _), (b, _) = run(narrow), run(dataclasses.replace(narrow, **values))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and a.losses.dtype == torch.float32
    if narrow.teachers:
        wide = dataclasses.replace(narrow, teachers=tuple(t.double() for t in narrow.teachers))
        assert reference.row_losses(wide).losses.dtype == torch.float64


@each_rule
def test_strides_and_shared_memory_do_not_matter(rule):
    rows = example(rule)
    expected, gradient = run(rows)
    wide = [torch.full((5, 23), 99.0, dtype=torch.float64) for _ in (rows.student, *rows.teachers)]
    for memory, tensor in zip(wide, (rows.student, *rows.teachers)):
        memory[:, 3:20] = tensor
    student, *teachers = (memory[:, 3:20] for memory in wide)
    result, other = run(dataclasses.replace(rows, student=student, teachers=tuple(teachers)))
    assert all(torch.equal(a, b) for a, b in zip(result, expected)) and torch.equal(other, gradient)
    if rows.teachers:
        index = torch.tensor([3, 0, 4, 1, 2])
        scattered = tuple(torch.empty_like(t).index_copy_(0, index, t) for t in rows.teachers)
        moved = dataclasses.replace(rows, teachers=scattered, teacher_rows=(index,) * len(scattered))
        result, other = run(moved)
        assert all(torch.equal(a, b) for a, b in zip(result, expected)) and torch.equal(other, gradient)


@each_rule
def test_no_rows_and_one_column(rule):
    result, gradient = run(example(rule, n=0, labels=torch.empty(0, dtype=torch.int64)))
    assert gradient.shape == (0, 17) and all(len(part) == 0 for part in result)
    result, gradient = run(example(rule, vocab=1, labels=torch.zeros(5, dtype=torch.int64)))
    assert not result.losses.any() and not gradient.any() and not result.targets.any()


@each_plain
def test_a_constant_added_to_a_row_changes_nothing(rule):
    """Exactly, where the sums are exact: logits on a grid of eighths, 4,096 added, in float32."""
    rows = example(rule)
    grid = [(t * 8).round() / 8 for t in (rows.student, *rows.teachers)]
    shift = torch.tensor([4096.0, -4096.0, 0.125, 0.0, 1024.0]).unsqueeze(1)
    # what ULD adds to some columns only depends on the assistant's level: the base alone can move there
    for moved in ([0], [1, 2] if rule.combination == "whp" else [1]):
        tensors = [t + shift if k in moved else t for k, t in enumerate(grid)]
        (a, ga), (b, gb) = (
            run(dataclasses.replace(rows, student=x[0].float(), teachers=tuple(t.float() for t in x[1:])))
            for x in (grid, tensors)
        )
        assert torch.equal(a.losses, b.losses) and torch.equal(ga, gb) and torch.equal(a.targets, b.targets)


@each_plain
def test_the_gradient_of_a_row_sums_to_zero(rule):
    _, gradient = run(example(rule))
    assert gradient.norm() > 0.01 and gradient.sum(-1).abs().max() < 1e-14


@each_plain
def test_a_ruled_out_column_is_as_good_as_none(rule):
    """-inf in every model: the same losses and gradients as without the column, and 0 for it."""
    rows = example(rule, labels=torch.tensor([0, 1, 2, 3, 4]))
    keep = torch.tensor([v for v in range(17) if v not in (5, 6, 11, 16)])
    for tensor in (rows.student, *rows.teachers):
        tensor[:, [5, 6, 11, 16]] = -INF
    result, gradient = run(rows)
    fewer = dataclasses.replace(
        rows, student=rows.student[:, keep], teachers=tuple(t[:, keep] for t in rows.teachers)
    )
    expected, expected_gradient = run(fewer)
    assert torch.equal(result.losses, expected.losses) or torch.allclose(
        result.losses, expected.losses, rtol=1e-14, atol=0
    )
    assert torch.equal(result.targets, keep[expected.targets] if rule.divergence != "label" else rows.labels)
    assert (gradient[:, keep] - expected_gradient).norm() < 1e-14 * gradient.norm()
    assert not gradient[:, [5, 6, 11, 16]].any() and torch.isfinite(gradient).all()


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.sampled_from([0.3, 1.0, 4.0]))
def test_divergences_are_divergences(seed, beta, temperature):
    s, t = normal(4, 9, seed=seed) * 3, normal(4, 9, seed=seed + 1) * 3

    def loss(divergence, student=s, teacher=t, beta=beta):
        rule = Rule.of(Identity(), None, divergence, beta=beta, temperature=temperature)
        return reference.row_losses(rows_of(student, teacher, rule=rule))

    forward, reverse, jsd = (loss(d).losses for d in ("forward_kl", "reverse_kl", "jsd"))
    assert (forward > 0).all() and (reverse > 0).all() and (jsd > 0).all()
    bound = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert (jsd <= bound + 1e-12).all()
    close = dict(rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(loss("reverse_kl", t, s).losses, forward, **close)
    torch.testing.assert_close(loss("jsd", t, s, 1 - beta).losses, jsd, **close)
    torch.testing.assert_close(loss("jsd", t, s, 0.5).losses, loss("jsd", beta=0.5).losses, **close)
    torch.testing.assert_close(loss("jsd", beta=0).losses, forward, **close)
    torch.testing.assert_close(loss("jsd", beta=1).losses, reverse, **close)
    soft = loss("cross_entropy")
    torch.testing.assert_close(soft.losses - soft.entropy, forward, **close)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        assert loss(divergence, t).losses.abs().max() < 1e-14


def test_small_beta_gives_the_slope_of_the_limits():
    s, t = normal(4, 9), normal(4, 9, seed=1)

    def loss(divergence, beta=0.5):
        return reference.row_losses(
            rows_of(s, t, rule=Rule.of(Identity(), None, divergence, beta=beta))
        ).losses

    torch.testing.assert_close(loss("jsd", 1e-6) / 1e-6, loss("forward_kl"), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss("jsd", 1 - 1e-6) / 1e-6, loss("reverse_kl"), rtol=1e-4, atol=0)


def test_where_the_student_gives_nothing():
    """A column with target mass that the student rules out: infinite where the formula says so."""
    student, target = torch.tensor([[-INF, 1.0, 2.0]]).double(), torch.tensor([[1.0, 0.5, 0.0]]).double()
    p_s, p_t = torch.softmax(student, -1), torch.softmax(target, -1)
    for divergence, expected in (("cross_entropy", INF), ("forward_kl", INF)):
        result, gradient = run(rows_of(student, target, rule=Rule.of(Identity(), None, divergence)))
        assert float(result.losses) == expected and torch.allclose(gradient, p_s - p_t, rtol=1e-14, atol=0)
    result, gradient = run(rows_of(student, rule=Rule(), labels=[0]))
    assert float(result.losses) == INF
    assert torch.allclose(gradient, p_s - torch.tensor([[1.0, 0, 0]]), rtol=1e-14, atol=0)
    reverse, gradient = run(rows_of(student, target, rule=Rule.of(Identity(), None, "reverse_kl")))
    kl = (p_s * (p_s / p_t).log()).nansum()
    assert float(reverse.losses) == pytest.approx(float(kl)) and float(gradient[0, 0]) == 0
    jsd, gradient = run(rows_of(student, target, rule=Rule.of(Identity(), None, "jsd", beta=0.5)))
    assert 0 < float(jsd.losses) < math.log(2) and float(gradient[0, 0]) == 0


def test_where_the_target_gives_nothing():
    student, target = torch.tensor([[1.0, 1.0, 2.0]]).double(), torch.tensor([[-INF, 0.5, 0.0]]).double()
    p_s, p_t = torch.softmax(student, -1), torch.softmax(target, -1)
    for divergence in ("cross_entropy", "forward_kl"):
        result, gradient = run(rows_of(student, target, rule=Rule.of(Identity(), None, divergence)))
        assert math.isfinite(result.losses) and torch.allclose(gradient, p_s - p_t, rtol=1e-14, atol=1e-16)
    rule = Rule.of(Identity(), None, "reverse_kl")
    assert float(reference.row_losses(rows_of(student, target, rule=rule)).losses) == INF
    jsd, gradient = run(rows_of(student, target, rule=Rule.of(Identity(), None, "jsd", beta=0.25)))
    m = 0.25 * p_t + 0.75 * p_s
    by_hand = 0.25 * torch.special.xlogy(p_t, p_t / m).sum() + 0.75 * (p_s * (p_s / m).log()).sum()
    assert float(jsd.losses) == pytest.approx(float(by_hand), rel=1e-13) and torch.isfinite(gradient).all()


def test_confident_students_keep_their_digits():
    """The loss at p = 1 - 1e-6 or an offset of 2,000, in float32: shifted by the maximum first."""
    for gap in (5.0, 14.0):
        student = torch.tensor([[2000.0, 2000 - gap, 1000.0]])
        result, gradient = run(rows_of(student, rule=Rule(), labels=[0]))
        exact = math.log1p(math.exp(-gap))
        assert float(result.losses) == pytest.approx(exact, rel=1e-7 / exact)
        assert float(gradient[0, 1]) == pytest.approx(math.exp(-gap) / (1 + math.exp(-gap)), rel=1e-6)
        result, _ = run(rows_of(student, rule=Rule(), labels=[1]))
        assert float(result.losses) == pytest.approx(gap + exact, rel=3e-7)
