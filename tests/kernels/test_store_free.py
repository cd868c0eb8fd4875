"""The mode without stored logits, in eager torch, against the reference on the logits."""

import dataclasses
import math

import linear_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from whp_kernels.losses import reference, store_free
from whp_kernels.losses.linear_rows import LinearRows, Projection, Row

NEEDS = {"needs_hidden": True, "needs_weight": True, "needs_bias": True}


@pytest.fixture(autouse=True)
def small_row_blocks(monkeypatch):
    monkeypatch.setattr(store_free, "ROW_BLOCK", 3)


def check(rows, *, tile=10, tolerance=1e-12):
    """Losses, statistics and gradients of rows equal the reference's; returns the losses."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(rows.count, generator=generator, dtype=torch.float64)
    wanted, wanted_gradients = cases.expected(rows, scale)
    found, state = store_free.losses(rows, statistics=True, tile=tile)
    assert cases.error(found.losses, wanted.losses) < tolerance
    assert cases.error(found.entropy, wanted.entropy) < tolerance
    assert torch.equal(found.targets, wanted.targets)
    nan_student = torch.isnan(cases.logits(rows).student).any(-1)
    assert torch.equal(found.predicted[~nan_student], wanted.predicted[~nan_student])
    gradients = store_free.gradients(rows, state, scale, **NEEDS, tile=tile)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        assert cases.error(gradient, wanted_gradient) < tolerance
    return found


@pytest.mark.parametrize("combination, divergence", cases.FAMILY)
def test_every_rule_equals_the_reference(combination, divergence):
    plain = combination in ("none", "student_offset")
    for softcap in (0.0, 3.0):
        for edit in ["none"] if plain else ["none", "add", "ban", "mean"]:
            for fraction, outside in (
                [(0.0, "keep")] if plain else [(0.0, "keep"), (0.3, "keep"), (0.3, "mask")]
            ):
                if combination == "identity" and fraction and outside == "keep":
                    continue
                rule = cases.rule(
                    combination,
                    divergence,
                    softcap=softcap,
                    edit=edit,
                    relative_top=fraction,
                    outside=outside,
                )
                check(cases.build(rule, bias=softcap == 0.0))


def test_two_teachers_of_an_offset():
    check(cases.build(cases.rule("offset", "forward_kl"), teachers=2))


@pytest.mark.parametrize("combination, divergence", cases.FAMILY)
def test_gradients_equal_autograd_of_the_formula(combination, divergence):
    rows = cases.build(cases.rule(combination, divergence, softcap=4.0), n=5)
    rows = dataclasses.replace(rows, labels=rows.labels.clamp(min=0))
    leaves = [t.clone().requires_grad_() for t in rows.student]
    cap = rows.rule.softcap
    student = cap * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / cap)
    teachers = reference.teacher_logits(cases.logits(rows))
    temperature = rows.rule.temperature
    if divergence == "label":
        if combination == "student_offset":
            student = teachers[0] + rows.rule.weight * (student - teachers[1])
        values = torch.nn.functional.cross_entropy(student, rows.labels, reduction="none")
    else:
        target = reference.target_logits(teachers, rows.rule)
        p_t, p_s = torch.softmax(target / temperature, -1), torch.softmax(student / temperature, -1)
        mixture = rows.rule.beta * p_t + (1 - rows.rule.beta) * p_s
        kl = {
            "hard": lambda: torch.nn.functional.cross_entropy(student, target.argmax(-1), reduction="none"),
            "cross_entropy": lambda: -(p_t * p_s.log()).sum(-1),
            "forward_kl": lambda: (p_t * (p_t / p_s).log()).sum(-1),
            "reverse_kl": lambda: (p_s * (p_s / p_t).log()).sum(-1),
            "jsd": lambda: (
                rows.rule.beta * (p_t * (p_t / mixture).log()).sum(-1)
                + (1 - rows.rule.beta) * (p_s * (p_s / mixture).log()).sum(-1)
            ),
        }
        values = kl[divergence]()
    scale = torch.linspace(0.5, 2.0, rows.count, dtype=torch.float64)
    (values * scale).sum().backward()
    found, state = store_free.losses(rows, statistics=False, tile=7)
    assert cases.error(found.losses, values.detach()) < 1e-12
    for gradient, leaf in zip(store_free.gradients(rows, state, scale, **NEEDS, tile=7), leaves):
        assert cases.error(gradient, leaf.grad) < 1e-12


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
def test_the_check_sees_a_wrong_gradient(monkeypatch, factor):
    right = store_free._gradient
    monkeypatch.setattr(store_free, "_gradient", lambda *a: factor * right(*a))
    with pytest.raises(AssertionError):
        check(cases.build(cases.rule("whp", "forward_kl")))


@settings(max_examples=60)
@given(
    st.integers(0, 7),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from(cases.FAMILY),
    st.sampled_from(["none", "add", "mean", "ban"]),
)
def test_shapes_and_tiles(n, vocabulary, tile, kind, edit):
    combination, divergence = kind
    edit = "none" if combination in ("none", "student_offset") else edit
    # a divergence that is infinite has no gradient to compare
    edit = "add" if edit == "ban" and divergence == "reverse_kl" else edit
    rows = cases.build(cases.rule(combination, divergence, edit=edit), n=n, vocabulary=vocabulary)
    check(rows, tile=tile, tolerance=1e-10)


def exact(n, vocabulary, seed, levels=2):
    """Hidden states and heads of small whole numbers: products are exact, so ties are ties."""
    generator = torch.Generator().manual_seed(seed)
    return Projection(
        torch.randint(0, levels, (n, 3), generator=generator).double(),
        torch.randint(0, levels, (vocabulary, 3), generator=generator).double(),
    )


@pytest.mark.parametrize("tile", [3, 7, 64])
def test_ties_within_and_across_tiles_go_to_the_lowest_index(tile):
    for seed in range(2):
        student, base, reinforced = (exact(20, 40, 3 * seed + k) for k in range(3))
        rows = LinearRows(*student, (base, reinforced), rule=cases.rule("whp", "hard", weight=1.0))
        logits = cases.logits(rows)
        highest = reference.target_logits(logits.teachers, rows.rule)
        assert ((highest == highest.amax(-1, keepdim=True)).sum(-1) > 1).any(), "there are ties"
        found = check(rows, tile=tile)
        assert torch.equal(found.targets, highest.argmax(-1))
        labels, own = store_free.row_labels(rows, (0.0, 1.0, 3.0), tile=tile)
        wanted = reference.row_labels(dataclasses.replace(logits, student=None), (0.0, 1.0, 3.0))
        assert torch.equal(labels, wanted[0]) and torch.equal(own, wanted[1])
        assert torch.equal(labels[0], own)


@pytest.mark.parametrize("edit", ["none", "add", "ban", "mean"])
@pytest.mark.parametrize("fraction, outside", [(0.0, "keep"), (0.2, "keep"), (0.2, "mask"), (1.0, "mask")])
def test_labels_equal_the_reference(edit, fraction, outside):
    for softcap in (0.0, 2.0):
        rule = cases.rule("whp", "hard", edit=edit, relative_top=fraction, outside=outside, softcap=softcap)
        rows = cases.build(rule, n=12)
        rows.teachers[1].hidden[3] = math.nan  # its label is gone, the first teacher's own choice is not
        rows.teachers[0].hidden[4] = math.nan
        stored = dataclasses.replace(cases.logits(rows), student=None)
        wanted = reference.row_labels(stored, (0.0, 1.0, 5.0))
        assert wanted[1][3] != -100 and wanted[1][4] == -100 and wanted[0][0][3] == -100
        for given_rows in (rows, dataclasses.replace(rows, hidden=None, weight=None, bias=None)):
            labels, own = store_free.row_labels(given_rows, (0.0, 1.0, 5.0), tile=9)
            assert torch.equal(labels, wanted[0]) and torch.equal(own, wanted[1])


def test_a_nan_that_the_combination_hides_is_one():
    for fraction in (0.0, 0.5):
        rows = cases.build(cases.rule("whp", "hard", relative_top=fraction), bias=True)
        rows.teachers[0].bias[20] = -math.inf  # stays ruled out whatever the second teacher says
        rows.teachers[1].bias[20] = math.nan
        assert (check(rows).targets == -100).all()
        labels, own = store_free.row_labels(rows, (0.0, 5.0), tile=10)
        assert (labels == -100).all() and (own[:2] >= 0).all()


@pytest.mark.parametrize("edit", ["add", "ban", "mean"])
def test_a_part_of_the_rows_keeps_its_edits(edit):
    """Offsets that do not start at 0, and more tokens than they speak of."""
    rows = cases.build(cases.rule("whp", "forward_kl", edit=edit), n=12)
    whole, _ = store_free.losses(rows, statistics=True, tile=10)
    part = dataclasses.replace(
        rows,
        hidden=rows.hidden[4:9],
        teachers=tuple(t._replace(hidden=t.hidden[4:9]) for t in rows.teachers),
        labels=rows.labels[4:9],
        edit_offsets=rows.edit_offsets[4:10],
    )
    assert cases.error(check(part).losses, whole.losses[4:9]) < 1e-12


def test_no_weights_no_labels():
    labels, own = store_free.row_labels(cases.build(cases.rule("whp", "hard")), ())
    assert labels.shape == (0, 7) and own.shape == (7,)


@pytest.mark.parametrize("first, last", [(0, 12), (41, 53), (9, 31), (0, 50)])
@pytest.mark.parametrize("divergence", ["hard", "cross_entropy", "forward_kl", "reverse_kl", "jsd"])
def test_columns_ruled_out_by_the_bias_of_all_models(divergence, first, last):
    """A padded vocabulary: whole tiles at either end are -inf."""
    rows = cases.build(cases.rule("whp", divergence))
    for model in rows.models:
        model.bias[first:last] = -math.inf
    found = check(rows)
    assert torch.isfinite(found.losses).all()


@pytest.mark.parametrize("tile", [10, 53])
def test_columns_that_only_one_side_rules_out(tile):
    for divergence, infinite in [("forward_kl", "student"), ("reverse_kl", "teacher"), ("jsd", None)]:
        for side in ("student", "teacher"):
            rows = cases.build(cases.rule("identity", divergence))
            (rows.student if side == "student" else rows.teachers[0]).bias[5:25] = -math.inf
            found = store_free.losses(rows, statistics=False, tile=tile)[0]
            wanted = cases.expected(rows, torch.ones(rows.count))[0]
            assert cases.error(found.losses, wanted.losses) < 1e-12
            assert torch.isinf(found.losses).any() == (side == infinite)
            if side != infinite:
                check(rows, tile=tile)


def test_an_infinite_term_whose_weight_vanishes_is_no_nan():
    """A column ruled out by the student, to which the target gives some weight only until a later tile shows
    columns that are higher by far."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [300.0], [299.0]])
    student = Projection(hidden, torch.ones(4, 1), torch.tensor([-math.inf, 0.0, 0.0, 0.0]))
    rows = LinearRows(
        *student, (Projection(hidden, weight),), rule=cases.rule("identity", "forward_kl", temperature=1.0)
    )
    found, _ = store_free.losses(rows, statistics=False, tile=1)
    wanted, _ = cases.expected(rows, torch.ones(1))
    assert torch.isfinite(wanted.losses).all()
    assert cases.error(found.losses, wanted.losses) < 1e-6


def test_rows_that_cannot_be_used():
    for combination, divergence in cases.FAMILY:
        if combination == "none":
            continue
        rows = cases.build(cases.rule(combination, divergence), n=8)
        rows.teachers[-1].hidden[0] = math.nan
        rows.teachers[0].hidden[1] = math.inf  # its logits are +-inf or NaN
        rows.teachers[0].hidden[3, 0] = math.nan
        found = check(rows)
        assert (found.targets[[0, 1, 3]] == -100).all() and (found.losses[[0, 1, 3]] == 0).all()
        assert found.losses[4] > 0


def test_a_target_without_a_finite_value():
    rows = cases.build(cases.rule("identity", "cross_entropy"))
    rows.teachers[0].bias[:] = -math.inf
    found = check(rows)
    assert (found.targets == -100).all()


def test_a_nan_of_the_student_is_not_hidden():
    for combination, divergence in cases.FAMILY:
        rows = cases.build(cases.rule(combination, divergence))
        rows.hidden[1, 0] = math.nan
        scale = torch.ones(rows.count, dtype=torch.float64)
        found, state = store_free.losses(rows, statistics=True, tile=10)
        d_hidden, _, _ = store_free.gradients(rows, state, scale, **NEEDS, tile=10)
        assert torch.isnan(found.losses).tolist() == [False, True, *[False] * 5]
        assert torch.isnan(d_hidden).any(-1).tolist() == [False, True, *[False] * 5]


def test_no_label_is_ignored_without_labels_and_all_where_all_are():
    rows = cases.build(cases.rule("whp", "forward_kl"))
    found = check(dataclasses.replace(rows, labels=None))
    assert (found.losses > 0).all()
    found = check(dataclasses.replace(rows, labels=torch.full((7,), -100)))
    assert (found.losses == 0).all() and (found.targets == -100).all()


def test_another_ignore_index():
    rows = cases.build(cases.rule("none", "label"))
    labels = torch.where(rows.labels == -100, 0, rows.labels)
    found = check(dataclasses.replace(rows, labels=labels, ignore_index=0))
    assert (found.losses[2::3] == 0).all()


@pytest.mark.parametrize("divergence", ["hard", "cross_entropy", "forward_kl", "reverse_kl", "jsd"])
def test_the_student_as_its_own_teacher(monkeypatch, divergence):
    products = []
    product = store_free.product
    monkeypatch.setattr(store_free, "product", lambda *a, **k: products.append(1) or product(*a, **k))
    edit = "add" if divergence == "reverse_kl" else "ban"
    rows = cases.build(cases.rule("identity", divergence, edit=edit), n=3, teachers=0)
    rows = dataclasses.replace(rows, teachers=(rows.student,))
    store_free.losses(rows, statistics=False, tile=53)
    assert len(products) == (2 if divergence == "jsd" else 1), "its logits are computed once a pass"
    check(rows)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_equal_models_diverge_by_exactly_zero(divergence):
    rows = cases.build(cases.rule("identity", divergence), dtype=torch.float32, teachers=0)
    rows = dataclasses.replace(rows, teachers=(Projection(*(t.clone() for t in rows.student)),))
    found, _ = store_free.losses(rows, statistics=False, tile=10)
    assert (found.losses == 0).all()


@pytest.mark.parametrize("combination, divergence", cases.FAMILY)
@pytest.mark.parametrize("shift", [0.0, 3000.0])
def test_errors_in_float32_stay_within_twice_those_of_the_reference(combination, divergence, shift):
    rows = cases.build(
        cases.rule(combination, divergence, edit="none"), n=9, vocabulary=211, width=33, dtype=torch.float32
    )
    for model in rows.models:
        model.bias.add_(shift)
    wide = cases.double(rows)
    scale = torch.ones(9)
    wanted, wanted_gradients = cases.expected(wide, scale.double())
    narrow, narrow_gradients = cases.expected(rows, scale)
    found, state = store_free.losses(rows, statistics=True, tile=32)
    gradients = store_free.gradients(rows, state, scale, **NEEDS, tile=32)
    assert found.losses.dtype == torch.float32
    for a, b, c in [
        (found.losses, narrow.losses, wanted.losses),
        (found.entropy, narrow.entropy, wanted.entropy),
        *zip(gradients, narrow_gradients, wanted_gradients),
    ]:
        assert cases.error(a, c) <= 2 * cases.error(b, c) + 3e-7


@pytest.mark.parametrize("from_accumulator", [True, False])
@pytest.mark.parametrize("head", [torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_with_in_float32(monkeypatch, head, from_accumulator):
    """Where narrow operands are multiplied as they are, only the gradient of the logits is rounded."""
    monkeypatch.setattr(store_free, "from_accumulator", lambda *_: from_accumulator)
    rows = cases.build(cases.rule("whp", "forward_kl"), dtype=torch.bfloat16)
    rows = dataclasses.replace(rows, weight=rows.weight.to(head))
    scale = torch.ones(rows.count)
    found, state = store_free.losses(rows, statistics=True, tile=10)
    d_hidden, d_weight, d_bias = store_free.gradients(rows, state, scale, **NEEDS, tile=10)
    wanted, wanted_gradients = cases.expected(cases.double(rows), scale.double())
    rounded = from_accumulator and head == torch.bfloat16
    assert found.losses.dtype == torch.float32
    assert cases.error(found.losses, wanted.losses) < 1e-6
    assert d_hidden.dtype == torch.bfloat16
    assert cases.error(d_hidden, wanted_gradients[0]) < 4e-3
    assert d_weight.dtype == d_bias.dtype == torch.float32
    assert cases.error(d_weight, wanted_gradients[1]) < (3e-3 if rounded else 1e-6)
    assert cases.error(d_bias, wanted_gradients[2]) < 1e-6


def test_small_gradients_survive_float16(monkeypatch):
    monkeypatch.setattr(store_free, "from_accumulator", lambda *_: True)
    rows = cases.build(cases.rule("whp", "forward_kl"), dtype=torch.float16)
    scale = torch.full((rows.count,), 1e-7)  # nearly all of 1e-7 * p is less than float16's smallest number
    _, state = store_free.losses(rows, statistics=False, tile=10)
    gradients = store_free.gradients(rows, state, scale, **NEEDS, tile=10)
    _, wanted = cases.expected(cases.double(rows), scale.double())
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    for gradient, wanted_gradient in zip(gradients, wanted):
        assert cases.error(gradient, wanted_gradient) < 1e-3


def test_only_the_gradients_that_are_needed():
    rows = cases.build(cases.rule("whp", "forward_kl"))
    scale = torch.ones(rows.count, dtype=torch.float64)
    _, state = store_free.losses(rows, statistics=False, tile=10)
    whole = store_free.gradients(rows, state, scale, **NEEDS, tile=10)
    for k, name in enumerate(NEEDS):
        needs = dict.fromkeys(NEEDS, False) | {name: True}
        part = store_free.gradients(rows, state, scale, **needs, tile=10)
        assert [g is not None for g in part] == [i == k for i in range(3)]
        assert torch.equal(part[k], whole[k])


def test_without_statistics_losses_are_the_same_and_choices_are_left_out():
    for combination, divergence in cases.FAMILY:
        rows = cases.build(cases.rule(combination, divergence))
        found, _ = store_free.losses(rows, statistics=False, tile=10)
        wanted, _ = store_free.losses(rows, statistics=True, tile=10)
        assert torch.equal(found.losses, wanted.losses) and torch.equal(found.entropy, wanted.entropy)
        assert (found.predicted == 0).all()
        if divergence in ("label", "hard"):
            assert torch.equal(found.targets, wanted.targets)
        else:
            assert torch.equal(found.targets, torch.where(wanted.targets == -100, -100, 0))


def test_a_label_outside_the_vocabulary_gives_nan():
    rows = cases.build(cases.rule("none", "label"))
    rows.labels[0] = 53
    found, _ = store_free.losses(rows, statistics=False, tile=10)
    assert torch.isnan(found.losses).tolist() == [True, *[False] * 6]


class _Largest(TorchDispatchMode):
    """The shapes of all tensors that operators return, but for views."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.shapes.add(tuple(t.shape))
        return result

    @property
    def elements(self):
        return max(math.prod(shape) for shape in self.shapes)


@pytest.mark.parametrize("combination, divergence", [f for f in cases.FAMILY if f[0] != "offset"])
def test_no_tensor_of_rows_times_vocabulary(monkeypatch, combination, divergence):
    monkeypatch.setattr(store_free, "ROW_BLOCK", 16)
    n, vocabulary, width, tile = 20, 200, 6, 32
    choices = {}
    if combination not in ("none", "student_offset"):
        choices = {"edit": "mean", "relative_top": 0.1, "outside": "mask", "softcap": 5.0}
    rows = cases.build(
        cases.rule(combination, divergence, **choices),
        n=n,
        vocabulary=vocabulary,
        width=width,
        dtype=torch.bfloat16,
    )
    with _Largest() as forward:
        _, state = store_free.losses(rows, statistics=True, tile=tile)
        store_free.row_labels(rows, (1.0,), tile=tile) if rows.teachers else None
    # a tile of logits, a tile of a head (widths up to 8), numbers of rows
    assert forward.elements <= max(16 * tile, tile * 8, len(Row) * n)
    with _Largest() as backward:
        store_free.gradients(rows, state, torch.ones(n), **NEEDS, tile=tile)
    backward.shapes -= {(vocabulary, width), (vocabulary,), (n, width)}  # the gradients themselves
    assert backward.elements <= max(16 * tile, tile * 8)


def test_the_tracker_sees_stored_logits():
    rows = cases.build(cases.rule("whp", "forward_kl"), n=40, vocabulary=700)
    with _Largest() as stored:
        cases.expected(rows, torch.ones(40, dtype=torch.float64))
    assert (40, 700) in stored.shapes
