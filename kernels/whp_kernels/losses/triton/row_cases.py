"""The row kernels with every tile that can be chosen, for ``benchmarks/compile_report.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.rule import Rule
from whp_kernels.losses.triton.catalogue import Case
from whp_kernels.losses.triton.launch import Launch
from whp_kernels.losses.triton.rows import row_labels_launch, row_losses_launch
from whp_kernels.losses.triton.scale import scale_launch

_WIDE, _NARROW = 32000, 2000  # columns: one of each kind for the choice of the tile
_F32, _BF16 = torch.float32, torch.bfloat16
_TEACHERS = {"none": 0, "identity": 1, "whp": 2, "offset": 3, "student_offset": 2}

# name, rule, with gradient, with statistics
_LOSSES = (
    ("label", Rule(), True, False),
    ("label, softcap, statistics", Rule(softcap=30.0), True, True),
    ("label, student_offset", Rule("student_offset", 1.0), True, False),
    ("hard, whp", Rule("whp", 5.0, divergence="hard"), True, False),
    ("hard, whp, no gradient", Rule("whp", 5.0, divergence="hard"), False, True),
    ("forward_kl, whp", Rule("whp", 5.0, divergence="forward_kl"), True, False),
    ("forward_kl, whp, statistics", Rule("whp", 5.0, divergence="forward_kl"), True, True),
    ("forward_kl, whp, no gradient", Rule("whp", 5.0, divergence="forward_kl"), False, False),
    (
        "cross_entropy, offset, relative_top",
        Rule("offset", 1.0, 0.1, divergence="cross_entropy"),
        True,
        False,
    ),
    ("cross_entropy, identity, add", Rule("identity", edit="add", divergence="cross_entropy"), True, False),
    ("forward_kl, whp, mean", Rule("whp", 5.0, edit="mean", divergence="forward_kl"), True, False),
    ("reverse_kl, identity", Rule("identity", divergence="reverse_kl"), True, False),
    ("reverse_kl, identity, ban", Rule("identity", edit="ban", divergence="reverse_kl"), True, False),
    ("jsd, whp", Rule("whp", 5.0, divergence="jsd"), True, False),
    (
        "jsd, offset, all options",
        Rule("offset", 1.0, 0.1, "mask", "mean", divergence="jsd", temperature=2.0, softcap=30.0),
        True,
        True,
    ),
)
_LABELS = (
    ("whp", Rule("whp", divergence="hard"), (5.0,)),
    ("own choice only", Rule("identity", divergence="hard"), ()),
    ("whp, 4 weights, ban", Rule("whp", edit="ban", divergence="hard"), (1.0, 2.0, 3.0, 5.0)),
    ("offset, mean, relative_top", Rule("offset", 1.0, 0.1, edit="mean", divergence="hard"), (1.0,)),
)
# bfloat16 with all of them; float32, whose groups are of 4 columns, and the narrow tile with those that need
# most
_FLOAT32_LOSSES = (
    "label",
    "hard, whp",
    "forward_kl, whp",
    "forward_kl, whp, statistics",
    "cross_entropy, offset, relative_top",
    "forward_kl, whp, mean",
    "reverse_kl, identity, ban",
    "jsd, offset, all options",
)
_NARROW_LOSSES = ("label", "forward_kl, whp, mean", "jsd, offset, all options")


def cases() -> Iterator[Case]:
    """Losses, labels and ``scale_``."""
    for name, rule, gradient, statistics in _LOSSES:
        kinds = [("bfloat16", _BF16, _BF16, _WIDE)]
        if name in _FLOAT32_LOSSES:
            kinds.append(("float32", _F32, _F32, _WIDE))
        if name in _NARROW_LOSSES:
            kinds.append(("narrow float32", _F32, _F32, _NARROW))
        if name == "forward_kl, whp":  # as in the linear loss: the gradient goes into a bfloat16 product
            kinds.append(("float32 to bfloat16", _F32, _BF16, _WIDE))
        for kind, dtype, gradient_dtype, columns in kinds:
            launch = _losses(rule, gradient, statistics, dtype, gradient_dtype, columns)
            yield _case(name, kind, launch, kind == "bfloat16" and name == "forward_kl, whp")
    for name, rule, weights in _LABELS:
        for kind, dtype, columns in (
            ("bfloat16", _BF16, _WIDE),
            ("float32", _F32, _WIDE),
            ("narrow float32", _F32, _NARROW),
        ):
            yield _case(
                name, kind, _labels(rule, weights, dtype, columns), kind == "float32" and name == "whp"
            )
    for dtype in (_F32, _BF16):
        launch = scale_launch(_meta(dtype, 1 << 24), _meta(_F32, 1))
        yield _case("", str(dtype).removeprefix("torch."), launch, dtype == _BF16)


def _case(name: str, kind: str, launch: Launch, quick: bool = False) -> Case:
    tile = f"{launch.arguments['BLOCK']} columns, {launch.warps} warps"
    return Case(f"{name}; {kind}" if name else kind, tile, launch, quick)


def _losses(
    rule: Rule,
    gradient: bool,
    statistics: bool,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    columns: int,
) -> Launch:
    n = 1024
    results = RowLosses(*(_meta(t, n) for t in (_F32, torch.int64, _F32, torch.int64)))
    return row_losses_launch(
        _rows(rule, dtype, columns, n, student=True),
        results,
        statistics,
        _meta(_F32, n) if gradient else None,
        _meta(gradient_dtype, n, columns) if gradient else None,
    )


def _labels(rule: Rule, weights: tuple[float, ...], dtype: torch.dtype, columns: int) -> Launch:
    n = 1024
    chosen, own = _meta(torch.int64, len(weights), n), _meta(torch.int64, n)
    return row_labels_launch(_rows(rule, dtype, columns, n, student=False), weights, chosen, own)


def _rows(rule: Rule, dtype: torch.dtype, columns: int, n: int, student: bool) -> Rows:
    teachers = _TEACHERS[rule.combination]
    edits = rule.edit != "none"
    return Rows(
        student=_meta(dtype, n, columns) if student else None,
        teachers=tuple(_meta(dtype, n, columns) for _ in range(teachers)),
        teacher_rows=tuple(_meta(torch.int64, n) if edits else None for _ in range(teachers)),
        labels=_meta(torch.int64, n) if student else None,
        edit_offsets=_meta(torch.int64, n + 1) if edits else None,
        edit_tokens=_meta(torch.int64, 4 * n) if edits else None,
        rule=rule,
    )


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
