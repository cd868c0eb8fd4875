"""What the losses promise on the CPU, line by line met or not (``python -m benchmarks.loss --check``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

TOKENS, VOCAB = 1024, 32_000
LINEAR_TOKENS, HIDDEN = 2048, 1024
IN_PLACE_MB = 64
PRODUCTS = 1.15  # total time by that of the matrix products alone
FASTER = {"whp_soft": {"eager": 15, "compile": 3}, "whp_hard": {"eager": 10, "compile": 2}}
LINEAR = ("linear_whp_soft", "linear_whp_hard", "linear_ce", "linear_labels")


@dataclass(frozen=True)
class Requirement:
    what: str
    found: str
    met: bool


def requirements(rows: Sequence[dict[str, Any]], ops: Collection[str]) -> list[Requirement]:
    """One line each, of the operations ``ops``; what was not measured is not met, but linear operations in
    float32 need not be measured. A rival is the fastest (for memory the smallest) of its variants."""
    lines = []
    measured = {(row["op"], row["dtype"]) for row in rows}
    for dtype in ("float32", "bfloat16"):
        for op, faster in FASTER.items():
            if op not in ops:
                continue
            group = {
                row["impl"]: row
                for row in rows
                if (row["op"], row["dtype"], row["tokens"], row["vocab"]) == (op, dtype, TOKENS, VOCAB)
            }
            ours = group.get("whp_kernels_inplace")
            for rival, times in faster.items():
                what = f"{op}, {dtype}: in place at least {times}x as fast as {rival}"
                best = _least(group, rival, "total_ms")
                lines.append(
                    _line(what, best, ours and ours["total_ms"], lambda r, t=times: r >= t, "{:.1f}x")
                )
            what = f"{op}, {dtype}: in place below {IN_PLACE_MB} MB"
            peak = ours and ours["peak_extra_mb"]
            lines.append(_line(what, peak, 1, lambda r: r < IN_PLACE_MB, "{:.1f} MB"))
        for op in LINEAR:
            if op in ops and (dtype == "bfloat16" or (op, dtype) in measured):
                lines += _linear(rows, op, dtype)
    return lines


def _linear(rows: Sequence[dict[str, Any]], op: str, dtype: str) -> list[Requirement]:
    size = (LINEAR_TOKENS, VOCAB, HIDDEN)
    group = {
        row["impl"]: row
        for row in rows
        if (row["op"], row["dtype"]) == (op, dtype) and (row["tokens"], row["vocab"], row["hidden"]) == size
    }
    ours = group.get("whp_kernels")
    total, peak = ours and ours["total_ms"], ours and ours["peak_extra_mb"]
    floor = _least(group, "bare_gemms", "total_ms")
    what = f"{op}, {dtype}: within {PRODUCTS}x of the matrix products"
    lines = [_line(what, total, floor, lambda r: r <= PRODUCTS, "{:.2f}x")]
    for rival in ("eager", "compile"):
        fastest, smallest = (_least(group, rival, name) for name in ("total_ms", "peak_extra_mb"))
        what = f"{op}, {dtype}: not slower than {rival}"
        lines.append(_line(what, fastest, total, lambda r: r >= 1, "{:.2f}x as fast"))
        what = f"{op}, {dtype}: under a quarter of the memory of {rival}"
        lines.append(_line(what, peak, smallest, lambda r: r < 0.25, "{:.2f} of it"))
    return lines


def _least(group: dict[str, dict[str, Any]], rival: str, name: str) -> float | None:
    """The least of a figure among the variants of a rival (eager in two dtypes)."""
    return min((row[name] for impl, row in group.items() if impl in (rival, f"{rival}_f32")), default=None)


def _line(what: str, value: float | None, by: float | None, met, form: str) -> Requirement:
    if value is None or not by:
        return Requirement(what, "not measured", False)
    return Requirement(what, form.format(value / by), bool(met(value / by)))
