"""The layers' kernels with every tile that can be chosen, for ``benchmarks/compile_report.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from whp_kernels.layers.columns import empty_columns
from whp_kernels.layers.triton.rms_norm import (
    backward_launch,
    forward_launch,
    norm_tile,
    sums_launch,
    weight_parts,
)
from whp_kernels.layers.triton.rope import rope_launch
from whp_kernels.layers.triton.swiglu import BLOCK, WARPS, swiglu_backward_launch, swiglu_forward_launch
from whp_kernels.losses.triton.catalogue import Case

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_TOKENS = 4096
# one width for each tile: of heads (q_norm and k_norm), of models, and of what no program holds as a whole
_WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 5120, 16384)
# stream, branch and norm
_NORMS = (
    ("bfloat16", _F32, _BF16, _BF16),
    ("all bfloat16", _BF16, _BF16, _BF16),
    ("float32", _F32, _F32, _F32),
)


def cases() -> Iterator[Case]:
    """RMSNorm, rotary embedding and SwiGLU, forward and backward."""
    for width in _WIDTHS:
        for name, stream, branch, out in _NORMS:
            quick = width == 4096 and name == "bfloat16"
            yield from _norms(f"{width}, {name}", width, stream, branch, out, quick)
    yield from _norms("5120, float16", 5120, _F32, _F16, _F16, False)
    for width in (64, 4096):
        parts, out = _meta(_F32, 256, width), _meta(_F32, width)
        yield Case(str(width), "32 x 32, 4 warps", sums_launch(parts, out))
    for dtype in (_BF16, _F32):
        yield from _ropes(dtype)
        yield from _swiglus(dtype)


def _norms(name, width, stream, branch, out, quick) -> Iterator[Case]:
    tile = norm_tile(width)
    shown = f"{tile.rows} x {tile.block}, {tile.warps} warps" + ("" if tile.whole else ", looped")

    def rows(dtype):
        return _meta(dtype, _TOKENS, width)

    weight, scale = _meta(out, width), _meta(_F32, _TOKENS)
    for added in (rows(branch), None):
        launch = forward_launch(rows(stream), added, weight, 1e-5, rows(stream), rows(out), scale)
        yield Case(f"{name}{'' if added is not None else ', no branch'}", shown, launch, quick)
    parts = _meta(_F32, weight_parts(_TOKENS, tile), width)
    apart = rows(branch) if branch != stream else None
    for what, g_sum, g_branch, sums in (
        ("", rows(stream), apart, parts),
        (", frozen, no branch", None, None, None),
    ):
        launch = backward_launch(rows(out), g_sum, rows(stream), weight, scale, rows(stream), g_branch, sums)
        yield Case(name + what, shown, launch, quick and not what)


def _ropes(dtype) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    for depth, heads in ((128, (32, 8)), (64, (32, 8)), (256, (16, 16)), (96, (32, 32)), (80, (1, 1))):
        shapes = [_meta(dtype, 2, 2048, count, depth) for count in (*heads, heads[1])]
        table = _meta(_F32, 2048, 1, depth)
        columns = empty_columns(shapes, trailing=2)
        for what, given, made, inverse in (
            ("", shapes[:2], shapes[:2], False),
            (", columns", columns, shapes, False),
            (", inverse, columns", shapes, columns, True),
        ):
            launch = rope_launch(given, made, table, table, inverse)
            tile = f"{launch.arguments['HEADS']} x {launch.arguments['HALF']}, {launch.warps} warps"
            quick = dtype == _BF16 and depth == 128 and inverse
            yield Case(f"{name}, {heads} heads of {depth}{what}", tile, launch, quick)


def _swiglus(dtype) -> Iterator[Case]:
    name, tile = str(dtype).removeprefix("torch."), f"{BLOCK} columns, {WARPS} warps"
    g, gate, up = (_meta(dtype, _TOKENS, 11008) for _ in range(3))
    halves = empty_columns([gate, up])
    for what, pair in (("", [gate, up]), (", halves", halves)):
        quick = dtype == _BF16 and bool(what)
        yield Case(name + what, tile, swiglu_forward_launch(*pair, g))
        yield Case(name + what, tile, swiglu_backward_launch(g, *pair, *pair), quick)


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
