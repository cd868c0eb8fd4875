"""What a kernel's numbers are judged by, and the cases they are judged on.

The rule: the error of a result is the norm of its difference from float64, relative to float64's norm. A
kernel's may be twice that of the same computation in plain torch at the same dtype (both round, differently)
plus about one rounding. The same holds for its worst row beside torch's worst row. Infinities, NaNs and zero
rows must be where they are in float64. A comparison that would accept an error of a half is refused: it could
not tell a zero, reversed or doubled gradient from the right one, which `assert_discriminates` tries.

A backend's tests run `assert_row_losses` and `assert_row_labels` for each of `CASES`; `SAMPLE` is a choice of
them for slow backends in which every family, layout and set of dtypes occurs. Exact results are those of
`whp_kernels.losses.reference` in float64, which test_named_losses.py and test_reference.py hold against
published formulas and plain loops.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor
from whp_kernels.losses import reference
from whp_kernels.losses.combination import (
    Combination,
    Identity,
    Offset,
    RelativeTop,
    RowEdits,
    StudentOffset,
    Whp,
)
from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.rule import Rule

IGNORE = -100
FLOOR = {
    torch.bfloat16: 1e-3,  # a quarter of the largest rounding, about the mean one
    torch.float16: 1.2e-4,
    torch.float32: 6e-6,  # p - 1 at p = 0.95 turns a few roundings of p into this
    torch.float64: 1e-14,
}
LOSS_FLOOR = 1e-5  # log-probabilities around 10 are off by 1e-6; a divergence is a small mean of differences

# -------------------------------------------------------------------------------------------------- the rule


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference relative to the norm of the truth; infinite where an infinity, a NaN or a zero
    stands in another place than in the truth (a zero: if the whole truth is zero)."""
    value, truth = value.detach().double(), truth.detach().double()
    if value.shape != truth.shape:
        return math.inf
    finite = torch.isfinite(truth)
    if not torch.equal(torch.isfinite(value), finite):
        return math.inf
    if not torch.equal(value[~finite].nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5)):
        return math.inf
    difference, norm = float((value[finite] - truth[finite]).norm()), float(truth[finite].norm())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / norm


def assert_no_worse(
    kernel_value: Tensor,
    same_dtype_torch_value: Tensor,
    float64_truth: Tensor,
    factor: float = 2.0,
    floor: float | None = None,
    name: str = "value",
) -> None:
    """The rule, for the whole of a tensor and, if it has two dimensions, for its worst row.

    ``floor`` is added to what is allowed; by default ``FLOOR`` of the dtype.

    Raises:
        AssertionError: the kernel's value breaks the rule, or has another dtype or shape than torch's.
        ValueError: the comparison could not fail: torch itself is too far off, or the truth is not float64.
    """
    if float64_truth.dtype != torch.float64:
        raise ValueError(f"{name}: the truth is {float64_truth.dtype}, expected float64")
    floor = FLOOR[same_dtype_torch_value.dtype] if floor is None else floor
    assert kernel_value.dtype == same_dtype_torch_value.dtype, f"{name} is {kernel_value.dtype}"
    assert kernel_value.shape == float64_truth.shape, f"{name} has shape {tuple(kernel_value.shape)}"
    views = [("as a whole", [kernel_value], [same_dtype_torch_value], [float64_truth])]
    if float64_truth.ndim == 2:
        views.append(("worst row", kernel_value, same_dtype_torch_value, float64_truth))
    for view, values, plain_values, truths in views:
        plain = max((relative_error(p, t) for p, t in zip(plain_values, truths)), default=0.0)
        allowed = factor * plain + floor
        if not allowed < 0.5:
            raise ValueError(f"{name}, {view}: torch's own error is {plain:.2g}, which shows nothing")
        error = max((relative_error(v, t) for v, t in zip(values, truths)), default=0.0)
        assert error <= allowed, (
            f"{name}, {view}: error {error:.3g}, but {allowed:.3g} is allowed "
            f"({factor} x torch's {plain:.3g} + {floor:.2g})"
        )


def assert_discriminates(check: Callable[[Tensor], None], gradient: Tensor) -> None:
    """``check`` accepts ``gradient`` and rejects it times 0, -1 and 2 (by an AssertionError)."""
    check(gradient)
    if not bool((gradient != 0).any()):
        raise ValueError("the gradient is zero: times 0, -1 or 2 it stays the same")
    for factor in (0, -1, 2):
        try:
            check(gradient * factor)
        except AssertionError:
            continue
        raise AssertionError(f"the check accepts a gradient that is wrong by a factor of {factor}")


# ------------------------------------------------------------------------------------------------- the cases


@dataclasses.dataclass(frozen=True)
class Family:
    """One rule. ``edit`` is made at the labels (``add``, ``ban``) or at listed tokens (``mean``)."""

    name: str
    combination: Combination | None
    divergence: str
    teachers: int
    edit: str | None = None
    edit_value: float = 0.0
    options: tuple[tuple[str, float], ...] = ()
    of_itself: bool = False  # the student's own logits are the teacher, in the same memory


KEEP, MASK = RelativeTop(0.1, "keep"), RelativeTop(0.05, "mask")
FAMILIES = [
    Family("label", None, "label", 0),
    Family("label softcap", None, "label", 0, options=(("softcap", 15.0),)),
    Family("whp hard", Whp(5.0), "hard", 2),
    Family("whp hard alpha 0", Whp(0.0), "hard", 2),
    Family("whp hard mean", Whp(5.0), "hard", 2, edit="mean"),
    Family("offset hard mask", Offset(-0.75, MASK), "hard", 2),
    Family("whp forward", Whp(5.0), "forward_kl", 2),
    Family("whp forward mean", Whp(2.0), "forward_kl", 2, "mean", options=(("temperature", 2.0),)),
    Family("whp reverse", Whp(5.0), "reverse_kl", 2),
    Family("whp reverse alpha 0", Whp(0.0), "reverse_kl", 2, options=(("temperature", 0.5),)),
    Family("whp jsd softcap", Whp(4.0), "jsd", 2, options=(("beta", 0.9), ("softcap", 15.0))),
    Family("jsd", Identity(), "jsd", 1, options=(("beta", 0.25), ("temperature", 2.0))),
    Family("undial", Identity(), "cross_entropy", 1, edit="add", edit_value=-10.0),
    Family("ce-u", Identity(), "cross_entropy", 1, edit="ban", of_itself=True),
    Family("uld", Offset(-1.0, KEEP), "forward_kl", 2),
    Family("contrastive", Offset(-1.0, MASK), "forward_kl", 2),
    Family("offset of two", Offset(0.85), "forward_kl", 3, options=(("softcap", 15.0),)),
    Family("student offset", StudentOffset(0.75), "label", 2),
    Family("student offset softcap", StudentOffset(1.5), "label", 2, options=(("softcap", 15.0),)),
]


@dataclasses.dataclass(frozen=True)
class Layout:
    """``n`` rows of ``vocab`` columns, and what is particular about them."""

    name: str
    n: int
    vocab: int


LAYOUTS = [
    Layout("plain", 6, 999),
    Layout("small", 5, 31),
    Layout("one row", 1, 999),
    Layout("below a multiple", 2, 31999),
    Layout("above a multiple", 2, 32001),
    Layout("all ignored", 3, 31),
    Layout("minus infinity", 3, 4099),  # the first 2,100 columns and others; in student and teachers
    Layout("ties", 6, 999),  # logits on a coarse grid, computed with exactly
    Layout("strided", 4, 999),  # columns of a wider matrix, off any alignment; one teacher row for all
    Layout("shifted", 4, 999),  # logits[1, :-1] of a batch
    Layout("gathered", 6, 999),  # teachers with more rows in another order; some used twice, one missing
]
DTYPES = {  # student, teachers, gradient
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16 of float32": (torch.bfloat16, torch.float32, torch.bfloat16),
    "float32 to bfloat16": (torch.float32, torch.bfloat16, torch.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A family at dtypes on a layout; ``str`` of it is the id of a test."""

    family: Family
    dtypes: str
    layout: Layout

    def __str__(self) -> str:
        return f"{self.family.name} - {self.dtypes} - {self.layout.name}".replace(" ", "_")

    @property
    def gradient_dtype(self) -> torch.dtype:
        return DTYPES[self.dtypes][2]

    def rows(self, wide: bool = False) -> Rows:
        """The same rows at every call, in memory of their own; ``wide``: their values in float64."""
        family, n, vocab, particular = self.family, self.layout.n, self.layout.vocab, self.layout.name
        random = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        student, *teachers = _values(random, n, vocab, family, particular)
        labels = _labels(random, n, vocab, particular)
        if particular == "plain" and family.combination is None and not family.options:
            # one confident student: p - 1 is small, and must be rounded only then
            student[3, labels[3]] = -math.inf
            student[3, labels[3]] = student[3].logsumexp(0) + 3
        if family.of_itself:  # without an unlikely label, target and student would be nearly the same
            labels = torch.where(labels == IGNORE, IGNORE, student.argmax(-1))
        index: list[Tensor | None] = [None] * family.teachers
        if particular == "gathered" and not family.of_itself:
            teachers, index = _scattered(random, teachers)
        if particular == "strided" and teachers:
            teachers[-1] = teachers[-1][:1]
        student_dtype, teacher_dtype = DTYPES[self.dtypes][:2]
        student = _laid_out(student.to(student_dtype), wide, particular)
        teachers = [_laid_out(t.to(teacher_dtype), wide, particular) for t in teachers]
        if particular == "strided" and teachers:
            teachers[-1] = teachers[-1].expand(n, -1)
        if family.of_itself:
            teachers = [student]
        edits = self._edits(random, labels, n, vocab)
        rule = Rule.of(family.combination, edits, family.divergence, **dict(family.options))
        needed = family.divergence == "label" or family.of_itself  # unedited, it would be its own target
        return Rows(
            student=student,
            teachers=tuple(teachers),
            teacher_rows=tuple(index),
            labels=labels if needed or particular != "gathered" else None,
            edit_offsets=None if edits is None else edits.offsets,
            edit_tokens=None if edits is None else edits.tokens,
            rule=rule,
            ignore_index=IGNORE,
        )

    def row_scale(self) -> Tensor:
        """What each row's gradient is multiplied with: both signs, and a zero."""
        random = torch.Generator().manual_seed(1)
        scale = torch.rand(self.layout.n, generator=random) + 0.5
        scale[1::3] *= -1
        scale[4::5] = 0
        return scale

    def _edits(self, random, labels: Tensor, n: int, vocab: int) -> RowEdits | None:
        if self.family.edit is None:
            return None
        if self.family.edit != "mean":
            return RowEdits.at_labels(labels, self.family.edit, self.family.edit_value, ignore_index=IGNORE)
        counts = torch.arange(n) % 4  # the first row has none
        tokens = torch.randint(0, vocab, (int(counts.sum()),), generator=random)
        tokens[::3], tokens[1::4] = vocab - 1, vocab + 7  # the last column; no column
        offsets = torch.zeros(n + 1, dtype=torch.int64)
        offsets[1:] = counts.cumsum(0)
        return RowEdits(offsets, tokens, "mean")


CASES = [Case(family, "float32", layout) for layout in LAYOUTS for family in FAMILIES] + [
    Case(family, dtypes, LAYOUTS[0]) for dtypes in DTYPES if dtypes != "float32" for family in FAMILIES
]
SAMPLE = CASES[::4]  # FAMILIES are no multiple of 4, so each of them, each layout and all dtypes occur


def _values(random, n: int, vocab: int, family: Family, particular: str) -> list[Tensor]:
    """Float32 logits of the student and the teachers; the outer columns are likely: they would be missed."""
    common = torch.randn(n, vocab, generator=random) * 1.5
    values = [
        common + torch.randn(n, vocab, generator=random) * spread
        for spread in (0.6, 0.5, 0.9, 0.7)[: family.teachers + 1]
    ]
    for one in values:
        for column in (0, vocab // 2, vocab - 1):
            one[:, column] += 3 + torch.randn(n, generator=random) * 0.5
    if particular == "ties":
        values = [(one * 2).round() / 2 for one in values]
        pair = torch.stack([torch.randperm(vocab, generator=random)[:2] for _ in range(n)])
        for k, one in enumerate(values):  # two columns are equal in every model, and best in most targets
            one.scatter_(
                1, pair, one.amax(-1, keepdim=True).expand(-1, 2) if k < 2 else torch.full((n, 2), -4.0)
            )
    if particular == "minus infinity":
        banned = torch.rand(n, vocab, generator=random) < 0.1
        banned[:, :2100], banned[:, -1] = True, False
        everywhere = not isinstance(family.combination, StudentOffset)  # its second teacher is subtracted
        values = [
            torch.where(banned, -math.inf, one) if everywhere or k < 2 else one
            for k, one in enumerate(values)
        ]
    return values


def _labels(random, n: int, vocab: int, particular: str) -> Tensor:
    """The last and the middle column among them, and an ignored row."""
    labels = torch.randint(vocab - vocab // 8, vocab, (n,), generator=random)
    labels[0] = vocab - 1
    labels[1::4] = 0 if particular != "minus infinity" else vocab - 1
    labels[2::4] = IGNORE
    if particular == "all ignored":
        labels[:] = IGNORE
    return labels


def _scattered(random, teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Teachers with two more rows in another order, and the indices that undo it; row 1 of each has none."""
    moved, index = [], []
    for teacher in teachers:
        n = len(teacher)
        order = torch.randperm(n, generator=random)
        index.append(torch.empty_like(order).index_put_((order,), torch.arange(n)) + 1)
        index[-1][-1] = index[-1][0]
        index[-1][1] = -1
        filler = torch.full_like(teacher[:1], 7.0)
        moved.append(torch.cat([filler, teacher[order], filler]))
    return moved, index


def _laid_out(values: Tensor, wide: bool, particular: str) -> Tensor:
    if wide:
        return values.double()
    n, vocab = values.shape
    if particular == "strided":
        return torch.full((n, vocab + 5), 9.0, dtype=values.dtype)[:, 3 : vocab + 3].copy_(values)
    if particular == "shifted":
        return torch.full((2, n + 1, vocab), 9.0, dtype=values.dtype)[1, :-1].copy_(values)
    return values.clone()


# --------------------------------------------------------------------------------------- a backend on a case


def assert_row_losses(row_losses: Callable[..., RowLosses], case: Case, factor: float = 2.0) -> None:
    """``row_losses`` of a backend against the rule: losses, entropy, targets, predictions and gradient; the
    gradient in memory of its own and in the student's; without gradient; without statistics."""
    scale, shape = case.row_scale(), (case.layout.n, case.layout.vocab)
    truth_gradient = torch.empty(shape, dtype=torch.float64)
    truth = reference.row_losses(
        case.rows(wide=True), statistics=True, row_scale=scale.double(), gradient=truth_gradient
    )
    plain_gradient = torch.empty(shape, dtype=case.gradient_dtype)
    plain = reference.row_losses(case.rows(), statistics=True, row_scale=scale, gradient=plain_gradient)
    if not (torch.equal(truth.targets, plain.targets) and torch.equal(truth.predicted, plain.predicted)):
        raise ValueError(
            f"{case}: an argmax hangs on the rounding to float32, so no backend can be held to it"
        )

    def check_losses(got: RowLosses, what: str, statistics: bool = True) -> None:
        assert_no_worse(got.losses, plain.losses, truth.losses, factor, LOSS_FLOOR, f"losses {what}")
        assert_no_worse(got.entropy, plain.entropy, truth.entropy, factor, LOSS_FLOOR, f"entropy {what}")
        used = plain.targets != IGNORE
        soft = case.rows().rule.soft
        targets = plain.targets if statistics or not soft else torch.where(used, 0, IGNORE)
        predicted = plain.predicted if statistics else torch.zeros_like(plain.predicted)
        for name, values, expected in (
            ("targets", got.targets, targets),
            ("predicted", got.predicted, predicted),
        ):
            assert values.dtype == torch.int64 and torch.equal(values, expected), f"{name} {what}: {values}"

    def check_gradient(gradient: Tensor) -> None:
        assert_no_worse(gradient, plain_gradient, truth_gradient, factor, name="gradient")
        for edge in (slice(0, 1), slice(-1, None)):  # one column weighs little in the norm of a row
            error = relative_error(gradient[:, edge], truth_gradient[:, edge])
            assert error < 0.05, f"gradient of column {edge}: error {error:.3g}"

    rows, guard = case.rows(), 32
    memory = torch.full((2 * guard + shape[0] * shape[1],), math.nan, dtype=case.gradient_dtype)
    gradient = memory[guard:-guard].view(shape)
    check_losses(row_losses(rows, statistics=True, row_scale=scale, gradient=gradient), "with gradient")
    if bool((truth_gradient != 0).any()):
        assert_discriminates(check_gradient, gradient)
    else:
        check_gradient(gradient)
    assert bool(torch.isnan(memory[:guard]).all() and torch.isnan(memory[-guard:]).all()), "wrote outside"
    untouched = case.rows()
    for name, now, before in zip(
        ["student", *["a teacher"] * len(rows.teachers)],
        (rows.student, *rows.teachers),
        (untouched.student, *untouched.teachers),
    ):
        assert torch.equal(now, before), f"{name} was changed"

    check_losses(row_losses(case.rows(), statistics=False, row_scale=None, gradient=None), "alone", False)
    if rows.student.dtype == case.gradient_dtype:
        rows = case.rows()
        around = _around(rows)
        got = row_losses(rows, statistics=True, row_scale=scale, gradient=rows.student)
        check_losses(got, "in place")
        assert torch.equal(rows.student, gradient), "the gradient in place is another"
        assert torch.equal(_around(rows), around), "wrote between the rows"


def _around(rows: Rows) -> Tensor:
    """The memory between the rows of a student that is columns of a wider matrix (else empty)."""
    n, vocab = rows.student.shape
    stride, start = rows.student.stride(0), rows.student.storage_offset()
    return rows.student.as_strided((n - 1, stride - vocab), (stride, 1), start + vocab).clone()


def assert_row_labels(row_labels: Callable[..., tuple[Tensor, Tensor]], case: Case) -> None:
    """``row_labels`` of a backend gives the reference's labels at the same dtypes, for several weights."""
    rows = case.rows()
    if rows.rule.combination in ("none", "student_offset"):
        raise ValueError(f"{case} has no target")
    rows = dataclasses.replace(rows, student=None)
    weights = [rows.rule.weight, 0.0, rows.rule.weight / 8]
    for some in (weights, weights[:1], []):
        expected, expected_own = reference.row_labels(rows, some)
        labels, own = row_labels(rows, some)
        assert labels.dtype == own.dtype == torch.int64
        assert labels.shape == (len(some), case.layout.n) and own.shape == (case.layout.n,)
        assert torch.equal(labels, expected), f"labels for {some}: {labels}, expected {expected}"
        assert torch.equal(own, expected_own), f"own choice: {own}, expected {expected_own}"
