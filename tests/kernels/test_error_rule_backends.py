"""Right backends pass the cases of error_rule.py, and each kind of wrong one fails."""

import dataclasses
import math

import pytest
import torch
from error_rule import CASES, IGNORE, LAYOUTS, SAMPLE, assert_row_labels, assert_row_losses
from test_error_rule import case
from whp_kernels.losses import reference
from whp_kernels.losses.combination import RowEdits


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
def test_the_reference_passes(layout):
    for one in CASES:
        if one.layout == layout:
            assert_row_losses(reference.row_losses, one)


def test_labels_of_the_reference_pass():
    for one in CASES:
        if one.rows().rule.combination not in ("none", "student_offset"):
            assert_row_labels(reference.row_labels, one)


def in_another_order(rows, *, statistics, row_scale, gradient):
    """A right implementation that sums over the columns in another order, so that it rounds differently."""
    vocab = rows.first.shape[1]
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(2))
    place = torch.empty_like(order)
    place[order] = torch.arange(vocab)
    student = rows.student[:, order]
    moved = dataclasses.replace(
        rows,
        student=student,
        teachers=tuple(student if t is rows.student else t[:, order] for t in rows.teachers),
        labels=None
        if rows.labels is None
        else torch.where(rows.labels == IGNORE, IGNORE, place[rows.labels.clamp(min=0)]),
    )
    if rows.edit_tokens is not None:
        tokens = torch.cat([place, torch.arange(vocab, vocab + 8)])[rows.edit_tokens]
        moved = dataclasses.replace(moved, edit_tokens=RowEdits(rows.edit_offsets, tokens, "ban").tokens)
    indices = reference.row_losses(rows, statistics=statistics, row_scale=None, gradient=None)
    shuffled = None if gradient is None else torch.empty(gradient.shape, dtype=gradient.dtype)
    result = reference.row_losses(moved, statistics=statistics, row_scale=row_scale, gradient=shuffled)
    if gradient is not None:
        gradient.copy_(shuffled[:, place])
    return result._replace(targets=indices.targets, predicted=indices.predicted)


def test_a_right_backend_that_rounds_differently_passes():
    for one in SAMPLE:
        if one.layout.name != "ties" or not one.family.divergence == "hard":
            assert_row_losses(in_another_order, one)


WRONG = {}


def wrong(message, family, layout="plain", dtypes="float32"):
    """Registers ``spoil(rows, result, gradient, statistics)``, made to what the reference gives on that case;
    what it returns replaces the result. ``message``: how the check complains."""

    def register(spoil):
        def row_losses(rows, *, statistics, row_scale, gradient):
            result = reference.row_losses(rows, statistics=statistics, row_scale=row_scale, gradient=gradient)
            return spoil(rows, result, gradient, statistics) or result

        WRONG[spoil.__name__] = (message, case(family, layout, dtypes), row_losses)
        return spoil

    return register


def wrong_rows(name, message, family, layout, change):
    """Registers the reference on ``change(rows)``."""
    WRONG[name] = (
        message,
        case(family, layout),
        lambda rows, **how: reference.row_losses(change(rows), **how),
    )


def wrong_gradient(name, message, family, layout, dtypes, change):
    """Registers the reference with ``gradient`` replaced by ``change(rows, gradient)``."""

    def spoil(rows, result, gradient, statistics):
        if gradient is not None:
            gradient.copy_(change(rows, gradient))

    spoil.__name__ = name
    wrong(message, family, layout, dtypes)(spoil)


def without(column):
    return lambda rows, g: torch.where(torch.arange(g.shape[1]) == column % g.shape[1], 0, g)


def reread_at_the_label(rows, g):
    """Probabilities are rounded to bfloat16, read again and one is subtracted: two roundings."""
    exact = torch.zeros(g.shape)
    reference.row_losses(rows, row_scale=torch.ones(len(g)), gradient=exact)
    place = torch.arange(len(g)), rows.labels.clamp(min=0)
    twice = (exact[place] + 1).to(g.dtype).float() - 1
    g = g.clone()
    g[place] = torch.where(g[place] != 0, g[place] / exact[place] * twice, 0).to(g.dtype)
    return g


def in_ignored_rows(rows, g):
    return torch.where((rows.labels == IGNORE)[:, None], 1e-9, g)


OFF, EDGE = "gradient, .*error", "gradient of column"
wrong_gradient("zero", OFF, "whp forward", "plain", "float32", lambda rows, g: g * 0)
wrong_gradient("reversed", OFF, "whp forward", "plain", "bfloat16", lambda rows, g: -g)
wrong_gradient("doubled", OFF, "label", "plain", "float32", lambda rows, g: g * 2)
wrong_gradient("no_last_column", OFF, "jsd", "above a multiple", "float32", without(-1))
wrong_gradient("no_last_column_narrow", OFF, "whp forward", "plain", "bfloat16", without(-1))
wrong_gradient("no_first_column", OFF, "uld", "below a multiple", "float32", without(0))
wrong_gradient("no_unlikely_column", OFF, "label", "above a multiple", "float32", without(20000))
wrong_gradient("narrow_arithmetic", OFF, "whp reverse", "plain", "float32", lambda rows, g: g.bfloat16())
wrong_gradient("two_roundings", OFF, "label", "plain", "bfloat16", reread_at_the_label)
wrong_gradient("in_ignored_rows", OFF, "label", "plain", "float32", in_ignored_rows)
wrong_gradient(
    "mass_in_ruled_out_columns",
    EDGE,
    "whp forward",
    "minus infinity",
    "float32",
    lambda rows, g: torch.where((torch.arange(g.shape[1]) == 0) & g.any(-1, keepdim=True), 1e-20, g),
)


@wrong("losses with gradient", "uld")
def losses_off(rows, result, gradient, statistics):
    return result._replace(losses=result.losses * 1.001)


@wrong("losses .*is torch.float64", "label")
def losses_in_float64(rows, result, gradient, statistics):
    return result._replace(losses=result.losses.double())


@wrong("losses alone", "label")
def losses_off_without_gradient(rows, result, gradient, statistics):
    return result._replace(losses=result.losses * 2) if gradient is None else None


@wrong("entropy with gradient", "undial")
def entropy_in_bits(rows, result, gradient, statistics):
    return result._replace(entropy=result.entropy / math.log(2))


@wrong("predicted", "student offset", "ties")
def last_index_on_ties(rows, result, gradient, statistics):
    last = rows.first.shape[1] - 1 - rows.student.flip(-1).argmax(-1)
    return result._replace(predicted=last) if statistics else None


@wrong("targets alone", "whp forward")
def targets_without_statistics(rows, result, gradient, statistics):
    return None if statistics else result._replace(targets=result.targets + 1)


@wrong("predicted in place", "label")
def predicted_from_the_gradient(rows, result, gradient, statistics):
    return result._replace(predicted=rows.student.argmax(-1)) if statistics else None


@wrong("wrote outside", "label")
def writes_before_its_memory(rows, result, gradient, statistics):
    if gradient is not None and gradient is not rows.student:
        gradient.as_strided((1,), (1,), 31).zero_()


@wrong("wrote outside", "label")
def writes_behind_its_memory(rows, result, gradient, statistics):
    if gradient is not None and gradient is not rows.student:
        gradient.as_strided((1,), (1,), 32 + gradient.numel()).zero_()


@wrong("wrote between the rows", "label", "strided")
def writes_between_the_rows(rows, result, gradient, statistics):
    if gradient is rows.student:
        gradient.as_strided((1,), (1,), 1003).zero_()


@wrong("a teacher was changed", "whp forward")
def spoils_a_teacher(rows, result, gradient, statistics):
    rows.teachers[1][0, 5:6].zero_()


@wrong("student was changed", "ce-u")
def spoils_the_student(rows, result, gradient, statistics):
    if gradient is not rows.student:
        rows.student[1, 5:6].zero_()


wrong_rows(
    "ignored_row_is_used",
    "losses with gradient",
    "whp forward",
    "plain",
    lambda rows: dataclasses.replace(rows, labels=None),
)
wrong_rows(
    "teachers_not_gathered",
    "losses with gradient",
    "whp forward",
    "gathered",
    lambda rows: dataclasses.replace(
        rows, teacher_rows=(None, None), teachers=tuple(t[:6] for t in rows.teachers)
    ),
)
wrong_rows(
    "row_stride_not_looked_at",
    "losses with gradient",
    "whp reverse",
    "strided",
    lambda rows: dataclasses.replace(
        rows, teachers=(rows.teachers[0].as_strided((4, 999), (999, 1)), rows.teachers[1])
    ),
)
wrong_rows(
    "edit_is_not_made",
    "losses with gradient",
    "undial",
    "plain",
    lambda rows: dataclasses.replace(rows, edit_offsets=rows.edit_offsets * 0),
)
wrong_rows(
    "another_edit",
    "losses with gradient",
    "whp forward mean",
    "small",
    lambda rows: dataclasses.replace(rows, rule=dataclasses.replace(rows.rule, edit="ban")),
)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_fails(name):
    message, one, row_losses = WRONG[name]
    with pytest.raises(AssertionError, match=message):
        assert_row_losses(row_losses, one)


@pytest.mark.parametrize(
    "change",
    [
        lambda labels, own: (labels, own.roll(1)),
        lambda labels, own: (labels.roll(1, 0), own),
        lambda labels, own: (labels.clamp(min=0), own),
        lambda labels, own: (labels.int(), own),
    ],
    ids=["own choice", "weights in another order", "ignored row", "dtype"],
)
def test_wrong_labels_fail(change):
    with pytest.raises(AssertionError):
        assert_row_labels(
            lambda rows, weights: change(*reference.row_labels(rows, weights)), case("whp hard")
        )


def test_ties_at_the_last_index_fail():
    def row_labels(rows, weights):
        labels, own = reference.row_labels(rows, weights)
        flipped = dataclasses.replace(rows, teachers=tuple(t.flip(-1) for t in rows.teachers))
        other = reference.row_labels(flipped, weights)[0]
        return torch.where(labels == IGNORE, IGNORE, rows.first.shape[1] - 1 - other), own

    with pytest.raises(AssertionError, match="labels for"):
        assert_row_labels(row_labels, case("whp hard", "ties"))


def test_a_case_without_a_target_has_no_labels():
    with pytest.raises(ValueError, match="no target"):
        assert_row_labels(reference.row_labels, case("student offset"))
