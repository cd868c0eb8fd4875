"""The compiled CPU backend against the reference, for each instruction set of this machine."""

import dataclasses
import math

import hypothesis
import pytest
import torch
from error_rule import CASES, SAMPLE, assert_row_labels, assert_row_losses
from hypothesis import strategies as st
from whp_kernels import extension
from whp_kernels.losses import cpp, reference
from whp_kernels.losses.rows import Rows
from whp_kernels.losses.rule import DIVERGENCES, Rule

if extension.load() is None:
    pytest.skip(extension.reason(), allow_module_level=True)

INF, NAN = math.inf, math.nan
HAS_TARGET = [case for case in CASES if case.family.combination and case.family.divergence != "label"]
SOFT = ("cross_entropy", "forward_kl", "reverse_kl", "jsd")


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request, monkeypatch):
    if request.param not in cpp.isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("WHP_KERNELS_ISA", request.param)
    assert cpp.isa() == request.param
    return request.param


def run(rows, row_scale=None, statistics=True, backend=cpp):
    """(losses and the rest, gradient) of a backend, the gradient in memory of its own."""
    gradient = torch.full(rows.student.shape, 7.0, dtype=rows.student.dtype)
    scale = torch.ones(rows.count) if row_scale is None else row_scale
    result = backend.row_losses(rows, statistics=statistics, row_scale=scale, gradient=gradient)
    return result, gradient


def assert_agree(rows, loss_tolerance=1e-5, gradient_tolerance=1e-5):
    """What the reference gives in float32: infinities, NaNs and indices exactly, numbers by norm."""
    (expected, expected_gradient), (result, gradient) = run(rows, backend=reference), run(rows)
    torch.testing.assert_close(
        result.losses, expected.losses, rtol=loss_tolerance, atol=loss_tolerance, equal_nan=True
    )
    torch.testing.assert_close(result.entropy, expected.entropy, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(result.targets, expected.targets)
    assert torch.equal(result.predicted, expected.predicted)
    finite = torch.isfinite(expected.losses)
    assert torch.isfinite(gradient[finite]).all()
    difference = (gradient[finite] - expected_gradient[finite]).double().norm(dim=1)
    scale = expected_gradient[finite].double().norm(dim=1)
    # p (log ratio - loss): the two halves are rounded numbers of the loss's size
    rounding = 1e-6 + 1e-6 * expected.losses[finite].double()
    assert (difference <= gradient_tolerance * scale + rounding).all(), difference
    assert torch.equal(gradient[~finite].isnan().any(1), expected_gradient[~finite].isnan().any(1))
    return result, gradient


def logits(n, vocab, seed, spread=3.0):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def rows_of(divergence, n=3, vocab=999, spread=3.0, **rule):
    """Rows of WHP (or of plain labels) with random logits."""
    if divergence == "label":
        labels = torch.arange(n) * 7 % vocab
        return Rows(logits(n, vocab, 0, spread), labels=labels, rule=Rule(**rule))
    teachers = (logits(n, vocab, 1, spread), logits(n, vocab, 2, spread))
    rule = Rule(combination="whp", weight=5.0, divergence=divergence, **rule)
    return Rows(logits(n, vocab, 0, spread), teachers, rule=rule)


# ------------------------------------------------------------------------------ the cases of the error rule


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients(case):
    assert_row_losses(cpp.row_losses, case)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_losses_and_gradients_of_each_instruction_set(case, isa):
    assert_row_losses(cpp.row_losses, case)


@pytest.mark.parametrize("case", HAS_TARGET, ids=str)
def test_labels(case):
    assert_row_labels(cpp.row_labels, case)


@pytest.mark.parametrize("vocab", [1, 2, 7, 15, 16, 17, 31, 256, 999, 1023, 1024, 1025, 31999, 32001])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocabularies(divergence, vocab, isa):
    assert_agree(rows_of(divergence, n=2, vocab=vocab))


def test_a_large_vocabulary_keeps_its_digits(isa):
    """Sums over 128,256 nearly equal terms, against float64: a running float32 sum would be off by 1e-4."""
    for divergence in DIVERGENCES:
        rows = rows_of(divergence, n=2, vocab=128_256, spread=0.5)
        exact = dataclasses.replace(
            rows, student=rows.student.double(), teachers=tuple(t.double() for t in rows.teachers)
        )
        (expected, truth), (result, gradient) = run(exact, backend=reference), run(rows)
        torch.testing.assert_close(result.losses.double(), expected.losses, rtol=5e-7, atol=0)
        assert (gradient.double() - truth).norm() <= 5e-7 * truth.norm()


# ------------------------------------------------------------------------------------- elementary functions


def test_exponentials_are_accurate(isa):
    """Two columns, 0 and x: the gradient at x is exp(x) / (1 + exp(x))."""
    x = -torch.linspace(0, 87.3, 100_001)
    student = torch.stack([torch.zeros_like(x), x], dim=1)
    labels = torch.zeros(len(x), dtype=torch.int64)
    _, gradient = run(Rows(student, labels=labels), statistics=False)
    truth = torch.sigmoid(x.double())
    error = (gradient.double() - torch.stack([-truth, truth], dim=1)).abs() / truth[:, None]
    assert error[:, 1].max() < 3 * 2**-23
    assert error[x > -10, 0].max() < 3 * 2**-23  # p - 1 of a p near 1


def test_logarithms_of_the_mixture_are_accurate(isa):
    """Two columns with log-ratios from small to large: the loss, of second order in them, keeps 5 digits."""
    for beta in (0.1, 0.5, 0.9):
        u = torch.cat([torch.logspace(-2, 1.5, 5001), -torch.logspace(-2, 1.5, 5001)])
        student = torch.stack([torch.zeros_like(u), torch.zeros_like(u)], dim=1)
        teacher = torch.stack([torch.zeros_like(u), u], dim=1)
        rows = Rows(student, (teacher,), rule=Rule("identity", divergence="jsd", beta=beta))
        exact = dataclasses.replace(rows, student=student.double(), teachers=(teacher.double(),))
        (expected, truth), (result, gradient) = run(exact, backend=reference), run(rows)
        error = (result.losses.double() - expected.losses).abs()
        assert (error <= 1e-5 * expected.losses + 2e-8).all()
        assert ((gradient.double() - truth).abs() <= 2e-6 * truth.abs() + 2e-8).all()


def test_soft_capping_is_accurate(isa):
    x = torch.cat([torch.linspace(-300, 300, 20_001), torch.logspace(-6, 2, 2001), torch.tensor([INF, -INF])])
    student = torch.stack([torch.zeros_like(x), x], dim=1)
    labels = torch.zeros(len(x), dtype=torch.int64)
    rows = Rows(student, labels=labels, rule=Rule(softcap=30.0))
    exact = dataclasses.replace(rows, student=student.double())
    (expected, truth), (result, gradient) = run(exact, backend=reference), run(rows)
    assert ((result.losses.double() - expected.losses).abs() <= 1e-6 * expected.losses + 1e-7).all()
    near = (
        x.abs() < 60
    )  # farther out, 1 - tanh^2 is a difference of nearly equal numbers, in the reference too
    error = (gradient[near, 1].double() - truth[near, 1]).abs()
    assert (error <= 1e-5 * truth[near, 1].abs() + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_number_is_read_and_written_like_torch(dtype, isa):
    """All 65,536 patterns and numbers between them as gradients: one rounding, ties and overflow included."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    labels = torch.zeros(len(numbers), dtype=torch.int64)
    student = torch.zeros(len(numbers), 2, dtype=dtype)
    # p of column 1 is 1/2, so its gradient is half the scale: numbers between the narrow ones are met, too
    for factor in (2.0, 2.0 * (1 + 2.0**-9), 2.0 * (1 + 2.0**-12), 1.0):
        scale = numbers.float() * factor
        gradient = torch.empty(len(numbers), 2, dtype=dtype)
        cpp.row_losses(Rows(student, labels=labels), row_scale=scale, gradient=gradient)
        expected = (scale * 0.5).to(dtype)
        assert torch.equal(gradient[:, 1].isnan(), expected.isnan())
        assert torch.equal(gradient[:, 1][~expected.isnan()], expected[~expected.isnan()])
    scale = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(
        torch.float32
    )  # NaN that rounding overflows
    gradient = torch.empty(2, 2, dtype=dtype)
    cpp.row_losses(Rows(student[:2], labels=labels[:2]), row_scale=scale, gradient=gradient)
    assert gradient.isnan().all()
    # read: the student's argmax among a number and zero tells its sign, the loss its value
    pairs = torch.stack([torch.zeros_like(numbers), numbers], dim=1)
    result = cpp.row_losses(Rows(pairs, labels=labels), statistics=True)
    expected = reference.row_losses(Rows(pairs.float(), labels=labels), statistics=True)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(result.predicted, expected.predicted)


# ---------------------------------------------------------------------------------------- rows of all kinds


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_scale_of_minus_two(divergence, isa):
    rows = rows_of(divergence)
    scale = torch.tensor([1.0, -2.0, 0.5])
    _, once = run(rows)
    _, scaled = run(rows, scale)
    assert once.norm(dim=1).min() > 1e-3
    assert (scaled - once * scale[:, None]).norm() < 1e-6 * once.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offsets(divergence, offset, isa):
    rows = rows_of(divergence)
    student = rows.student + offset  # rounds: the reference sees the same numbers
    teachers = tuple(t + offset for t in rows.teachers)
    assert_agree(dataclasses.replace(rows, student=student, teachers=teachers), 3e-4, 3e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_saturated_logits(divergence, isa):
    def saturated(seed):
        return (torch.rand(4, 2100, generator=torch.Generator().manual_seed(seed)) > 0.5).float() * 160 - 80

    rows = rows_of(divergence, n=4, vocab=2100)
    teachers = tuple(saturated(k) for k, _ in enumerate(rows.teachers))
    rows = dataclasses.replace(rows, student=saturated(7), teachers=teachers)
    assert_agree(dataclasses.replace(rows, labels=None if rows.labels is None else rows.student.argmax(1)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_unusable_rows_are_ignored(divergence, isa):
    """A NaN anywhere in a teacher, a target of -inf alone or with +inf; other rows are as without them."""
    if divergence == "label":
        return
    rows = rows_of(divergence, n=6, vocab=2500)
    base, reinforced = (t.clone() for t in rows.teachers)
    base[0, 2499], reinforced[1, 1700], base[2], base[3, 5] = NAN, NAN, -INF, INF
    base[4, 9], reinforced[4, 9] = -INF, NAN
    spoiled = dataclasses.replace(rows, teachers=(base, reinforced))
    result, gradient = assert_agree(spoiled)
    whole, whole_gradient = run(rows)
    assert result.losses[:5].tolist() == [0] * 5 and result.entropy[:5].tolist() == [0] * 5
    assert result.targets[:5].tolist() == [-100] * 5 and bool((gradient[:5] == 0).all())
    assert result.losses[5] == whole.losses[5] and torch.equal(gradient[5], whole_gradient[5])
    labels, own = cpp.row_labels(dataclasses.replace(spoiled, student=None), [5.0, 0.0])
    expected, expected_own = reference.row_labels(dataclasses.replace(spoiled, student=None), [5.0, 0.0])
    assert torch.equal(labels, expected) and torch.equal(own, expected_own)
    assert labels[0, :5].tolist() == [-100] * 5 and own[1] >= 0


@pytest.mark.parametrize("kind", ["identity", "offset", "difference", "student_offset"])
def test_unusable_rows_of_other_combinations(kind, isa):
    count = {"identity": 1, "offset": 2, "difference": 3, "student_offset": 2}[kind]
    name = "offset" if kind == "difference" else kind
    divergence = "label" if kind == "student_offset" else "forward_kl"
    rule = Rule(name, weight=0.5, divergence=divergence)
    teachers = [logits(5, 1300, k) for k in range(count)]
    for k in range(count):
        teachers[k][k, 1299 - k] = NAN
    teachers[0][3] = -INF
    labels = torch.arange(5) if kind == "student_offset" else None
    result, gradient = assert_agree(Rows(logits(5, 1300, 9), tuple(teachers), labels=labels, rule=rule))
    unusable = [*range(count), 3]
    assert result.targets[unusable].tolist() == [-100] * len(unusable) and result.targets[4] != -100
    assert bool((gradient[unusable] == 0).all())


def test_padded_columns_of_a_student_offset(isa):
    """-inf in all three: the sum is -inf there, not NaN."""
    padded = torch.arange(1300) >= 1100
    models = [torch.where(padded, -INF, logits(3, 1300, k)) for k in range(3)]
    rule = Rule("student_offset", weight=0.5, divergence="label")
    rows = Rows(models[0], tuple(models[1:]), labels=torch.tensor([0, 1099, 700]), rule=rule)
    result, gradient = assert_agree(rows)
    assert torch.isfinite(result.losses).all() and bool((gradient[:, padded] == 0).all())


def test_nan_of_the_target_alone(isa):
    """Both +inf in one column: the target is NaN there and finite elsewhere."""
    rows = rows_of("hard", n=2)
    base, reinforced = (t.clone() for t in rows.teachers)
    base[0, 3] = reinforced[0, 3] = INF
    result, _ = assert_agree(dataclasses.replace(rows, teachers=(base, reinforced)))
    assert result.targets[0] == -100 and result.targets[1] >= 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_of_the_student_is_not_hidden(divergence, value, isa):
    rows = rows_of(divergence, n=3, vocab=2500)
    student = rows.student.clone()
    student[1, 2400] = value
    result, gradient = run(dataclasses.replace(rows, student=student))
    assert result.losses.isnan().tolist() == [False, True, False]
    assert bool(gradient[1].isnan().all()) and not bool(gradient[[0, 2]].isnan().any())
    assert result.predicted[1] == (0 if math.isnan(value) else 2400)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_of_minus_infinity_alone(divergence, isa):
    rows = rows_of(divergence, n=2)
    student = rows.student.clone()
    student[0] = -INF
    result, gradient = run(dataclasses.replace(rows, student=student))
    assert result.losses.isnan().tolist() == [True, False] and result.predicted[0] == 0
    assert bool(gradient[0].isnan().all()) and not bool(gradient[1].isnan().any())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", ["first tiles", "last tiles", "scattered", "all but one"])
def test_columns_of_minus_infinity(divergence, where, isa):
    """In student and teachers alike, as padded vocabularies have them: losses stay finite."""
    vocab = 3100
    banned = torch.zeros(vocab, dtype=torch.bool)
    if where == "first tiles":
        banned[:2060] = True
    elif where == "last tiles":
        banned[500:] = True
    elif where == "scattered":
        banned = torch.rand(vocab, generator=torch.Generator().manual_seed(0)) < 0.5
    else:
        banned[:] = True
    banned[2070 if where == "first tiles" else 7] = False
    rows = rows_of(divergence, n=2, vocab=vocab)
    student, *teachers = (torch.where(banned, -INF, t) for t in (rows.student, *rows.teachers))
    labels = None if rows.labels is None else torch.full((2,), 2070 if where == "first tiles" else 7)
    rows = dataclasses.replace(rows, student=student, teachers=tuple(teachers), labels=labels)
    result, gradient = assert_agree(rows)
    assert torch.isfinite(result.losses).all() and bool((gradient[:, banned] == 0).all())


def test_infinite_losses(isa):
    """Where one distribution is zero and the other is not: as the formulas say."""
    for divergence in SOFT:
        rows = rows_of(divergence, n=2, vocab=2300)
        banned = rows.student.clone()
        banned[0, 1500:1503] = -INF
        result, _ = run(dataclasses.replace(rows, student=banned))
        assert result.losses.isinf().tolist() == [divergence in ("cross_entropy", "forward_kl"), False]
        base = rows.teachers[0].clone()
        base[0, 1500:1503] = -INF
        result, _ = run(dataclasses.replace(rows, teachers=(base, rows.teachers[1])))
        assert result.losses.isinf().tolist() == [divergence == "reverse_kl", False]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_no_infinite_loss_where_the_probability_is_zero_in_float32(divergence, isa):
    """A column 200 below the peak, though its tile's largest, has probability 0: 0 * log 0 adds nothing."""
    vocab = 3100
    peaked = torch.full((1, vocab), -300.0)
    peaked[0, 5], peaked[0, 2900] = 0.0, -200.0
    other = torch.zeros(1, vocab)
    other[0, 2900] = -INF
    student, teacher = (other, peaked) if divergence == "forward_kl" else (peaked, other)
    for flip in (False, True):
        order = torch.arange(vocab).flip(0) if flip else torch.arange(vocab)
        rows = Rows(student[:, order], (teacher[:, order],), rule=Rule("identity", divergence=divergence))
        assert torch.isfinite(assert_agree(rows)[0].losses).all()


def test_ties_give_the_lowest_index(isa):
    vocab = 2500
    for first, second in [(0, 1), (3, 2400), (1023, 1024), (17, 18), (2047, 2499)]:
        base = logits(1, vocab, 1).clamp(max=5)
        base[0, [first, second]] = 9.0
        rows = Rows(base, (base, base - 1), rule=Rule("whp", weight=5.0, divergence="hard"))
        result, _ = run(rows)
        assert result.targets.tolist() == [first] and result.predicted.tolist() == [first]
        labels, own = cpp.row_labels(dataclasses.replace(rows, student=None), [5.0])
        assert labels.tolist() == [[first]] and own.tolist() == [first]


def test_rising_logits(isa):
    """The peak moves in every tile."""
    rising = torch.linspace(-50, 40, 5000)[None]
    for divergence in DIVERGENCES:
        rows = rows_of(divergence, n=1, vocab=5000)
        labels = None if rows.labels is None else torch.tensor([4999])
        for flip in (False, True):
            student = rising.flip(1) if flip else rising
            teachers = tuple(rising * (0.5 + k) for k, _ in enumerate(rows.teachers))
            changed = dataclasses.replace(rows, student=student, teachers=teachers, labels=labels)
            if divergence != "reverse_kl" or not flip:  # that one is infinite in float32 on either side
                assert_agree(changed, 2e-5, 2e-5)


# ------------------------------------------------------------------------------------------- edits, filters


@pytest.mark.parametrize("edit", ["add", "ban", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits(edit, dtype, isa):
    """Repeated tokens (added twice), tokens past the vocabulary, in several tiles, in rows without any."""
    tokens = torch.tensor([0, 5, 5, 1023, 1024, 2299, 2300, 9000, 7, 7, 7])
    offsets = torch.tensor([0, 8, 8, 11])
    rows = rows_of("forward_kl", vocab=2300, edit=edit, edit_value=-1.5)
    teachers = [t.to(dtype) for t in rows.teachers]
    teachers[0][:, [0, 5, 7, 1023, 1024, 2299]] += 8  # what is edited weighs much
    rows = dataclasses.replace(
        rows,
        student=rows.student.to(dtype),
        teachers=tuple(teachers),
        edit_offsets=offsets,
        edit_tokens=tokens,
    )
    before = [t.clone() for t in rows.teachers]
    result, _ = assert_agree(dataclasses.replace(rows, student=rows.student.float()))
    assert all(torch.equal(a, b) for a, b in zip(before, rows.teachers))
    plain, _ = run(
        dataclasses.replace(rows, rule=dataclasses.replace(rows.rule, edit="none"), edit_offsets=None)
    )
    assert result.losses[0] != plain.losses[0] and result.losses[2] != plain.losses[2]
    labels, own = cpp.row_labels(dataclasses.replace(rows, student=None), [5.0, 0.0])
    expected, expected_own = reference.row_labels(dataclasses.replace(rows, student=None), [5.0, 0.0])
    assert torch.equal(labels, expected) and torch.equal(own, expected_own)


def test_negative_tokens_match_no_column(isa):
    rows = rows_of("forward_kl", n=1, vocab=2300, edit="ban")
    some = dataclasses.replace(rows, edit_offsets=torch.tensor([0, 2]), edit_tokens=torch.tensor([3, 2000]))
    more = dataclasses.replace(
        rows, edit_offsets=torch.tensor([0, 4]), edit_tokens=torch.tensor([-2_000_000, -1, 3, 2000])
    )
    assert torch.equal(run(some)[0].losses, run(more)[0].losses)


def test_edits_of_a_chunk_of_rows(isa):
    """Offsets that begin past 0 into the tokens of the whole batch."""
    rows = rows_of("forward_kl", edit="ban")
    tokens = rows.teachers[0].topk(3)[1].sort(1)[0].reshape(-1)
    rows = dataclasses.replace(rows, edit_offsets=torch.arange(0, 10, 3), edit_tokens=tokens)
    whole, gradient = run(rows)
    chunk = dataclasses.replace(
        rows,
        student=rows.student[1:],
        teachers=tuple(t[1:] for t in rows.teachers),
        edit_offsets=rows.edit_offsets[1:],
    )
    part, part_gradient = run(chunk)
    assert torch.equal(part.losses, whole.losses[1:]) and torch.equal(part_gradient, gradient[1:])


@pytest.mark.parametrize("divergence", ["hard", "cross_entropy", "forward_kl", "jsd"])
@pytest.mark.parametrize("outside", ["keep", "mask"])
@pytest.mark.parametrize("combination", ["identity", "whp", "offset", "difference"])
def test_relative_top(divergence, outside, combination, isa):
    count = {"identity": 1, "whp": 2, "offset": 2, "difference": 3}[combination]
    name = "offset" if combination == "difference" else combination
    rule = Rule(name, weight=0.7, relative_top=0.05, outside=outside, divergence=divergence)
    rows = Rows(logits(3, 2300, 9), tuple(logits(3, 2300, k) for k in range(count)), rule=rule)
    assert_agree(rows)
    if rows.rule.soft and outside == "mask":
        narrower = dataclasses.replace(rows, rule=dataclasses.replace(rule, relative_top=0.9))
        assert not torch.equal(run(narrower)[0].entropy, run(rows)[0].entropy)


def test_many_weights_at_once(isa):
    """More than are kept for one reading of a row."""
    rows = dataclasses.replace(rows_of("hard", vocab=2300), student=None)
    base = rows.teachers[0]
    reinforced = base + (base > 6) * (base - 6).square()  # the higher a logit, the more it is taken down
    rows = dataclasses.replace(rows, teachers=(base, reinforced))
    weights = [0.02 * k for k in range(37)]
    labels, own = cpp.row_labels(rows, weights)
    expected, expected_own = reference.row_labels(rows, weights)
    assert torch.equal(labels, expected) and torch.equal(own, expected_own)
    assert len(set(map(tuple, labels.tolist()))) > 3


def test_without_rows(isa):
    for divergence in DIVERGENCES:
        rows = rows_of(divergence, n=0)
        result, gradient = run(rows)
        assert [len(x) for x in result] == [0] * 4 and gradient.shape == (0, 999)
    labels, own = cpp.row_labels(dataclasses.replace(rows_of("hard", n=0), student=None), [1.0, 2.0])
    assert labels.shape == (2, 0) and own.shape == (0,)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_random_rows(data):
    """Any rule on rows with special values in them gives what the reference gives in float32."""
    draw = data.draw
    divergence = draw(st.sampled_from(DIVERGENCES))
    combination = draw(
        st.sampled_from(
            ["none", "student_offset"]
            if divergence == "label"
            else ["identity", "whp", "offset", "difference"]
        )
    )
    count = dict(none=0, identity=1, whp=2, offset=2, difference=3, student_offset=2)[combination]
    targeted = divergence != "label"
    n, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 10_000))
    random = torch.Generator().manual_seed(seed)

    def values(special):
        x = torch.randn(n, vocab, generator=random) * draw(st.sampled_from([0.1, 3.0, 30.0]))
        if draw(st.booleans()):
            x = x.round()
        for _ in range(draw(st.integers(0, 3))):
            row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, vocab - 1))
            x[row, column] = draw(st.sampled_from(special))
        return x

    student = values([-INF, 0.0, 80.0])
    teachers = [values([-INF, INF, NAN, 0.0, 80.0, -80.0]) for _ in range(count)]
    labels = torch.randint(0, vocab, (n,), generator=random)
    labels[torch.rand(n, generator=random) < 0.2] = -100
    rule = Rule(
        combination="offset" if combination == "difference" else combination,
        weight=draw(st.sampled_from([0.0, 0.5, 5.0, -1.0])),
        relative_top=draw(st.sampled_from([0.0, 0.1, 1.0])) if targeted else 0.0,
        outside=draw(st.sampled_from(["keep", "mask"])),
        edit=draw(st.sampled_from(["none", "add", "ban", "mean"])) if targeted else "none",
        edit_value=2.0,
        divergence=divergence,
        beta=draw(st.sampled_from([0.1, 0.5, 0.9])),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0])) if divergence in SOFT else 1.0,
        softcap=draw(st.sampled_from([0.0, 60.0])),  # saturated ones are as good as equal
    )
    offsets = tokens = None
    if rule.edit != "none":
        counts = torch.randint(0, 4, (n,), generator=random)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        tokens = torch.cat(
            [torch.randint(0, vocab + 2, (int(k),), generator=random).sort()[0] for k in counts]
        )
    use_labels = not targeted or draw(st.booleans())
    rows = Rows(
        student,
        tuple(teachers),
        labels=labels if use_labels else None,
        edit_offsets=offsets,
        edit_tokens=tokens,
        rule=rule,
    )
    if rule.soft:  # whether probabilities of denormal size count decides about infinities; here they are 0
        target = reference.target_logits(reference.teacher_logits(rows), rule)
        for one in (reference.softcapped(student, rule.softcap), target):
            p = torch.softmax(one.double() / rule.temperature, dim=-1)
            hypothesis.assume(not bool(((p > 1e-46) & (p < 2e-38)).any()))
    for name in cpp.isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WHP_KERNELS_ISA", name)
            assert_agree(rows, 2e-4, 2e-4)
            if targeted:
                target = dataclasses.replace(rows, student=None)
                labels_of, expected = (
                    cpp.row_labels(target, [0.0, 2.0]),
                    reference.row_labels(target, [0.0, 2.0]),
                )
                assert torch.equal(labels_of[0], expected[0]) and torch.equal(labels_of[1], expected[1])


# --------------------------------------------------------------------------------------- memory and threads


def test_the_student_is_its_own_teacher_in_place(isa):
    """CE-U in one piece of memory: student, teacher and gradient."""
    rule = Rule("identity", divergence="cross_entropy", edit="ban")
    shared = logits(5, 2300, 3)
    offsets, tokens = torch.arange(6), shared.argmax(1)
    rows = Rows(shared, (shared,), edit_offsets=offsets, edit_tokens=tokens, rule=rule)
    expected, gradient = run(rows, backend=reference)
    result = cpp.row_losses(rows, statistics=True, row_scale=torch.ones(5), gradient=shared)
    torch.testing.assert_close(result.losses, expected.losses)
    torch.testing.assert_close(shared, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("softcap", [0.0, 9.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_another_dtype(divergence, softcap, isa):
    """float32 logits, bfloat16 gradient and the reverse: one rounding of the float32 gradient."""
    rows = rows_of(divergence, softcap=softcap)
    _, exact = run(rows)
    scale = torch.ones(3)
    for dtype in (torch.bfloat16, torch.float16):
        gradient = torch.empty(exact.shape, dtype=dtype)
        cpp.row_losses(rows, row_scale=scale, gradient=gradient)
        assert torch.equal(gradient, exact.to(dtype))
        narrow = dataclasses.replace(rows, student=rows.student.to(dtype))
        wide = dataclasses.replace(rows, student=narrow.student.float())
        gradient = torch.empty(exact.shape)
        cpp.row_losses(narrow, row_scale=scale, gradient=gradient)
        assert torch.equal(gradient, run(wide)[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_threads_give_the_same_bits(divergence):
    rows = rows_of(divergence, n=37, vocab=1500)
    one, gradient = run(rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two, other = run(rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gradient, other) and all(torch.equal(a, b) for a, b in zip(one, two))


def test_offsets_past_two_to_the_31(isa):
    """Two rows 2^31 + 64 elements apart; only the pages of the rows are ever touched."""
    stride, vocab = 2**31 + 64, 1100
    try:
        memory = torch.empty(stride + vocab, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4.3 GB of addresses are not to be had")
    far = memory.as_strided((2, vocab), (stride, 1))
    near = logits(2, vocab, 0).bfloat16()
    far.copy_(near)
    labels = torch.tensor([3, 1099])
    expected, gradient = run(Rows(near, labels=labels))
    result = cpp.row_losses(Rows(far, labels=labels), statistics=True, row_scale=torch.ones(2), gradient=far)
    assert torch.equal(result.losses, expected.losses) and torch.equal(far, gradient)
    rows = Rows(
        None, (near, near), teacher_rows=(torch.tensor([1]), None), rule=Rule("whp", 1.0, divergence="hard")
    )
    far.copy_(near)
    gathered = dataclasses.replace(rows, teachers=(far, near))
    assert torch.equal(cpp.row_labels(gathered, [1.0])[0], cpp.row_labels(rows, [1.0])[0])


# --------------------------------------------------------------------------------------------------- errors


def test_float64_is_refused():
    rows = rows_of("label")
    with pytest.raises(ValueError, match="float64.*reference"):
        cpp.row_losses(dataclasses.replace(rows, student=rows.student.double()))
    with pytest.raises(ValueError, match="gradient.*float64"):
        cpp.row_losses(rows, row_scale=torch.ones(3), gradient=rows.student.double())
    with pytest.raises(ValueError, match="teacher 1.*float64"):
        teachers = (rows.student, rows.student.double())
        cpp.row_labels(Rows(None, teachers, rule=Rule("whp", divergence="hard")), [1.0])


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="on meta"):
        cpp.row_losses(Rows(torch.empty(2, 5, device="meta"), labels=torch.zeros(2, dtype=torch.int64)))


def test_spread_columns_are_refused():
    with pytest.raises(ValueError, match="stride is 2"):
        cpp.row_losses(Rows(torch.zeros(2, 10)[:, ::2], labels=torch.zeros(2, dtype=torch.int64)))


@pytest.mark.parametrize("label", [-1, 999])
def test_labels_outside_the_vocabulary_are_refused(label):
    labels = torch.tensor([0, label, -100])
    with pytest.raises(ValueError, match="outside the vocabulary of 999"):
        cpp.row_losses(dataclasses.replace(rows_of("label"), labels=labels))
    arguments = cpp._target(dataclasses.replace(rows_of("label"), labels=labels))
    with pytest.raises(
        RuntimeError, match="outside the vocabulary"
    ):  # the operator itself does not trust its caller
        floats, ints = torch.empty(3), torch.empty(3, dtype=torch.int64)
        torch.ops.whp_kernels_C.row_losses(
            rows_of("label").student,
            *arguments,
            "label",
            0.5,
            1.0,
            False,
            None,
            None,
            floats,
            ints,
            floats,
            ints,
        )


def test_gathered_rows_outside_are_refused():
    rows = dataclasses.replace(rows_of("hard"), teacher_rows=(torch.tensor([0, 1, 3]), None))
    with pytest.raises(ValueError, match=r"teacher_rows\[0\] holds 3, but teacher 0 has 3 rows"):
        cpp.row_losses(rows)


def test_a_gradient_over_gathered_teachers_is_refused():
    rows = rows_of("hard")
    index = torch.tensor([1, 0, 2])
    rows = dataclasses.replace(rows, teachers=(rows.student, rows.teachers[1]), teacher_rows=(index, None))
    with pytest.raises(ValueError, match="gradient shares its memory with teacher 0"):
        cpp.row_losses(rows, row_scale=torch.ones(3), gradient=rows.student)
    with pytest.raises(ValueError, match="rows overlap"):
        cpp.row_losses(rows, row_scale=torch.ones(3), gradient=torch.zeros(1, 999).expand(3, -1))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("WHP_KERNELS_ISA", "mmx")
    with pytest.raises(ValueError, match="WHP_KERNELS_ISA is 'mmx'; this machine has .*portable"):
        cpp.row_losses(rows_of("label"))
