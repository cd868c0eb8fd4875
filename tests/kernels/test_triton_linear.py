"""The mode without stored logits in Triton, against the reference on the logits.

On a GPU the tests run there, with the tiles that are chosen there. Without one they run in Triton's
interpreter, which has to be chosen before triton is imported: one test starts the others in a process of
their own. The interpreter computes wrong products of bfloat16, so there it is float32 only.
"""

import dataclasses
import math
import os
import subprocess
import sys

import linear_cases as cases
import pytest
import torch
from whp_kernels.losses import reference, store_free
from whp_kernels.losses.linear_rows import LinearRows, Projection, Row

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
NEEDS = {"needs_hidden": True, "needs_weight": True, "needs_bias": True}

runs = pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="runs in the interpreter, see the first test")


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="starts the other tests where there is no GPU")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter tiles that small shapes have several of: in rows, in columns, in the width."""
    if INTERPRETED:
        from whp_kernels.losses.triton import linear_launch

        monkeypatch.setattr(
            linear_launch, "gemm_tile", lambda rows, gpu: linear_launch.GemmTile(16, 32, 16, 1, 4)
        )


def to_device(rows):
    def moved(model):
        return Projection(*(None if t is None else t.to(DEVICE) for t in model))

    # the same tensors stay the same: shared heads, the student as a teacher
    known = {}
    teachers = tuple(
        Projection(*(None if t is None else known.setdefault(id(t), t.to(DEVICE)) for t in model))
        for model in rows.teachers
    )
    student = Projection(
        *(
            None if t is None else known.setdefault(id(t), t.to(DEVICE))
            for t in (rows.hidden, rows.weight, rows.bias)
        )
    )
    others = {
        name: None if getattr(rows, name) is None else getattr(rows, name).to(DEVICE)
        for name in ("labels", "edit_offsets", "edit_tokens")
    }
    return dataclasses.replace(
        rows, hidden=student.hidden, weight=student.weight, bias=student.bias, teachers=teachers, **others
    )


def check(rows, *, tile=40):
    """Errors against float64 are at most twice those of the reference in float32 of the same tensors (with a
    gradient in the dtype of the products), and index results are equal; returns the losses."""
    from whp_kernels.losses.triton import linear_loss

    scale = torch.rand(rows.count, generator=torch.Generator().manual_seed(1)) + 0.5
    wanted, wanted_gradients = cases.expected(cases.double(rows), scale.double())
    narrow, narrow_gradients = cases.expected(rows, scale)
    moved = to_device(rows)
    found, state = linear_loss.losses(moved, statistics=True, tile=tile)
    gradients = linear_loss.gradients(moved, state, scale.to(DEVICE), **NEEDS, tile=tile)
    assert found.losses.dtype == torch.float32
    for name in ("losses", "entropy"):
        found_values, narrow_values = getattr(found, name).cpu(), getattr(narrow, name)
        error = cases.error(narrow_values, getattr(wanted, name))
        assert cases.error(found_values, getattr(wanted, name)) <= 2 * error + 2e-6, name
    assert torch.equal(found.targets.cpu(), wanted.targets)
    finite = ~torch.isnan(cases.logits(rows).student).any(-1)
    assert torch.equal(found.predicted.cpu()[finite], wanted.predicted[finite])
    rounding = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}[rows.hidden.dtype]
    for gradient, narrow_gradient, wanted_gradient in zip(gradients, narrow_gradients, wanted_gradients):
        error = cases.error(narrow_gradient, wanted_gradient)
        assert cases.error(gradient.cpu(), wanted_gradient) <= 2 * error + 2e-6 + rounding
    return found


def build(rule, **choices):
    return cases.build(rule, **{"n": 19, "vocabulary": 75, "width": 21, "dtype": torch.float32} | choices)


# the interpreter is slow; combinations and divergences meet in few lines
FAMILY = (
    cases.FAMILY if ON_GPU else [f for f in cases.FAMILY if f[0] != "identity" and f != ("offset", "hard")]
)
OPTIONS = {
    "plain": {},
    "softcap, mean, mask": {"softcap": 3.0, "edit": "mean", "relative_top": 0.3, "outside": "mask"},
    "add, keep": {"edit": "add", "relative_top": 0.3, "outside": "keep"},
    "ban": {"edit": "ban"},
}


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combination, divergence", FAMILY)
def test_every_rule_equals_the_reference(combination, divergence, dtype):
    check(build(cases.rule(combination, divergence), dtype=dtype, bias=divergence != "forward_kl"))
    if combination in ("none", "student_offset"):
        check(build(cases.rule(combination, divergence, softcap=3.0), dtype=dtype))


@runs
@pytest.mark.parametrize(
    "option, divergence",
    [
        *(("softcap, mean, mask", divergence) for divergence in ("hard", "forward_kl", "jsd")),
        *(("add, keep", divergence) for divergence in ("cross_entropy", "reverse_kl")),
        ("ban", "forward_kl"),
    ],
)
def test_every_option_equals_the_reference(option, divergence):
    check(build(cases.rule("whp", divergence, **OPTIONS[option])))


@runs
@pytest.mark.parametrize("outside", ["keep", "mask"])
def test_only_the_first_teachers_highest_column(outside):
    """It has to be found again in a later pass, bit for bit."""
    rows = build(cases.rule("whp", "forward_kl", weight=3.0, relative_top=1.0, outside=outside))
    found = check(rows)
    check_labels(rows, (3.0,))
    if outside == "mask":
        assert (found.entropy == 0).all() and (found.targets >= 0).sum() == (rows.labels >= 0).sum()


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combination", ["identity", "whp", "offset", "student_offset"])
def test_one_head_for_all_models(monkeypatch, combination, dtype):
    from whp_kernels.losses.triton import linear_launch

    monkeypatch.setattr(linear_launch, "_shared", lambda rows, gpu: linear_launch._one_head(rows))

    divergence = "label" if combination == "student_offset" else "forward_kl"
    rows = build(cases.rule(combination, divergence), dtype=dtype)
    shared = tuple(Projection(t.hidden[:, :21].contiguous(), rows.weight, rows.bias) for t in rows.teachers)
    rows = dataclasses.replace(rows, teachers=shared)
    assert linear_launch._one_head(to_device(rows))
    check(rows)
    if combination in ("whp", "offset"):
        check_labels(rows, (0.0, 2.0))


@runs
def test_the_student_as_its_own_teacher():
    rows = build(cases.rule("identity", "cross_entropy", edit="ban"))
    rows = dataclasses.replace(rows, teachers=(rows.student,))
    check(rows)


@runs
def test_two_teachers_of_an_offset():
    check(build(cases.rule("offset", "forward_kl"), teachers=2))


@runs
@pytest.mark.parametrize("n, vocabulary, width", [(1, 75, 21), (16, 5, 3), (17, 48, 32), (3, 1, 1)])
def test_shapes_that_bite(n, vocabulary, width):
    for combination, divergence in (("whp", "forward_kl"), ("whp", "hard"), ("none", "label")):
        rows = build(cases.rule(combination, divergence), n=n, vocabulary=vocabulary, width=width)
        check(rows, tile=7 if n == 17 else 64)


@runs
def test_no_rows():
    from whp_kernels.losses.triton import linear_loss

    rows = to_device(build(cases.rule("whp", "forward_kl"), n=0))
    found, state = linear_loss.losses(rows, statistics=True)
    gradients = linear_loss.gradients(rows, state, torch.zeros(0, device=DEVICE), **NEEDS)
    assert [len(values) for values in found] == [0] * 4
    assert [tuple(g.shape) for g in gradients] == [(0, 21), (75, 21), (75,)]
    assert all((g == 0).all() for g in gradients)


@runs
def test_the_buffer_takes_rows_in_blocks(monkeypatch):
    from whp_kernels.losses.triton import linear_loss

    monkeypatch.setattr(linear_loss, "ROW_BLOCK", 8)
    check(build(cases.rule("whp", "forward_kl", edit="add")), tile=33)


@runs
def test_rows_and_heads_of_any_stride():
    rows = build(cases.rule("whp", "forward_kl"))

    def spread(values):  # rows further apart than their width
        wider = torch.full((values.shape[0], values.shape[1] + 5), math.nan)
        wider[:, : values.shape[1]] = values
        return wider[:, : values.shape[1]]

    first = rows.teachers[0]
    columns_apart = Projection(first.hidden.t().contiguous().t(), spread(first.weight), first.bias)
    check(
        dataclasses.replace(
            rows,
            hidden=spread(rows.hidden),
            weight=rows.weight.t().contiguous().t(),
            teachers=(columns_apart, rows.teachers[1]),
        )
    )


@runs
@pytest.mark.parametrize("first, last", [(0, 35), (9, 75)])
def test_columns_ruled_out_by_the_bias_of_all_models(first, last):
    for divergence in ("hard", "reverse_kl", "jsd"):
        rows = build(cases.rule("whp", divergence))
        for model in rows.models:
            model.bias[first:last] = -math.inf
        assert torch.isfinite(check(rows).losses).all()


@runs
def test_rows_that_cannot_be_used():
    for combination, divergence in [("whp", "hard"), ("offset", "jsd"), ("student_offset", "label")]:
        rows = build(cases.rule(combination, divergence))
        rows.teachers[-1].hidden[0] = math.nan
        rows.teachers[0].hidden[1] = math.inf
        rows.teachers[0].hidden[3, 0] = math.nan
        found = check(rows)
        assert (found.targets[[0, 1, 3]] == -100).all() and (found.losses[[0, 1, 3]] == 0).all()
    rows = build(cases.rule("whp", "cross_entropy"))
    rows.teachers[0].bias[20] = -math.inf
    rows.teachers[1].bias[20] = math.nan
    assert (check(rows).targets == -100).all()


@runs
def test_a_nan_of_the_student_is_not_hidden():
    from whp_kernels.losses.triton import linear_loss

    for combination, divergence in [
        ("none", "label"),
        ("whp", "hard"),
        ("whp", "forward_kl"),
        ("whp", "jsd"),
    ]:
        rows = build(cases.rule(combination, divergence))
        rows.hidden[1, 0] = math.nan
        rows = to_device(rows)
        found, state = linear_loss.losses(rows, statistics=True)
        scale = torch.ones(rows.count, device=DEVICE)
        d_hidden, _, _ = linear_loss.gradients(rows, state, scale, **NEEDS)
        assert torch.isnan(found.losses).nonzero().flatten().tolist() == [1]
        assert torch.isnan(d_hidden).any(-1).nonzero().flatten().tolist() == [1]


@runs
def test_a_label_outside_the_vocabulary_gives_nan():
    from whp_kernels.losses.triton import linear_loss

    rows = build(cases.rule("none", "label"))
    rows.labels[0], rows.labels[1] = 75, -7
    found, _ = linear_loss.losses(to_device(rows), statistics=False)
    assert torch.isnan(found.losses).nonzero().flatten().tolist() == [0, 1]


@runs
def test_ties_within_and_across_tiles_go_to_the_lowest_index():
    generator = torch.Generator().manual_seed(0)

    def exact(n, vocabulary):  # products of small whole numbers are exact, so ties are ties
        return Projection(
            torch.randint(0, 2, (n, 3), generator=generator).float(),
            torch.randint(0, 2, (vocabulary, 3), generator=generator).float(),
        )

    student, base, reinforced = (exact(20, 90) for _ in range(3))
    rows = LinearRows(*student, (base, reinforced), rule=cases.rule("whp", "hard", weight=1.0))
    stored = cases.logits(rows)
    target = reference.target_logits(stored.teachers, rows.rule)
    assert ((target == target.amax(-1, keepdim=True)).sum(-1) > 1).any(), "there are ties"
    assert torch.equal(check(rows).targets.cpu(), target.argmax(-1))
    weights = (0.0, 1.0, 3.0, *range(4, 12))  # more than one pass
    check_labels(rows, weights)


@runs
@pytest.mark.parametrize("option", list(OPTIONS))
def test_labels_equal_the_reference(option):
    rows = build(cases.rule("offset" if option == "add, keep" else "whp", "hard", **OPTIONS[option]))
    rows.teachers[1].hidden[3] = math.nan
    rows.teachers[0].hidden[4] = math.nan
    labels, own = check_labels(rows, (0.0, 1.0, 5.0))
    assert own[3] != -100 and own[4] == -100 and labels[0, 3] == -100
    without_student = dataclasses.replace(rows, hidden=None, weight=None, bias=None)
    check_labels(without_student, (2.0,))
    assert check_labels(rows, ())[0].shape == (0, 19)


def check_labels(rows, weights):
    from whp_kernels.losses.triton import linear_loss

    wanted = reference.row_labels(dataclasses.replace(cases.logits(rows), student=None), weights)
    labels, own = linear_loss.row_labels(to_device(rows), weights)
    assert torch.equal(labels.cpu(), wanted[0]) and torch.equal(own.cpu(), wanted[1])
    return wanted


@runs
def test_a_part_of_the_rows_keeps_its_edits():
    rows = build(cases.rule("whp", "forward_kl", edit="add"))
    part = dataclasses.replace(
        rows,
        hidden=rows.hidden[4:9],
        teachers=tuple(t._replace(hidden=t.hidden[4:9]) for t in rows.teachers),
        labels=rows.labels[4:9],
        edit_offsets=rows.edit_offsets[4:10],
    )
    check(part)


@runs
def test_many_edits_of_one_row():
    """The first of a tile's edits is looked for among all of the row's."""
    rows = build(cases.rule("whp", "forward_kl", edit="add"), n=3)
    tokens = torch.cat([torch.arange(0, 75, 2), torch.arange(1, 90, 3)])  # also outside the vocabulary
    offsets = torch.tensor([0, 38, 38, len(tokens)])
    check(dataclasses.replace(rows, labels=None, edit_offsets=offsets, edit_tokens=tokens))


@runs
@pytest.mark.parametrize("divergence", ["hard", "reverse_kl", "jsd"])
def test_the_state_is_that_of_eager_torch(divergence):
    from whp_kernels.losses.triton import linear_loss

    rows = to_device(build(cases.rule("whp", divergence, edit="mean", relative_top=0.2, softcap=5.0)))
    _, found = linear_loss.losses(rows, statistics=False)
    _, wanted = store_free.losses(rows, statistics=False)
    assert torch.equal(found.targets, wanted.targets)
    for row in Row:
        if divergence == "hard" and row in (Row.TARGET_MAX, Row.TARGET_SUM, Row.PART):
            continue  # of soft divergences only
        used = wanted.numbers[Row.USED] == 1
        assert cases.error(found.numbers[row][used], wanted.numbers[row][used]) < 1e-5, row.name


@runs
def test_the_same_inputs_give_the_same_bits():
    from whp_kernels.losses.triton import linear_loss

    rows = to_device(build(cases.rule("whp", "forward_kl")))
    scale = torch.ones(rows.count, device=DEVICE)

    def run():
        found, state = linear_loss.losses(rows, statistics=True)
        return *found, *linear_loss.gradients(rows, state, scale, **NEEDS)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@runs
def test_float64_is_refused():
    from whp_kernels.losses.triton import linear_loss

    rows = to_device(build(cases.rule("whp", "forward_kl"), dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        linear_loss.losses(rows, statistics=False)
