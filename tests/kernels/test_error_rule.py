"""The rule and the cases of error_rule.py: right results pass, each kind of wrong one does not."""

import dataclasses
import math

import pytest
import torch
from error_rule import (
    CASES,
    DTYPES,
    FAMILIES,
    IGNORE,
    LAYOUTS,
    SAMPLE,
    assert_discriminates,
    assert_no_worse,
    assert_row_losses,
    relative_error,
)
from whp_kernels.losses import reference

INF, NAN = math.inf, math.nan


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# --------------------------------------------------------------------------------------------- relative error


def test_the_error_is_relative_to_the_truth():
    assert relative_error(doubles(3.0, 4.5), doubles(3.0, 4.0)) == pytest.approx(0.1)
    assert relative_error(doubles(3.0, 4.0) * 1e-9, doubles(3.0, 4.0) * 1e-9) == 0
    assert relative_error(doubles(0.0, 0.0), doubles(3.0, 4.0) * 1e-9) == pytest.approx(1)
    assert relative_error(doubles(-3.0, -4.0), doubles(3.0, 4.0)) == pytest.approx(2)


@pytest.mark.parametrize(
    "value, truth, error",
    [
        ([1.0, INF], [1.0, INF], 0),
        ([1.0, -INF], [1.0, INF], INF),
        ([1.0, NAN], [1.0, INF], INF),
        ([1.0, NAN], [1.0, NAN], 0),
        ([NAN, 1.0], [1.0, NAN], INF),
        ([1.0, 1.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, 1.0], INF),
        ([0.0, -0.0], [0.0, 0.0], 0),
        ([1e-30, 0.0], [0.0, 0.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0),
    ],
)
def test_infinities_nans_and_zeros_are_compared_by_place(value, truth, error):
    assert relative_error(doubles(*value), doubles(*truth)) == error


# --------------------------------------------------------------------------------------------------- the rule


def with_error(truth, size):
    """Float32 values whose relative error is ``size``, in every row."""
    return (truth * (1 + size)).float()


def test_twice_the_error_of_torch_is_allowed_and_no_more():
    truth = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).double()
    plain = with_error(truth, 1e-3)
    assert_no_worse(with_error(truth, 1.9e-3), plain, truth)
    assert_no_worse(with_error(truth, -1.9e-3), plain, truth)
    with pytest.raises(AssertionError, match="as a whole"):
        assert_no_worse(with_error(truth, 2.1e-3), plain, truth)
    assert_no_worse(with_error(truth, 2.9e-3), plain, truth, factor=3)
    assert_no_worse(with_error(truth, 2.1e-3), plain, truth, floor=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_rounding_is_allowed_where_torch_has_none(dtype):
    plain = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    truth = plain.double()
    assert_no_worse(plain, plain, truth)
    neighbour = plain.clone()  # an eighth of the values is off by a whole unit in the last place
    neighbour[:, ::8] = (truth[:, ::8] * (1 + torch.finfo(dtype).eps * 0.75)).to(dtype)
    assert not torch.equal(neighbour, plain)
    assert_no_worse(neighbour, plain, truth, floor=torch.finfo(dtype).eps / 2)
    with pytest.raises(AssertionError):
        assert_no_worse(
            (truth * (1 + 8 * torch.finfo(dtype).eps)).to(dtype),
            plain,
            truth,
            floor=None if dtype != torch.float32 else 5e-7,
        )


def test_a_wrong_small_row_is_seen_beside_large_ones():
    truth = torch.ones(3, 100, dtype=torch.float64)
    truth[1] *= 1e-8
    plain, value = with_error(truth, 1e-6), with_error(truth, 1e-6)
    assert_no_worse(value, plain, truth)
    for factor in (0, -1, 2):
        wrong = value.clone()
        wrong[1] *= factor
        assert relative_error(wrong, truth) < 3e-6
        with pytest.raises(AssertionError, match="worst row"):
            assert_no_worse(wrong, plain, truth)


def test_rows_that_should_be_zero_are_zero():
    truth = torch.ones(2, 5, dtype=torch.float64)
    truth[1] = 0
    plain = truth.float()
    assert_no_worse(plain.clone(), plain, truth)
    for value in (1e-20, NAN):
        wrong = plain.clone()
        wrong[1, 3] = value
        with pytest.raises(AssertionError):
            assert_no_worse(wrong, plain, truth)


def test_another_dtype_or_shape_is_no_result():
    truth = torch.ones(2, 5, dtype=torch.float64)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_no_worse(truth.bfloat16(), truth.float(), truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_no_worse(truth.float()[:, :4], truth.float(), truth)
    assert_no_worse(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0, 5, dtype=torch.float64))


def test_a_comparison_that_cannot_fail_is_refused():
    truth = torch.ones(2, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="shows nothing"):
        assert_no_worse(truth.float(), with_error(truth, 0.3), truth)
    with pytest.raises(ValueError, match="shows nothing"):
        assert_no_worse(truth.float(), truth.float(), truth, floor=0.5)
    with pytest.raises(ValueError, match="shows nothing"):  # torch is not zero where the truth is
        assert_no_worse(truth.float(), truth.float(), truth * 0)
    with pytest.raises(ValueError, match="expected float64"):
        assert_no_worse(truth.float(), truth.float(), truth.float())


# ------------------------------------------------------------------------------------------- discrimination


def test_a_sharp_check_discriminates():
    truth = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    seen = []

    def check(gradient):
        seen.append(gradient)
        assert_no_worse(gradient, truth.float(), truth)

    assert_discriminates(check, truth.float())
    assert len(seen) == 4  # right, zero, reversed, doubled: each was really looked at
    for factor, gradient in zip((1, 0, -1, 2), seen):
        assert torch.equal(gradient, truth.float() * factor)


@pytest.mark.parametrize("accepted", [0, -1, 2])
def test_a_check_that_accepts_a_wrong_factor_is_found_out(accepted):
    truth = torch.ones(3)

    def check(gradient):
        assert any(torch.equal(gradient, truth * factor) for factor in (1, accepted))

    with pytest.raises(AssertionError, match=f"factor of {accepted}$"):
        assert_discriminates(check, truth)


def test_an_absolute_tolerance_above_the_signal_is_found_out():
    gradient = torch.full((4, 100), 1e-3)
    with pytest.raises(AssertionError, match="factor of 0"):
        assert_discriminates(
            lambda g: torch.testing.assert_close(g, gradient, atol=5e-3, rtol=5e-2), gradient
        )


def test_discrimination_needs_a_right_gradient_that_is_not_zero():
    def nothing(gradient):
        pass

    def everything(gradient):
        raise AssertionError("no")

    with pytest.raises(ValueError, match="zero"):
        assert_discriminates(nothing, torch.zeros(3))
    with pytest.raises(AssertionError, match="^no$"):
        assert_discriminates(everything, torch.ones(3))

    def broken(gradient):
        if not torch.equal(gradient, torch.ones(3)):
            raise TypeError("a check that breaks has not judged")

    with pytest.raises(TypeError):
        assert_discriminates(broken, torch.ones(3))


# -------------------------------------------------------------------------------------------------- the cases


def case(family, layout="plain", dtypes="float32"):
    return next(c for c in CASES if (c.family.name, c.layout.name, c.dtypes) == (family, layout, dtypes))


def all_logits(rows):
    return [rows.student, *rows.teachers]


def test_every_family_meets_every_layout_and_all_dtypes():
    assert len({str(c) for c in CASES}) == len(CASES)
    assert {(c.family, c.layout) for c in CASES} == {(f, x) for f in FAMILIES for x in LAYOUTS}
    assert {(c.family, c.dtypes) for c in CASES} == {(f, d) for f in FAMILIES for d in DTYPES}
    assert set(SAMPLE) < set(CASES)
    for part, whole in (("family", FAMILIES), ("layout", LAYOUTS), ("dtypes", DTYPES)):
        assert {getattr(c, part) for c in SAMPLE} == set(whole)
    assert {x.vocab for x in LAYOUTS} >= {31, 999, 31999, 32001}
    assert {f.divergence for f in FAMILIES} >= {
        "label",
        "hard",
        "cross_entropy",
        "forward_kl",
        "reverse_kl",
        "jsd",
    }
    assert any(f.combination is not None and getattr(f.combination, "alpha", 1) == 0 for f in FAMILIES)


def test_rows_are_the_same_at_every_call_in_memory_of_their_own():
    for one in SAMPLE:
        first, second, wide = one.rows(), one.rows(), one.rows(wide=True)
        for a, b, c in zip(all_logits(first), all_logits(second), all_logits(wide)):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
            assert c.dtype == torch.float64 and torch.equal(a.double(), c)
            assert (a.dtype, a.stride(-1)) == (DTYPES[one.dtypes][0 if a is first.student else 1], 1) or (
                one.family.of_itself
            )
        assert first.count == one.layout.n and first.first.shape[1] == one.layout.vocab


def test_layouts_are_what_they_say():
    assert (case("label", "all ignored").rows().labels == IGNORE).all()
    rows = case("whp forward", "minus infinity").rows()
    assert all(torch.isneginf(x[:, :2100]).all() and torch.isfinite(x[:, -1]).all() for x in all_logits(rows))
    assert all(torch.isneginf(x[:, 2100:]).any() for x in all_logits(rows))
    rows = case("whp hard", "ties").rows()
    target = rows.teachers[0] - 5 * torch.relu(rows.teachers[1] - rows.teachers[0])
    for values in (rows.student, rows.teachers[0], target):
        assert ((values == values.amax(-1, keepdim=True)).sum(-1) > 1).all()
    rows = case("whp hard", "strided").rows()
    assert rows.student.stride() == (1004, 1) and rows.student.storage_offset() == 3
    assert rows.teachers[1].stride() == (0, 1)
    rows = case("whp hard", "shifted").rows()
    assert rows.student.storage_offset() == 5 * 999
    rows = case("whp hard", "gathered").rows()
    for index, teacher in zip(rows.teacher_rows, rows.teachers):
        assert teacher.shape[0] > len(index) > len(set(index.tolist())) and index[1] < 0
    rows = case("ce-u").rows()
    assert rows.teachers[0].data_ptr() == rows.student.data_ptr()
    tokens = case("whp hard mean").rows().edit_tokens
    assert (tokens == 998).any() and (tokens > 998).any()


def test_labels_depend_on_the_weight():
    changed = []
    for one in CASES:
        if "hard" in one.family.name and one.layout.name not in ("one row", "all ignored", "small"):
            rows = dataclasses.replace(one.rows(), student=None)
            labels, _ = reference.row_labels(rows, [5.0, 0.0, 0.625])
            changed += [bool((labels[0] != labels[1]).any()), bool((labels[0] != labels[2]).any())]
    assert sum(changed[::2]) > 0.7 * len(changed[::2]) and sum(changed[1::2]) > 0.2 * len(changed[1::2])


def test_a_case_whose_argmax_hangs_on_rounding_is_refused(monkeypatch):
    one = case("label", "small")
    rows = one.rows(wide=True)
    rows.student[0, 2:4] = torch.tensor([20.0, 20 * (1 + 1e-12)], dtype=torch.float64)
    narrow = dataclasses.replace(rows, student=rows.student.float())
    monkeypatch.setattr(type(one), "rows", lambda self, wide=False: rows if wide else narrow)
    with pytest.raises(ValueError, match="hangs on the rounding"):
        assert_row_losses(reference.row_losses, one)
