"""The cluster kernel of csrc/cuda without a GPU: its algorithm, emulated on the CPU, against the reference.

The kernel's own source (``cluster_row``) is compiled by g++, and ``csrc/cuda/emulation.cpp`` stands in for
the GPU's threads, barriers and shared memory, behind the same operator, schema and Python function. So
everything is checked except what only a GPU has: real barriers, shuffles and load instructions, and the
launch (``cluster_kernel.cuh``, ``cluster_loss.cu``). These nvcc must at least compile.
"""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import cpp_extension
from whp_kernels.losses import cuda, reference
from whp_kernels.losses.combination import RowEdits
from whp_kernels.losses.rows import Rows
from whp_kernels.losses.rule import Rule

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
INCLUDES = [f"-I{path}" for path in cpp_extension.include_paths()]
DEFINES = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
NVCC = shutil.which("nvcc")

INF, NAN = float("inf"), float("nan")
FORWARDS, BACKWARDS, SHUFFLED, BY_BLOCK = range(4)
COMBINED = [("identity", 1), ("whp", 2), ("offset", 2), ("offset", 3)]
RULES = [("none", 0, "label")]
RULES += [(c, k, d) for c, k in COMBINED for d in ("hard", "cross_entropy", "forward_kl")]
RULES += [("whp", 2, "reverse_kl"), ("offset", 3, "reverse_kl"), ("identity", 1, "jsd"), ("whp", 2, "jsd")]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The operators of csrc/cuda/emulation.cpp."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    library = tmp_path_factory.mktemp("emulation") / "cluster_emulation.so"
    # -ffp-contract=off: nvcc is told in the source where it may not fuse, g++ is told here
    command = [compiler, "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror"]
    command += [*DEFINES, *INCLUDES, "-x", "c++", str(SOURCES / "emulation.cpp"), "-o", str(library)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return torch.ops.whp_cluster_emulation


@pytest.fixture(scope="module")
def run(emulation):
    """``run(rows, cluster=, threads=, order=, ...)``: cuda.row_losses on the emulated cluster."""

    def call(rows, *, cluster=None, threads=32, order=FORWARDS, statistics=True, **outputs):
        emulation.emulate(threads, order)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "_operator", lambda device: emulation.cluster_row_losses)
            if cluster is not None:
                patch.setattr(cuda, "cluster_size", lambda *_, **__: cluster)
            return cuda.row_losses(rows, statistics=statistics, **outputs)

    return call


def random_rows(
    combination,
    teachers,
    divergence,
    *,
    n=3,
    vocab=301,
    seed=0,
    dtype=torch.float32,
    of_teachers=None,
    **choices,
) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(n, vocab, generator=generator) + k for k in range(1 + teachers)]
    return Rows(
        student=logits[0].to(dtype),
        teachers=tuple(t.to(of_teachers or dtype) for t in logits[1:]),
        teacher_rows=(None,) * teachers,
        labels=torch.randint(0, vocab, (n,), generator=generator),
        rule=Rule(combination=combination, divergence=divergence, weight=2.5, beta=0.3, **choices),
    )


def exact(rows: Rows) -> Rows:
    """The same rows in float64, in which the reference computes what float32 should give."""
    return dataclasses.replace(
        rows, student=rows.student.double(), teachers=tuple(t.double() for t in rows.teachers)
    )


def relative(values, truth):
    """Error of each row in relation to the row's norm."""
    values, truth = values.double(), truth.double()
    return torch.linalg.vector_norm(values - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)


def compare(run, rows, *, gradient_dtype=None, **how):
    """The error against float64 is at most twice that of eager torch in float32, or a few roundings."""
    n, vocab = rows.student.shape
    scale = torch.linspace(0.5, -1.7, n)
    dtype = gradient_dtype or rows.student.dtype
    eager, kernel = (torch.full((n, vocab), NAN, dtype=dtype) for _ in range(2))
    truth = torch.empty(n, vocab, dtype=torch.float64)
    expected = reference.row_losses(exact(rows), statistics=True, row_scale=scale.double(), gradient=truth)
    torched = reference.row_losses(rows, statistics=True, row_scale=scale, gradient=eager)
    got = run(rows, row_scale=scale, gradient=kernel, **how)

    assert (relative(kernel, truth) <= 2 * relative(eager, truth) + 4e-7).all()
    for name in ("losses", "entropy"):
        true, ours, theirs = (getattr(r, name).double() for r in (expected, got, torched))
        assert ((ours - true).abs() <= 2 * (theirs - true).abs() + 1e-6 * true.abs() + 3e-7).all(), name
    assert torch.equal(got.targets, torched.targets)
    assert torch.equal(got.predicted, torched.predicted)
    assert got.losses.abs().min() > 1e-3  # there is something to compare


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("combination, teachers, divergence", RULES)
def test_rules(run, combination, teachers, divergence, cluster):
    compare(run, random_rows(combination, teachers, divergence), cluster=cluster)


@pytest.mark.parametrize("divergence", ["cross_entropy", "forward_kl", "reverse_kl", "jsd"])
def test_temperature(run, divergence):
    compare(run, random_rows("whp", 2, divergence, temperature=1.7), cluster=2)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(run, dtype, teacher_dtype):
    """Every pair, with rows of whole packs (vector loads) and a gradient of each dtype."""
    for gradient_dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = random_rows("offset", 3, "forward_kl", vocab=320, dtype=dtype, of_teachers=teacher_dtype)
        compare(run, rows, cluster=2, gradient_dtype=gradient_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 255, 256, 257])
def test_slices_of_any_length(run, vocab, dtype):
    """Rows shorter than a pack, blocks without a column, a last pack that is not full; 16 blocks."""
    for combination, teachers, divergence in [("none", 0, "label"), ("whp", 2, "forward_kl")]:
        rows = random_rows(combination, teachers, divergence, vocab=vocab, dtype=dtype)
        truth, gradient = torch.empty(3, vocab), torch.full((3, vocab), NAN)
        scale = torch.ones(3)
        expected = reference.row_losses(rows, statistics=True, row_scale=scale, gradient=truth)
        got = run(rows, cluster=16, row_scale=scale, gradient=gradient)
        torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-7)
        assert torch.equal(got.targets, expected.targets) and torch.equal(got.predicted, expected.predicted)


@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS, SHUFFLED, BY_BLOCK])
@pytest.mark.parametrize("threads, cluster", [(32, 2), (96, 4), (512, 1)])
def test_order_of_threads(run, threads, cluster, order):
    """A barrier that is missing shows in one of the orders; see emulation.cpp."""
    edits = RowEdits(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 290, 8]), "ban")
    for rows in (
        random_rows("none", 0, "label"),
        random_rows("whp", 2, "hard"),
        random_rows("offset", 3, "jsd"),
        with_edits(random_rows("whp", 2, "reverse_kl"), RowEdits(edits.offsets, edits.tokens, "add", -3.0)),
    ):
        compare(run, rows, threads=threads, cluster=cluster, order=order)


def test_large_offsets_keep_their_digits(run):
    """The logits' common offset leaves no trace: their difference is taken before any product."""
    rows = random_rows("whp", 2, "forward_kl", n=1)
    far = dataclasses.replace(
        rows, student=rows.student + 4096.0, teachers=tuple(t - 2048.0 for t in rows.teachers)
    )
    unshifted = dataclasses.replace(
        far, student=far.student - 4096.0, teachers=tuple(t + 2048.0 for t in far.teachers)
    )  # rounded as `far` is
    near = run(unshifted, cluster=2).losses
    torch.testing.assert_close(run(far, cluster=2).losses, near, rtol=2e-6, atol=0)


def test_equal_student_and_target_have_no_gradient(run):
    rows = random_rows("identity", 1, "forward_kl", vocab=320)
    rows = dataclasses.replace(rows, teachers=(rows.student,))
    gradient = torch.full_like(rows.student, NAN)
    assert torch.equal(run(rows, row_scale=torch.ones(3), gradient=gradient).losses, torch.zeros(3))
    assert torch.equal(gradient, torch.zeros_like(gradient))


# ------------------------------------------------------------------------------------- labels, ties, specials


def test_labels_at_the_edges_of_slices(run):
    """Four blocks of 80 columns (packs of 4, 301 columns): first and last column of each."""
    labels = torch.tensor([0, 75, 76, 151, 152, 227, 228, 300])
    rows = dataclasses.replace(random_rows("none", 0, "label", n=8), labels=labels)
    compare(run, rows, cluster=4)


@pytest.mark.parametrize("label", [-1, 301, 304, 2**40])
def test_labels_outside_the_vocabulary_make_nan(run, label):
    rows = dataclasses.replace(random_rows("none", 0, "label"), labels=torch.tensor([5, label, 7]))
    gradient = torch.zeros(3, 301)
    losses = run(rows, cluster=4, row_scale=torch.ones(3), gradient=gradient).losses
    assert torch.isnan(losses).tolist() == [False, True, False]
    assert torch.isnan(gradient).all(dim=1).tolist() == [False, True, False]
    assert not torch.isnan(gradient[[0, 2]]).any()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=2, max_size=5), st.sampled_from([1, 2, 4, 8, 16]))
def test_ties_go_to_the_lowest_column(run, columns, cluster):
    """The same largest logit in several columns: of one thread, of several, of several blocks."""
    rows = random_rows("whp", 2, "hard", n=1)
    base, reinforced = (t.clone() for t in rows.teachers)
    student = rows.student.clone()
    base[0, columns], reinforced[0, columns] = 40.0, 41.0
    student[0, columns] = 50.0
    got = run(dataclasses.replace(rows, student=student, teachers=(base, reinforced)), cluster=cluster)
    assert got.targets.tolist() == [min(columns)]
    assert got.predicted.tolist() == [min(columns)]


def test_hard_labels_are_those_of_the_reference_bit_for_bit(run):
    """Products and differences are rounded one by one, as in eager torch. Here alpha * relu(r - b) is almost
    b, so what is left is mostly rounding, and one rounding less gives other labels."""
    generator = torch.Generator().manual_seed(3)
    base = 100 + torch.randn(40, 300, generator=generator)
    reinforced = base + (base + 1e-5 * torch.randn(40, 300, generator=generator)) / 5.1
    rows = Rows(
        student=torch.randn(40, 300, generator=generator),
        teachers=(base, reinforced),
        teacher_rows=(None, None),
        rule=Rule(combination="whp", weight=5.1, divergence="hard"),
    )
    expected = reference.row_losses(rows, statistics=True).targets
    assert torch.equal(run(rows, cluster=2).targets, expected)


SPECIALS = st.lists(
    st.tuples(
        st.sampled_from(["student", "first", "second"]),
        st.sampled_from([INF, -INF, NAN, -1e30]),
        st.lists(st.integers(0, 66), max_size=3) | st.just(list(range(67))),
    ),
    max_size=3,
)


@given(
    specials=SPECIALS,
    divergence=st.sampled_from(["label", "hard", "cross_entropy", "forward_kl", "reverse_kl", "jsd"]),
    combination=st.sampled_from(["identity", "whp", "offset"]),
    cluster=st.sampled_from([1, 2, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 3),
)
def test_infinities_and_nans(run, specials, divergence, combination, cluster, dtype, seed):
    """Loss, target and gradient are finite, infinite, NaN, zero or ignored where the reference's are."""
    teachers = 0 if divergence == "label" else 1 if combination == "identity" else 2
    rows = random_rows(
        combination if teachers else "none", teachers, divergence, n=1, vocab=67, seed=seed, dtype=dtype
    )
    inputs = [rows.student.clone(), *(t.clone() for t in rows.teachers)]
    for where, value, columns in specials:
        index = ["student", "first", "second"].index(where)
        if index < len(inputs):
            inputs[index][0, columns] = value
    rows = dataclasses.replace(rows, student=inputs[0], teachers=tuple(inputs[1:]))
    truth, gradient = torch.empty(1, 67), torch.full((1, 67), 77.0)
    scale = torch.full((1,), 0.5)
    expected = reference.row_losses(rows, statistics=True, row_scale=scale, gradient=truth)
    got = run(rows, cluster=cluster, row_scale=scale, gradient=gradient)
    assert torch.equal(got.targets, expected.targets) and torch.equal(got.predicted, expected.predicted)
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=2e-6, equal_nan=True)
    assert torch.equal(torch.isnan(gradient), torch.isnan(truth))
    assert torch.equal(torch.isinf(gradient), torch.isinf(truth))
    finite = torch.isfinite(truth)
    error = torch.linalg.vector_norm((gradient - truth)[finite])
    assert error <= 1e-5 * torch.linalg.vector_norm(truth[finite]) + 1e-30


# ---------------------------------------------------------------------------- rows: skipped, gathered, edited


def test_ignored_and_unusable_rows(run):
    """Loss 0, label ignore_index, gradient zero; the others do not notice."""
    rows = random_rows("whp", 2, "forward_kl", n=5)
    base, reinforced = rows.teachers
    base[1, 200], reinforced[2, 0], base[3] = NAN, NAN, -INF
    labels = rows.labels.clone()
    labels[4] = -7
    rows = dataclasses.replace(rows, labels=labels, ignore_index=-7)
    for statistics in (False, True):
        gradient = torch.full((5, 301), NAN)
        got = run(rows, cluster=2, statistics=statistics, row_scale=torch.ones(5), gradient=gradient)
        expected = reference.row_losses(rows, statistics=statistics)
        assert got.losses[1:].tolist() == [0, 0, 0, 0] and got.losses[0] > 0.1
        assert torch.equal(got.targets, expected.targets)
        assert got.entropy[1:].tolist() == [0, 0, 0, 0]
        assert torch.equal(gradient[1:], torch.zeros(4, 301)) and gradient[0].abs().max() > 0.01
        if statistics:
            assert torch.equal(got.predicted, expected.predicted)  # the student's own, of ignored rows too


def test_gathered_teachers(run):
    rows = random_rows("whp", 2, "forward_kl", n=4)
    generator = torch.Generator().manual_seed(1)
    far = torch.randn(9, 301, generator=generator)
    rows = dataclasses.replace(
        rows, teachers=(far, rows.teachers[1]), teacher_rows=(torch.tensor([8, 0, 8, -1]), None)
    )
    gradient, truth = torch.full((4, 301), NAN), torch.empty(4, 301)
    got = run(rows, cluster=4, row_scale=torch.ones(4), gradient=gradient)
    expected = reference.row_losses(rows, statistics=True, row_scale=torch.ones(4), gradient=truth)
    assert got.targets[3] == -100 and torch.equal(got.targets, expected.targets)
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=0)
    assert (relative(gradient[:3], truth[:3]) < 1e-5).all() and torch.equal(gradient[3], torch.zeros(301))


def with_edits(rows: Rows, edits: RowEdits) -> Rows:
    rule = dataclasses.replace(rows.rule, edit=edits.kind, edit_value=edits.value)
    return dataclasses.replace(rows, edit_offsets=edits.offsets, edit_tokens=edits.tokens, rule=rule)


@pytest.mark.parametrize("kind", ["add", "ban"])
@pytest.mark.parametrize("combination, teachers", COMBINED)
def test_row_edits(run, combination, teachers, kind):
    """None, one, a repeated token, tokens past the vocabulary, many (several for a thread); at the peak."""
    rows = random_rows(combination, teachers, "forward_kl", n=5)
    peak = int(rows.teachers[0][1].argmax())
    tokens = [[], [peak], [12, 12, 300, 12], [5, 301, 4000], list(range(0, 300, 3))]
    offsets = torch.tensor([0, *(len(t) for t in tokens)]).cumsum(0)
    edits = RowEdits(offsets, torch.tensor([t for row in tokens for t in row]), kind, 1.75)
    for cluster in (1, 4):
        compare(run, with_edits(rows, edits), cluster=cluster)


def test_a_banned_nan_is_no_nan(run):
    rows = random_rows("whp", 2, "hard", n=2)
    rows.teachers[0][0, 70] = NAN
    rows.teachers[1][1, 70] = NAN
    edits = RowEdits(torch.tensor([0, 1, 2]), torch.tensor([70, 70]), "ban")
    rows = with_edits(rows, edits)
    expected = reference.row_losses(rows, statistics=True).targets
    assert expected[0] >= 0 and expected[1] == -100
    assert torch.equal(run(rows, cluster=2).targets, expected)


def test_the_student_as_its_own_teacher(run):
    """SELF with the label banned (CE-U), the gradient in place."""
    student = random_rows("none", 0, "label", vocab=320).student
    labels = student.argmax(dim=1)
    labels[1] = -100
    edits = RowEdits.at_labels(labels, "ban")
    rule = Rule(combination="identity", divergence="forward_kl")
    rows = with_edits(Rows(student, (student,), (None,), labels, rule=rule), edits)
    truth = torch.empty(3, 320)
    expected = reference.row_losses(rows, row_scale=torch.ones(3), gradient=truth)
    got = run(rows, cluster=4, order=BACKWARDS, statistics=False, row_scale=torch.ones(3), gradient=student)
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=1e-7)
    assert (relative(student[[0, 2]], truth[[0, 2]]) < 1e-5).all()
    assert torch.equal(student[1], torch.zeros(320))


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin, stride", [(0, 320), (1, 320), (8, 328), (3, 317), (0, 304)])
def test_rows_that_are_not_aligned(run, begin, stride, dtype):
    """Rows within wider ones, aligned to 16 bytes or not; what lies beside them is not read, nor written."""
    n, vocab = 3, 301

    def within(values):
        wide = torch.full((n, stride), NAN, dtype=dtype).flatten()
        wide = torch.cat([wide, torch.full((32,), NAN, dtype=dtype)])
        view = wide[begin:].as_strided((n, vocab), (stride, 1), begin)
        view.copy_(values)
        return view

    plain = random_rows("whp", 2, "forward_kl", dtype=dtype)
    rows = dataclasses.replace(
        plain, student=within(plain.student), teachers=tuple(within(t) for t in plain.teachers)
    )
    gradient, expected = within(torch.zeros(n, vocab)), torch.empty(n, vocab, dtype=dtype)
    scale = torch.ones(n)
    for order in (FORWARDS, BACKWARDS):
        got = run(rows, cluster=4, order=order, row_scale=scale, gradient=gradient)
        truth = run(plain, cluster=1, row_scale=scale, gradient=expected)
        torch.testing.assert_close(got.losses, truth.losses, rtol=1e-6, atol=0)
        assert (relative(gradient, expected) <= (1e-6 if dtype == torch.float32 else 4e-3)).all()
        outside = torch.ones(n * stride + 32, dtype=torch.bool)
        outside.as_strided((n, vocab), (stride, 1), begin).fill_(False)
        assert torch.isnan(gradient.as_strided((n * stride + 32,), (1,), 0)[outside]).all()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_one_input_that_is_not_aligned(run, late):
    rows = random_rows("whp", 2, "forward_kl", vocab=320, dtype=torch.bfloat16)
    inputs = [rows.student, *rows.teachers]
    inputs[late] = torch.cat([inputs[late].new_zeros(1), inputs[late].flatten()])[1:].view(3, 320)
    moved = dataclasses.replace(rows, student=inputs[0], teachers=tuple(inputs[1:]))
    assert torch.equal(run(moved, cluster=2).losses, run(rows, cluster=2).losses)


@pytest.mark.parametrize("combination, teachers, divergence", [("none", 0, "label"), ("whp", 2, "jsd")])
@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS])
def test_gradient_in_place(run, combination, teachers, divergence, order):
    rows = random_rows(combination, teachers, divergence, vocab=320)
    apart = torch.empty(3, 320)
    run(rows, cluster=4, row_scale=torch.ones(3), gradient=apart)
    run(rows, cluster=4, order=order, row_scale=torch.ones(3), gradient=rows.student)
    assert torch.equal(rows.student, apart)


@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS])
def test_a_narrower_gradient_over_its_own_rows(run, order):
    """bfloat16 gradients over float32 logits, row over row: they hit the inputs of other blocks too."""
    rows = random_rows("whp", 2, "forward_kl", vocab=320)
    apart = torch.empty(3, 320, dtype=torch.bfloat16)
    run(rows, cluster=4, row_scale=torch.ones(3), gradient=apart)
    over = rows.student.view(torch.bfloat16)[:, 320:]
    run(rows, cluster=4, order=order, row_scale=torch.ones(3), gradient=over)
    assert torch.equal(over, apart)


def test_offsets_past_two_to_the_31(run):
    """Rows 2^31 elements apart, in memory that is never touched between them."""
    stride = 2**31 + 8
    student = torch.empty(stride + 64, dtype=torch.bfloat16).as_strided((2, 64), (stride, 1))
    teacher = torch.empty(stride + 64, dtype=torch.bfloat16).as_strided((2, 64), (stride, 1))
    plain = random_rows("identity", 1, "forward_kl", n=2, vocab=64, dtype=torch.bfloat16)
    student.copy_(plain.student), teacher.copy_(plain.teachers[0])
    expected = torch.empty(2, 64, dtype=torch.bfloat16)
    run(plain, row_scale=torch.ones(2), gradient=expected)
    run(
        dataclasses.replace(plain, student=student, teachers=(teacher,)),
        row_scale=torch.ones(2),
        gradient=student,
    )
    assert torch.equal(student, expected)


def test_no_rows(run):
    rows = random_rows("whp", 2, "forward_kl", n=0)
    assert len(run(rows, row_scale=torch.ones(0), gradient=torch.empty(0, 301)).losses) == 0


# --------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(softcap=30.0), "softcap"),
        (dict(relative_top=0.1), "relative_top"),
        (dict(edit="mean"), "'mean'"),
        (dict(combination="student_offset", divergence="label"), "StudentOffset"),
    ],
)
def test_refused_rules(run, change, complaint):
    rows = random_rows("whp", 2, "hard")
    with pytest.raises(ValueError, match=complaint):
        run(dataclasses.replace(rows, rule=dataclasses.replace(rows.rule, **change)))


def test_refused_tensors(run):
    rows = random_rows("whp", 2, "hard")
    student, (base, reinforced) = rows.student, rows.teachers

    def refused(match, gradient=None, **change):
        scale = None if gradient is None else torch.ones(3)
        with pytest.raises(ValueError, match=match):
            run(dataclasses.replace(rows, **change), row_scale=scale, gradient=gradient)

    refused("student is torch.float64", student=student.double())
    refused("teachers of one dtype", teachers=(base, reinforced.half()))
    refused("teacher 1 has strides", teachers=(base, reinforced.t().contiguous().t()))
    refused("gradient is torch.float64", gradient=torch.empty(3, 301, dtype=torch.float64))
    wide = torch.zeros(4, 301)
    refused("other rows of the student", student=wide[:3], gradient=wide[1:])
    refused("other rows of the teacher 1", teachers=(base, wide[1:]), gradient=wide[:3])
    index = (None, torch.tensor([0, 1, 2]))
    refused("other rows of the teacher 1", teachers=(base, student), teacher_rows=index, gradient=student)
    refused("no student", student=None)
    with pytest.raises(ValueError, match="no labels kernel"):
        cuda.row_labels(rows, [1.0])


def test_gradients_beside_their_inputs_are_taken(run):
    """One buffer for both, row beside row."""
    buffer = torch.zeros(3, 640)
    rows = random_rows("none", 0, "label", vocab=320)
    buffer[:, :320] = rows.student
    expected = torch.empty(3, 320)
    run(rows, row_scale=torch.ones(3), gradient=expected)
    run(dataclasses.replace(rows, student=buffer[:, :320]), row_scale=torch.ones(3), gradient=buffer[:, 320:])
    assert torch.equal(buffer[:, 320:], expected) and torch.equal(buffer[:, :320], rows.student)


@pytest.mark.parametrize(
    "vocabulary, element_size, with_target, blocks",
    [
        (32_000, 2, False, 1),
        (32_000, 2, True, 2),
        (128_256, 2, False, 4),
        (128_256, 2, True, 8),
        (128_256, 4, False, 8),
        (128_256, 4, True, 16),
        (262_144, 2, True, 16),
        (262_144, 4, True, 16),
    ],
)
def test_cluster_size(vocabulary, element_size, with_target, blocks):
    assert cuda.cluster_size(vocabulary, element_size, with_target=with_target) == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_target", [False, True])
def test_the_longest_row(run, dtype, with_target):
    """Python's bound on the vocabulary is the operator's own, and sixteen blocks hold it."""
    size = torch.empty(0, dtype=dtype).element_size()
    with pytest.raises(ValueError, match=r"rows of up to (\d+) columns") as refusal:
        cuda.cluster_size(10**7, size, with_target=with_target)
    most = int(str(refusal.value).split("up to ")[1].split()[0])
    assert cuda.cluster_size(most, size, with_target=with_target) == 16
    rule = ("identity", 1, "hard") if with_target else ("none", 0, "label")
    longest = random_rows(*rule, n=0, vocab=1)
    for vocab, fits in ((most, True), (most + 1, False)):
        logits = torch.empty(0, vocab, dtype=dtype)
        rows = dataclasses.replace(longest, student=logits, teachers=(logits,) * with_target)
        if fits:
            run(rows, cluster=16)
        else:
            with pytest.raises(RuntimeError, match="bytes of shared memory"):
                run(rows, cluster=16)
            with pytest.raises(ValueError, match=f"up to {most} columns"):
                run(rows)


def test_a_row_of_full_length(run):
    """128,256 columns over the blocks that would be chosen, with the GPU's number of threads."""
    rows = random_rows("whp", 2, "forward_kl", n=1, vocab=128_256, dtype=torch.bfloat16)
    compare(run, rows, threads=512)


def test_never_chosen_by_itself(monkeypatch):
    assert cuda.MEASURED_TO_WIN == ()
    assert not any(cuda.wins((9, 0), v) for v in (1, 32_000, 128_256, 262_144))
    monkeypatch.setattr(cuda, "MEASURED_TO_WIN", (((9, 0), range(128_000, 300_000)),))
    assert cuda.wins((9, 0), 128_256) and not cuda.wins((8, 0), 128_256) and not cuda.wins((9, 0), 32_000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_not_available_without_a_gpu():
    available, reason = cuda.available()
    assert not available and "no CUDA GPU" in reason
    with pytest.raises(ValueError, match="not available: there is no CUDA GPU"):
        cuda.row_losses(random_rows("none", 0, "label"))


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_compiles_for_hopper_without_spills(tmp_path):
    """The kernel of bfloat16 students (there are three), with registers for two blocks on an SM."""
    source = tmp_path / "kernel.cu"
    source.write_text(
        '#include "cluster_kernel.cuh"\n'
        "using namespace whp;\n"
        "template __global__ void whp::cluster_row_kernel<Bfloat16>(const __grid_constant__ Arguments);\n"
    )
    command = [NVCC, "-cubin", "-gencode", "arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", "-Xptxas=-v"]
    command += [f"-I{SOURCES}", str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Compiling entry function") == 1
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert "warning" not in done.stderr
    assert int(done.stderr.split("Used ")[1].split()[0]) <= 64
