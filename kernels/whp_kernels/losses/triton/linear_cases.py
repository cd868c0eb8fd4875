"""The kernels from hidden states with every tile that can be chosen, for ``benchmarks/compile_report.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from whp_kernels.losses.linear_rows import LinearRows, LinearState, Projection, Row
from whp_kernels.losses.rule import Rule
from whp_kernels.losses.triton import linear_launch as launches
from whp_kernels.losses.triton.catalogue import Case
from whp_kernels.losses.triton.launch import Launch

_N, _V, _H = 4096, 32000, 4096
_GPUS = tuple(launches.Hardware(132, capability) for capability in (80, 90, 100, None))
_TEACHERS = {"none": 0, "identity": 1, "whp": 2, "offset": 3, "student_offset": 2}
_ALL = {"relative_top": 0.1, "edit": "mean", "softcap": 30.0}

# name, rule, one head for all models, the student as its own teacher
_LOSSES = (
    ("label", Rule(), False, False),
    ("label, softcap", Rule(softcap=30.0), False, False),
    ("label, student_offset", Rule("student_offset", 1.0), False, False),
    ("label, student_offset, one head, softcap", Rule("student_offset", 1.0, softcap=30.0), True, False),
    ("hard, whp", Rule("whp", 5.0, divergence="hard"), False, False),
    ("hard, whp, all options", Rule("whp", 5.0, divergence="hard", **_ALL), False, False),
    ("cross_entropy, self, ban", Rule("identity", edit="ban", divergence="cross_entropy"), False, True),
    ("forward_kl, whp", Rule("whp", 5.0, divergence="forward_kl"), False, False),
    ("forward_kl, whp, one head", Rule("whp", 5.0, divergence="forward_kl"), True, False),
    (
        "reverse_kl, whp, one head, all options",
        Rule("whp", 5.0, divergence="reverse_kl", **_ALL),
        True,
        False,
    ),
    ("jsd, whp", Rule("whp", 5.0, divergence="jsd"), False, False),
    ("forward_kl, offset, one head", Rule("offset", 1.0, divergence="forward_kl"), True, False),
    ("jsd, offset, all options", Rule("offset", 1.0, divergence="jsd", **_ALL), False, False),
    ("jsd, offset, one head, all options", Rule("offset", 1.0, divergence="jsd", **_ALL), True, False),
)
_FEW = ("label", "hard, whp", "forward_kl, whp", "jsd, offset, all options")
_LABELS = (
    ("whp", Rule("whp", divergence="hard"), False),
    ("offset, all options", Rule("offset", divergence="hard", **_ALL), False),
    ("offset, one head, all options", Rule("offset", divergence="hard", **_ALL), True),
)


def cases() -> Iterator[Case]:
    """Each pass of each loss, and labels for three weights; GPUs that get the same tile and code share a
    case."""
    found: dict[tuple, Case] = {}
    for gpu in _GPUS:
        for name, launch in _launches(gpu):
            arguments = launch.arguments
            tile = "{ROWS} x {COLUMNS} x {WIDTH}".format(**arguments)
            tile += f", {launch.stages} stages" + (", shared" if arguments.get("SHARED") else "")
            key = (launch.kernel.__name__, name, tile)
            before = found[key].capabilities if key in found else ()
            quick = name == "label; bfloat16" and "losses" in launch.kernel.__name__
            found[key] = Case(name, tile, launch, quick, (*before, gpu.capability))
    yield from found.values()


def _launches(gpu: launches.Hardware) -> Iterator[tuple[str, Launch]]:
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for name, rule, one_head, own in _LOSSES:
            if (dtype == torch.float32 or gpu.capability is None) and name not in _FEW:
                continue
            rows = _rows(rule, dtype, one_head, own)
            state = LinearState(_meta(torch.float32, len(Row), _N), _meta(torch.int64, _N))
            passes = [launches.losses(rows, state, True, gpu)[0]]
            if rule.divergence == "jsd":
                passes.append(launches.mixture(rows, state, gpu)[0])
            scale, buffer = _meta(torch.float32, _N), _meta(dtype, _N, 2048)
            whole = slice(0, _N), slice(0, 2048)
            passes.append(launches.gradient(rows, state, scale, buffer, *whole, gpu))
            if name == "jsd, offset, all options":
                passes.append(launches.first(rows, state, gpu, mean=False, fp_fusion=rule.soft)[0])
                passes.append(launches.first(rows, state, gpu, mean=True, fp_fusion=rule.soft)[0])
            for launch in passes:
                mean = ", mean" if launch.arguments.get("MEAN") else ""
                yield f"{name}{mean}; {kind}", launch
        for name, rule, one_head in _LABELS:
            rows = _rows(rule, dtype, one_head, False)
            rows = dataclasses.replace(rows, hidden=None, weight=None, bias=None)
            yield f"{name}; {kind}", launches.labels(rows, state, (1.0, 3.0, 5.0), gpu)[0]


def _rows(rule: Rule, dtype: torch.dtype, one_head: bool, own: bool) -> LinearRows:
    head, bias = _meta(dtype, _V, _H), _meta(torch.float32, _V) if rule.softcap else None

    def model() -> Projection:
        return Projection(_meta(dtype, _N, _H), head if one_head else _meta(dtype, _V, _H), bias)

    student = model()
    teachers = (student,) if own else tuple(model() for _ in range(_TEACHERS[rule.combination]))
    edits = rule.edit != "none"
    return LinearRows(
        *student,
        teachers=teachers,
        labels=_meta(torch.int64, _N),
        edit_offsets=_meta(torch.int64, _N + 1) if edits else None,
        edit_tokens=_meta(torch.int64, 4 * _N) if edits else None,
        rule=rule,
    )


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
