"""Checks of the Triton row kernels, in the interpreter or on a GPU; test_triton_rows.py runs them.

Triton's interpreter rounds bfloat16 towards zero when it stores, float16 as a GPU does. So there the
gradients of the common cases are stored in float32 where bfloat16 is asked for, and what is said about one
rounding is checked with float16.
"""

import dataclasses
import functools
import math
import os

import hypothesis
import pytest
import torch
from error_rule import CASES, assert_row_labels, assert_row_losses, relative_error
from hypothesis import strategies as st
from whp_kernels.losses import reference, triton
from whp_kernels.losses.combination import RowEdits
from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.rule import DIVERGENCES, SOFT, Rule
from whp_kernels.losses.triton import RowTile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
INF, NAN = math.inf, math.nan
# every 15th: 15 has no factor in common with the 19 families, and each layout and set of dtypes has 19 cases
SOME_CASES = CASES[::15]
SOME_LABELS = [c for c in CASES[3::29] if c.family.combination and c.family.divergence != "label"]

# NumPy's warnings about inf - inf and NaN; the interpreter computes with it
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---------------------------------------------------------------------------------------------------- running


def moved(tensor, seen):
    """The tensor on the device, in memory laid out (and shared with others) as here."""
    if tensor is None or INTERPRETED:
        return tensor
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in seen:
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        seen[storage.data_ptr()] = (flat, flat.to(DEVICE))
    there = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
    there.set_(
        seen[storage.data_ptr()][1].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return there


def moved_rows(rows, seen):
    return dataclasses.replace(
        rows,
        student=moved(rows.student, seen),
        teachers=tuple(moved(t, seen) for t in rows.teachers),
        teacher_rows=tuple(moved(t, seen) for t in rows.teacher_rows),
        labels=moved(rows.labels, seen),
        edit_offsets=moved(rows.edit_offsets, seen),
        edit_tokens=moved(rows.edit_tokens, seen),
    )


def row_losses(rows, *, statistics=True, row_scale=None, gradient=None, tile=None):
    seen = {}
    there, scale, target = moved_rows(rows, seen), moved(row_scale, seen), moved(gradient, seen)
    if INTERPRETED and gradient is not None and gradient.dtype == torch.bfloat16:
        target = torch.empty(gradient.shape)
    result = triton.row_losses(there, statistics=statistics, row_scale=scale, gradient=target, tile=tile)
    for here, copy in seen.values():
        here.copy_(copy)
    if target is not None and INTERPRETED and target is not gradient:
        gradient.copy_(target)
    return RowLosses(*(part.cpu() for part in result))


def row_labels(rows, weights, tile=None):
    labels, own = triton.row_labels(moved_rows(rows, {}), weights, tile=tile)
    return labels.cpu(), own.cpu()


def tile_for(vocab):
    """Several tiles for every vocabulary, and few: a tile takes the interpreter a few milliseconds."""
    return RowTile(min(16384, 1 << max((vocab // 2).bit_length(), 3)), 4)


def assert_agree(rows, tile, tolerance=2e-5):
    """What the reference gives in float64, from the same numbers; infinities, NaNs and indices exactly."""
    n, vocab = rows.student.shape
    scale = torch.linspace(0.5, 1.5, n)
    expected_gradient = torch.empty(n, vocab, dtype=torch.float64)
    wide = dataclasses.replace(
        rows, student=rows.student.double(), teachers=tuple(t.double() for t in rows.teachers)
    )
    expected = reference.row_losses(wide, statistics=True, row_scale=scale, gradient=expected_gradient)
    gradient = torch.full((n, vocab), 7.0)
    result = row_losses(rows, row_scale=scale, gradient=gradient, tile=tile)
    torch.testing.assert_close(
        result.losses.double(), expected.losses, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    torch.testing.assert_close(
        result.entropy.double(), expected.entropy, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    assert torch.equal(result.targets, expected.targets), (result.targets, expected.targets)
    assert torch.equal(result.predicted, expected.predicted), (result.predicted, expected.predicted)
    for row, truth, loss in zip(gradient, expected_gradient, expected.losses):
        if math.isfinite(loss):
            assert torch.isfinite(row).all()
            assert (row.double() - truth).norm() <= tolerance * truth.norm() + 1e-7
        else:
            assert torch.equal(row.isnan().any(), truth.isnan().any())
    return result, gradient


def logits(n, vocab, seed, spread=3.0):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def rows_of(divergence, n=2, vocab=75, **rule):
    """Rows of WHP (or of plain labels) with random logits."""
    if divergence == "label":
        return Rows(logits(n, vocab, 0), labels=torch.arange(n) * 7 % vocab, rule=Rule(**rule))
    teachers = (logits(n, vocab, 1), logits(n, vocab, 2))
    given = {"combination": "whp", "weight": 2.0} | rule
    return Rows(
        logits(n, vocab, 0), teachers[: 1 if given["combination"] == "identity" else 2],
        rule=Rule(divergence=divergence, **given),
    )  # fmt: skip


# -------------------------------------------------------------------------------- the cases of the error rule


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_cases_of_losses(case):
    assert_row_losses(functools.partial(row_losses, tile=tile_for(case.layout.vocab)), case)


@pytest.mark.parametrize("case", SOME_LABELS, ids=str)
def test_cases_of_labels(case):
    assert_row_labels(functools.partial(row_labels, tile=tile_for(case.layout.vocab)), case)


@pytest.mark.parametrize("part", ["family", "layout", "dtypes"])
def test_cases_cover_everything(part):
    assert {str(getattr(c, part)) for c in SOME_CASES} == {str(getattr(c, part)) for c in CASES}


# ----------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("divergence", ["hard", "jsd"])
def test_values_at_edges_of_tiles(divergence, vocab):
    assert_agree(rows_of(divergence, n=1, vocab=vocab), RowTile(32, 4))


def test_values_with_the_tiles_that_are_chosen():
    for vocab in (75, 2049):
        for dtype in (torch.float32, torch.bfloat16):
            rows = rows_of("forward_kl", n=1, vocab=vocab)
            rows = dataclasses.replace(
                rows, student=rows.student.to(dtype), teachers=tuple(t.to(dtype) for t in rows.teachers)
            )
            assert_agree(rows, None)
            assert torch.equal(row_labels(rows, [2.0])[0], reference.row_labels(rows, [2.0])[0])


@pytest.mark.parametrize("first, second", [(4, 6), (3, 5), (5, 70), (31, 32), (32, 63), (0, 74), (64, 73)])
def test_values_of_ties_are_at_the_lowest_column(first, second):
    rows = rows_of("forward_kl", n=1)
    for tensor in (rows.student, *rows.teachers):
        tensor[0, first] = tensor[0, second] = 30.0
    result, _ = assert_agree(rows, RowTile(32, 4))
    assert result.targets.tolist() == result.predicted.tolist() == [first]
    labels, own = row_labels(rows, [2.0], RowTile(32, 4))
    assert labels.tolist() == [[first]] and own.tolist() == [first]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_do_not_depend_on_an_offset(divergence):
    """Logits at 2^14 have steps of 2^-9: on such a grid a common offset is exact, and nothing may change."""
    rows = rows_of(divergence)
    rows = dataclasses.replace(
        rows,
        student=(rows.student * 512).round() / 512,
        teachers=tuple((t * 512).round() / 512 for t in rows.teachers),
    )
    far = dataclasses.replace(
        rows, student=rows.student - 16000, teachers=tuple(t + 16000 for t in rows.teachers)
    )
    gradient, far_gradient = torch.empty(2, 2, 75)
    near = row_losses(rows, row_scale=torch.ones(2), gradient=gradient, tile=RowTile(32, 4))
    away = row_losses(far, row_scale=torch.ones(2), gradient=far_gradient, tile=RowTile(32, 4))
    for name, one, other in zip(RowLosses._fields, near, away):
        assert torch.equal(one, other), name
    assert torch.equal(gradient, far_gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_of_minus_infinity(divergence):
    """Tiles at the beginning, the middle and the end that are wholly -inf, in student and teachers."""
    rows = rows_of(divergence, n=3, vocab=130)
    for tensor in (rows.student, *rows.teachers):
        tensor[0, :32], tensor[0, 64:96], tensor[1, 40:], tensor[2, :129] = (-INF,) * 4
    if rows.labels is not None:
        rows = dataclasses.replace(rows, labels=torch.tensor([40, 3, 129]))
    result, _ = assert_agree(rows, RowTile(32, 4))
    assert torch.isfinite(result.losses).all() and result.losses[2] == 0


@pytest.mark.parametrize("divergence", SOFT)
def test_values_where_only_one_side_is_minus_infinity(divergence):
    rows = rows_of(divergence, n=2)
    rows.student[0, 3:40], rows.teachers[0][1, 3:40] = -INF, -INF
    result, _ = assert_agree(rows, RowTile(32, 4))
    where = {"reverse_kl": 1, "jsd": None}.get(divergence, 0)
    assert result.losses.isinf().tolist() == [row == where for row in range(2)]


def test_values_that_underflow_later_leave_no_nan():
    """The target's mass of the first tiles vanishes beside the last one's; there the student is -inf."""
    for divergence in SOFT:
        rows = rows_of(divergence, n=1)
        for tensor in rows.teachers:
            tensor[0, :64] -= 300
        if divergence == "reverse_kl":
            rows.student[0, :64], rows.teachers[0][0, :64] = rows.student[0, :64] - 300, -INF
        else:
            rows.student[0, :64] = -INF
        gradient = torch.empty(1, 75)
        result = row_losses(rows, row_scale=torch.ones(1), gradient=gradient, tile=RowTile(32, 4))
        plain = reference.row_losses(
            rows, statistics=True, row_scale=torch.ones(1), gradient=gradient.clone()
        )
        assert math.isfinite(plain.losses), "the case is not what it should be"
        torch.testing.assert_close(result.losses, plain.losses, rtol=1e-5, atol=1e-6)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("divergence", ["hard", "jsd"])
def test_values_of_unusable_rows(divergence):
    rows = rows_of(divergence, n=7, vocab=96)  # full tiles: no column outside the row hides an infinite sum
    base, second = rows.teachers
    base[0, 5] = NAN
    second[1, 70] = NAN
    base[2, 7], second[2, 7] = -INF, NAN  # the combination alone would hide it
    base[3] = -INF
    base[4, 9] = INF
    base[5, 9], second[5, 9] = -INF, INF  # usable
    result, gradient = assert_agree(rows, RowTile(32, 4))
    unusable = [True, True, True, True, True, False, False]
    assert (result.targets == rows.ignore_index).tolist() == unusable
    for row in range(5):
        assert result.losses[row] == result.entropy[row] == 0 and not gradient[row].any()
    labels, own = row_labels(rows, [2.0, 0.5], RowTile(32, 4))
    expected, expected_own = reference.row_labels(rows, [2.0, 0.5])
    assert torch.equal(labels, expected) and torch.equal(own, expected_own)
    assert own[1] >= 0 and own[2] >= 0, "the first teacher's own choice does not hang on the second"


@pytest.mark.parametrize("outside", ["keep", "mask"])
def test_values_of_a_filtered_nan_and_a_row_of_it(outside):
    rows = rows_of("hard", n=3, relative_top=0.5, outside=outside)
    base, second = rows.teachers
    base[:, 3] += 20.0
    second[0, 70] = NAN  # a column that the filter takes out
    base[1, 70] = NAN
    result, _ = assert_agree(rows, RowTile(32, 4))
    assert (result.targets == rows.ignore_index).tolist() == [True, True, False]


@pytest.mark.parametrize("outside", ["keep", "mask"])
def test_values_of_a_filter_that_only_the_maximum_passes(outside):
    rows = rows_of("forward_kl", relative_top=1.0, outside=outside)
    assert_agree(rows, RowTile(32, 4))


def test_values_of_unusable_rows_of_student_offset():
    labels = torch.tensor([4, 5, 6, 7])
    rows = Rows(
        logits(4, 75, 0),
        (logits(4, 75, 1), logits(4, 75, 2)),
        labels=labels,
        rule=Rule("student_offset", 0.75, divergence="label"),
    )
    rows.teachers[0][0, 3], rows.teachers[1][1, 70], rows.teachers[0][2, 8] = NAN, NAN, INF
    result, _ = assert_agree(rows, RowTile(32, 4))
    assert (result.targets == rows.ignore_index).tolist() == [True, True, True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_of_a_broken_student_are_not_hidden(divergence):
    rows = rows_of(divergence, n=4)
    rows.student[0, 70], rows.student[1, 3], rows.student[2] = NAN, INF, -INF
    result, gradient = assert_agree(rows, RowTile(32, 4))
    assert result.losses.isnan().tolist() == [True, True, True, False]
    assert gradient.isnan().all(dim=1)[[0, 2]].all() and gradient[1].isnan().any()


def test_values_of_a_label_outside_the_vocabulary_are_nan():
    rows = dataclasses.replace(rows_of("label", n=3), labels=torch.tensor([75, -1, 74]))
    result = row_losses(rows, tile=RowTile(32, 4))
    assert result.losses.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("kind", ["add", "ban", "mean"])
def test_values_of_edits_at_edges_of_tiles(kind):
    tokens = [[0], [31, 32, 63, 64, 74], [], [33, 33, 33, 5, 5, 75, 95, 1000, 74]]
    offsets = torch.tensor([0, *(len(row) for row in tokens)]).cumsum(0)
    edits = RowEdits(offsets, torch.tensor(sum(tokens, [])), kind, 1.25)
    for divergence, rule in (
        ("jsd", {"combination": "identity"}),
        ("hard", {"relative_top": 0.2}),
    ):
        rows = rows_of(divergence, n=4, edit=kind, edit_value=1.25, **rule)
        rows = dataclasses.replace(rows, edit_offsets=edits.offsets, edit_tokens=edits.tokens)
        assert_agree(rows, RowTile(32, 4))
    labels, own = row_labels(rows, [2.0], RowTile(32, 4))
    expected, expected_own = reference.row_labels(rows, [2.0])
    assert torch.equal(labels, expected) and torch.equal(own, expected_own)


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.data())
def test_values_of_any_edits(data):
    vocab = data.draw(st.integers(1, 40))
    tokens = [data.draw(st.lists(st.integers(0, vocab + 9), max_size=12)) for _ in range(2)]
    kind = data.draw(st.sampled_from(["add", "ban", "mean"]))
    offsets = torch.tensor([0, *(len(row) for row in tokens)]).cumsum(0)
    edits = RowEdits(offsets, torch.tensor(sum(tokens, []), dtype=torch.int64), kind, -0.5)
    rows = rows_of(
        data.draw(st.sampled_from(["hard", "forward_kl", "jsd"])),
        vocab=vocab, combination="identity", edit=kind, edit_value=-0.5,
    )  # fmt: skip
    rows = dataclasses.replace(rows, edit_offsets=edits.offsets, edit_tokens=edits.tokens)
    assert_agree(rows, RowTile(16, 1))


@pytest.mark.parametrize("divergence", ["hard", "forward_kl", "jsd"])
def test_values_are_rounded_once(divergence):
    """The float16 gradient is the float32 one rounded, bit for bit, in memory of its own and in the
    student's."""
    rows = rows_of(divergence)
    rows = dataclasses.replace(rows, student=rows.student.half())
    scale = torch.tensor([0.3, 1.7])
    exact, rounded = torch.empty(2, 75), torch.empty(2, 75, dtype=torch.float16)
    row_losses(rows, row_scale=scale, gradient=exact, tile=RowTile(32, 4))
    row_losses(rows, row_scale=scale, gradient=rounded, tile=RowTile(32, 4))
    assert torch.equal(rounded, exact.half())
    row_losses(rows, row_scale=scale, gradient=rows.student, tile=RowTile(32, 4))
    assert torch.equal(rows.student, rounded)


def test_values_of_a_confident_label():
    """``p - 1`` where p is nearly 1: 1 - p to 1%, in float32 and in float16."""
    student = torch.zeros(1, 75)
    student[0, 40] = 14.0  # 1 - p = 6.2e-5
    for dtype in (torch.float32, torch.float16):
        gradient = torch.empty(1, 75, dtype=dtype)
        rows = Rows(student.to(dtype), labels=torch.tensor([40]))
        row_losses(rows, row_scale=torch.full((1,), 100.0), gradient=gradient, tile=RowTile(32, 4))
        truth = 100 * (torch.softmax(student.double(), 1)[0, 40] - 1)
        assert abs(float(gradient[0, 40]) / float(truth) - 1) < 0.01


def test_values_of_the_softcap():
    """The soft cap's tanh, from its polynomial to where it is 1, through the losses and the slope."""
    for center in (0.0, 0.6, 3.0):
        student = (center + logits(2, 75, 3, 0.3)) * 10.0
        rows = Rows(student, labels=torch.tensor([4, 74]), rule=Rule(softcap=10.0))
        assert_agree(rows, RowTile(32, 4))
    # a low cap: columns outside the row, at -cap instead of -inf, would weigh as much as others.
    # The logits are small: where tanh is 1 in float32 the highest columns would be equal.
    rows = rows_of("forward_kl", softcap=0.5)
    small = dataclasses.replace(
        rows, student=rows.student * 0.05, teachers=tuple(t * 0.05 for t in rows.teachers)
    )
    assert_agree(small, RowTile(32, 4))


# -------------------------------------------------------------------------------------------------- arguments


@pytest.mark.skipif(not INTERPRETED, reason="4 GB of the host would be copied")
def test_arguments_of_rows_behind_two_billion_elements():
    """Strides that fit into 32 bits, and offsets that do not. The pages between the rows are never
    touched."""
    stride = 2**30 + 64
    memory = torch.empty(2 * stride + 75, dtype=torch.bfloat16)
    far = memory.as_strided((3, 75), (stride, 1))
    rows = rows_of("forward_kl", n=3)
    near = rows.student.bfloat16()
    far.copy_(near)
    gradient, expected = torch.empty(2, 3, 75)
    options = {"row_scale": torch.ones(3), "tile": RowTile(32, 4)}
    row_losses(dataclasses.replace(rows, student=far), gradient=gradient, **options)
    row_losses(dataclasses.replace(rows, student=near), gradient=expected, **options)
    assert torch.equal(gradient, expected) and bool(expected.any())
    triton.row_losses(dataclasses.replace(rows, student=near), gradient=far, **options)
    assert relative_error(far.float(), expected.double()) < 0.01  # bfloat16, maybe towards zero
    far.copy_(near)
    there = row_labels(dataclasses.replace(rows, teachers=(rows.student, far)), [2.0])
    here = row_labels(dataclasses.replace(rows, teachers=(rows.student, near)), [2.0])
    assert torch.equal(there[0], here[0]) and torch.equal(there[1], here[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_arguments_that_share_memory(dtype):
    """The student is the first teacher, and the gradient goes over both."""
    rows = rows_of("forward_kl")
    student = rows.student.to(dtype)
    apart = dataclasses.replace(rows, student=student, teachers=(student.clone(), rows.teachers[1].to(dtype)))
    shared = dataclasses.replace(apart, teachers=(student, apart.teachers[1]))
    expected = torch.empty(2, 75, dtype=dtype)
    options = {"row_scale": torch.ones(2), "tile": RowTile(32, 4)}
    before = row_losses(apart, gradient=expected, **options)
    after = row_losses(shared, gradient=student, **options)
    assert torch.equal(student, expected) and torch.equal(before.losses, after.losses)


def test_arguments_without_rows():
    rows = rows_of("forward_kl", n=0)
    result = row_losses(rows, row_scale=torch.ones(0), gradient=torch.empty(0, 75))
    assert [len(part) for part in result] == [0, 0, 0, 0]
    labels, own = row_labels(rows, [1.0, 2.0])
    assert labels.shape == (2, 0) and own.shape == (0,)


def refused(match, rows, **options):
    with pytest.raises(ValueError, match=match):
        row_losses(rows, **options)


def test_arguments_that_are_refused():
    rows = rows_of("forward_kl")
    refused("float64", dataclasses.replace(rows, student=rows.student.double()))
    refused("adjacent columns", dataclasses.replace(rows, student=logits(75, 2, 0).T))
    refused("no columns", rows_of("forward_kl", vocab=0))
    refused("needs labels", dataclasses.replace(rows_of("label"), labels=None))
    refused("needs row_scale", rows, gradient=torch.empty(2, 75))
    refused("teacher 1 has no rows", dataclasses.replace(rows, teachers=(rows.teachers[0], logits(0, 75, 1))))
    gathered = dataclasses.replace(
        rows, teachers=(rows.student, rows.teachers[1]), teacher_rows=(torch.tensor([1, 0]), None)
    )
    refused("teacher 0, whose rows", gathered, row_scale=torch.ones(2), gradient=rows.student)
    half = torch.empty(0, dtype=torch.float16).set_(rows.student.untyped_storage(), 0, (2, 75), (75, 1))
    refused("another layout", rows, row_scale=torch.ones(2), gradient=half)
    with pytest.raises(ValueError, match="float64"):
        row_labels(dataclasses.replace(rows, teachers=tuple(t.double() for t in rows.teachers)), [1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arguments_of_scale(dtype):
    values = logits(3, 8193, 0).to(dtype).to(DEVICE)
    for factor in (0.25, -1.0, 0.0):  # exact in every dtype
        scaled = values.clone()
        assert triton.scale_(scaled, torch.tensor(factor, device=DEVICE)) is scaled
        assert torch.equal(scaled, values * factor)
    scaled = values.clone()
    triton.scale_(scaled, torch.ones(1, dtype=dtype, device=DEVICE))
    assert torch.equal(scaled, values)
    if dtype != torch.bfloat16 or not INTERPRETED:
        triton.scale_(scaled, torch.tensor(1.1, device=DEVICE))
        assert torch.equal(scaled, (values.float() * 1.1).to(dtype))
    triton.scale_(values[:0], torch.tensor(2.0, device=DEVICE))


def test_arguments_of_scale_that_are_refused():
    one = torch.ones(1, device=DEVICE)
    for tensor, scale, match in (
        (torch.ones(2, dtype=torch.float64, device=DEVICE), one, "float64"),
        (torch.ones(4, 4, device=DEVICE)[:, :2], one, "contiguous"),
        (torch.ones(4, device=DEVICE), torch.ones(2, device=DEVICE), "one number"),
    ):
        with pytest.raises(ValueError, match=match):
            triton.scale_(tensor, scale)
