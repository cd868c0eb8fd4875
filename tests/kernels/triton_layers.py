"""The Triton layers beside the reference, in the interpreter or on a GPU; test_layers_triton.py runs this.

Triton's interpreter rounds bfloat16 towards zero when it stores, float16 as a GPU does: there float16 takes
the place of bfloat16. Strides, masks and offsets are the same.
"""

import os
import sys

import pytest
import torch
from error_rule import assert_discriminates, assert_no_worse
from whp_kernels.layers import columns, dispatch, reference, residual_rms_norm, rope, stacked_linear, swiglu
from whp_kernels.layers import triton as layers_triton
from whp_kernels.layers.triton.rms_norm import norm_tile, weight_parts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
F32, F64 = torch.float32, torch.float64
NARROW = torch.float16 if INTERPRETED else torch.bfloat16
NORM = sys.modules["whp_kernels.layers.triton.rms_norm"]  # the package has a function of this name
EPS = 1e-5
FLOOR = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(*shape, seed=0, scale=1.0, dtype=F32):
    values = scale * torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes milliseconds a program."""
    if INTERPRETED:
        monkeypatch.setattr(NORM, "SUM_COLUMNS", 4096)


def double(value):
    if isinstance(value, torch.dtype):
        return F64
    return value.double() if isinstance(value, torch.Tensor) else value


def judge(name, found, plain, exact):
    """The project's error rule, which a gradient times 0, -1 or 2 must fail."""
    assert found.shape == plain.shape and found.dtype == plain.dtype, name
    flat = [t.reshape(-1, t.shape[-1]) if t.dim() else t for t in (found, plain, exact)]

    def check(value):
        assert_no_worse(value, *flat[1:], name=name, floor=FLOOR)

    assert_discriminates(check, flat[0])


# ---------------------------------------------------------------------------------------------------- RMSNorm

# all tiles: many rows a program, one row, and rows that no program holds; sizes that are no tile's
SHAPES = [(3, 5), (2, 11, 64), (3, 1100), (2, 8300)] + ([] if INTERPRETED else [(64, 4096), (64, 8192)])
DTYPES = [(F32, NARROW, NARROW), (NARROW, NARROW, NARROW), (F32, F32, F32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream, branch, out", DTYPES)
def test_rms_norm(shape, stream, branch, out):
    x, y, w = (
        draw(*shape, dtype=stream),
        draw(*shape, seed=1, dtype=branch),
        draw(shape[-1], seed=2, dtype=out),
    )
    g, g_sum = draw(*shape, seed=3, dtype=out), draw(*shape, seed=4, dtype=stream)
    found = layers_triton.rms_norm(x, y, w, EPS, out)
    plain = reference.rms_norm(x, y, w, EPS, out)
    assert torch.equal(found[0], plain[0])
    total, scale = plain[0], plain[2]  # the sum's own rounding is not counted again
    exact = reference.rms_norm(total.double(), None, w.double(), EPS, F64)
    for k, name in ((1, "norm"), (2, "scale")):
        judge(name, found[k], plain[k], exact[k])
    for sums, branch_dtype, weight_too in ((g_sum, branch, True), (None, None, False)):
        arguments = (g, sums, total, w, scale, branch_dtype, weight_too)
        found = layers_triton.rms_norm_backward(*arguments)
        plain = reference.rms_norm_backward(*arguments)
        exact = reference.rms_norm_backward(*map(double, arguments[:5]), F64, True)
        assert [t is None for t in found] == [t is None for t in plain]
        for name, *values in zip(("g_x", "g_branch", "g_weight"), found, plain, exact):
            if values[0] is not None:
                judge(name, *values)


def test_without_a_branch_the_sum_is_x():
    x, w = draw(3, 70), draw(70, seed=1)
    total, out, scale = layers_triton.rms_norm(x, None, w, EPS, F32)
    assert total.data_ptr() == x.data_ptr()
    plain = reference.rms_norm(x, None, w, EPS, F32)
    torch.testing.assert_close((out, scale), plain[1:])
    torch.testing.assert_close(layers_triton.rms_norm(x.t().contiguous().t(), None, w, EPS, F32)[1], plain[1])
    for rows in (0, 1):
        results = layers_triton.rms_norm(x[:rows], None, w, EPS, F32)
        assert results[1].shape == (rows, 70)
        arguments = (x[:rows], None, x[:rows], w, results[2], None, True)
        found, expected = layers_triton.rms_norm_backward(*arguments), reference.rms_norm_backward(*arguments)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("width", [48, 8300])
def test_more_rows_than_programs_and_the_same_bits_each_time(width, monkeypatch):
    tile = norm_tile(width)
    monkeypatch.setattr(NORM, "weight_parts", lambda rows, tile: 2)
    monkeypatch.setattr(NORM, "SUM_COLUMNS", 2048)
    rows = 2 * tile.rows + 1
    g, x, w = draw(rows, width), draw(rows, width, seed=1), draw(width, seed=2)
    scale = reference.rms_norm(x, None, w, EPS, F32)[2]
    arguments = (g, None, x, w, scale, None, True)
    found = layers_triton.rms_norm_backward(*arguments)
    for value, expected in zip(found, reference.rms_norm_backward(*arguments)):
        torch.testing.assert_close(value, expected)
    again = layers_triton.rms_norm_backward(*arguments)
    assert torch.equal(found[0], again[0]) and torch.equal(found[2], again[2])


def test_parts_do_not_depend_on_the_device():
    assert weight_parts(100_000, norm_tile(4096)) == 256
    assert weight_parts(100_000, norm_tile(128)) == 1024
    assert weight_parts(100_000, norm_tile(16384)) == 256
    assert weight_parts(3, norm_tile(4096)) == 3


# ------------------------------------------------------------------------------------------------------- RoPE


def tables(places, depth, batch=None):
    shape = (places, depth // 2) if batch is None else (batch, places, depth // 2)
    angles = draw(*shape, seed=9)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


@pytest.mark.parametrize(
    "batch, places, heads, depth",
    [(1, 1, (1, 1), 2), (2, 2, (4, 2), 64), (2, 2, (5, 1), 12), (1, 2, (17, 3), 96)],
)
@pytest.mark.parametrize("own_tables, dtype", [(False, F32), (True, NARROW)])
def test_rope(batch, places, heads, depth, own_tables, dtype):
    counts = (*heads, heads[1])
    apart = [draw(batch, places, n, depth, seed=k, dtype=dtype) for k, n in enumerate(counts)]
    beside = columns.empty_columns(apart, trailing=2)
    for to, x in zip(beside, apart):
        to.copy_(x)
    cos, sin = tables(places, depth, batch if own_tables else None)
    for inverse in (False, True):
        plain = reference.rope_heads(*apart, cos, sin, inverse)
        exact = reference.rope_heads(*map(double, (*apart, cos, sin)), inverse)
        # as in training: columns are read in the forward pass and written in the backward pass
        found = layers_triton.rope_heads(*(apart if inverse else beside), cos, sin, inverse, inverse)
        assert columns.are_columns(found, 2) == inverse
        for name, *values in zip("qkv", found, plain, exact):
            judge(name, *values)
        assert torch.equal(found[2], apart[2])
    for value, expected in zip(layers_triton.rope_heads(*apart[:2], None, cos, sin, True), found):
        assert value.is_contiguous() and torch.equal(value, expected)


# ----------------------------------------------------------------------------------------------------- SwiGLU


@pytest.mark.parametrize("dtype", [F32, NARROW])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (1, 2, 1030)])
def test_swiglu(shape, dtype):
    g, *pair = (draw(*shape, seed=k, scale=3.0, dtype=dtype) for k in range(3))
    halves = columns.empty_columns(pair)
    for to, x in zip(halves, pair):
        to.copy_(x)
    plain = (reference.swiglu(*pair), *reference.swiglu_backward(g, *pair))
    exact = (reference.swiglu(*map(double, pair)), *reference.swiglu_backward(*map(double, (g, *pair))))
    for given in (pair, halves):
        gradients = layers_triton.swiglu_backward(g, *given, True)
        assert columns.are_columns(gradients)
        apart = layers_triton.swiglu_backward(g, *given)
        assert all(torch.equal(*values) for values in zip(gradients, apart))
        found = (layers_triton.swiglu(*given), *gradients)
        for name, *values in zip(("out", "g_gate", "g_up"), found, plain, exact):
            judge(name, *values)
    strided = g.t().contiguous().t() if g.dim() == 2 else g
    for value, expected in zip(layers_triton.swiglu_backward(strided, *halves), gradients):
        assert torch.equal(value, expected)


def test_swiglu_far_out():
    gate = torch.tensor([1e4, -1e4, 88.5, -88.5, 0.0, torch.inf, torch.nan], device=DEVICE)
    up, one = torch.full_like(gate, 2.0), torch.ones_like(gate)
    assert layers_triton.swiglu(gate, up)[:6].tolist() == pytest.approx(
        [2e4, 0, 177, 0, 0, torch.inf], abs=1e-34
    )
    assert layers_triton.swiglu(gate, up)[6].isnan()
    g_gate, g_up = layers_triton.swiglu_backward(one, gate, up)
    assert g_gate[:5].tolist() == pytest.approx([2, 0, 2, 0, 1], abs=1e-30)
    assert g_up[:5].tolist() == pytest.approx([1e4, 0, 88.5, 0, 0], abs=1e-30)


# ------------------------------------------------------------------------------------- together, by autograd


def test_a_block_by_autograd(monkeypatch):
    """Projections, rotation, norm and gate, through dispatch: the gradients are those of float64."""
    monkeypatch.setenv("WHP_KERNELS_LAYERS", "triton")
    dispatch._asked.cache_clear()
    try:
        found = _block_gradients(F32)
        assert dispatch.backend(torch.empty(1, device=DEVICE)) is layers_triton
        monkeypatch.setenv("WHP_KERNELS_LAYERS", "reference")
        dispatch._asked.cache_clear()
        plain, exact = _block_gradients(F32), _block_gradients(F64)
    finally:
        dispatch._asked.cache_clear()
    for k, values in enumerate(zip(found, plain, exact)):
        judge(str(k), *values)


def _block_gradients(dtype):
    x = draw(2, 3, 16, dtype=dtype).requires_grad_()
    storage = draw(16 + 8 + 8 + 24 + 24, 16, seed=1, scale=0.3, dtype=dtype)
    weights = [w.detach().requires_grad_() for w in storage.split([16, 8, 8, 24, 24])]
    norm = draw(16, seed=2, dtype=dtype).requires_grad_()
    cos, sin = (t.to(dtype) for t in tables(3, 8))
    total, out = residual_rms_norm(x, None, norm, EPS)
    q, k, v = (y.unflatten(-1, (-1, 8)) for y in stacked_linear(out, weights[:3]))
    q, k, v = rope(q, k, cos, sin, v)
    mixed = (q * (k + v).repeat_interleave(2, 2)).flatten(2)
    total, out = residual_rms_norm(total, mixed, norm, EPS)
    loss = swiglu(*stacked_linear(out, weights[3:])).square().sum() + total.square().sum()
    return torch.autograd.grad(loss, [x, norm, *weights])


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_rows_beyond_two_to_the_31():
    width = 4096
    rows = 2**31 // width + 3
    x = torch.randn(rows, width, dtype=NARROW, device=DEVICE)
    w = torch.ones(width, dtype=NARROW, device=DEVICE)
    out = layers_triton.rms_norm(x, None, w, EPS, NARROW)[1]
    torch.testing.assert_close(out[-3:], reference.rms_norm(x[-3:], None, w, EPS, NARROW)[1])
    out = layers_triton.swiglu(x, x)
    torch.testing.assert_close(out[-3:], reference.swiglu(x[-3:], x[-3:]))
