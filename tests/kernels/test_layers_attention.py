"""The compiled causal attention against its definition in float64."""

import itertools

import pytest
import torch
from whp_kernels.layers import causal_attention, has_causal_attention, packed_causal_attention

F32, BF16 = torch.float32, torch.bfloat16
served = [dtype for dtype in (F32, BF16) if has_causal_attention(dtype)]
pytestmark = pytest.mark.skipif(not served, reason="no compiled attention on this machine")

# batch, heads, kv_heads, queries, keys, depth, window: blocks of 64 queries, panels of 64 keys, 16 columns
CASES = [
    (1, 2, 1, 1, 1, 5, None),
    (2, 3, 3, 7, 7, 16, None),
    (2, 6, 2, 150, 150, 16, 40),
    (1, 4, 2, 65, 65, 8, None),
    (2, 2, 2, 128, 128, 64, None),
    (2, 3, 1, 33, 200, 12, None),
    (1, 2, 2, 300, 300, 96, 64),
    (1, 1, 1, 64, 129, 128, 65),
    (1, 2, 1, 65, 130, 33, 70),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(case, dtype):
    batch, heads, kv_heads, queries, keys, depth, _ = case
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    return [draw(batch, t, h, depth, seed=k).to(dtype) for k, (t, h) in enumerate(shapes)]


def definition(q, k, v, window, wide=torch.float64):
    """As eager torch computes it: scores and softmax in ``wide``, weights in the dtype of q."""
    group, (queries, keys) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)).to(wide) * q.shape[3] ** -0.5
    place = torch.arange(keys - queries, keys)[:, None]
    hidden = torch.arange(keys) > place
    if window is not None:
        hidden |= torch.arange(keys) <= place - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def with_gradients(function, q, k, v, g):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), g)]


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("dtype", served)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    q, k, v, g = inputs(case, dtype)
    window = case[-1]
    found = with_gradients(lambda *t: causal_attention(*t, window=window), q, k, v, g)
    plain = with_gradients(lambda *t: definition(*t, window, F32), q, k, v, g)
    exact = with_gradients(lambda *t: definition(*t, window), *(t.double() for t in (q, k, v, g)))
    for name, a, b, c in zip(("out", "g_q", "g_k", "g_v"), found, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == c.shape
        if case[4] == 1 and name in ("g_q", "g_k"):
            assert a.abs().max() == 0  # a softmax of one key is constant
            continue
        allowed = max(2 * error(b, c), 4e-7)
        assert error(a, c) <= allowed, name
        assert min(error(a * factor, c) for factor in (0.0, -1.0, 2.0, 0.95)) > allowed, name


@pytest.mark.parametrize("dtype", served)
def test_a_window_of_one_has_no_gradient_of_scores(dtype):
    q, k, v, g = inputs((1, 2, 2, 100, 100, 24, 1), dtype)
    out, g_q, g_k, g_v = with_gradients(lambda *t: causal_attention(*t, window=1), q, k, v, g)
    assert torch.equal(out, v) and torch.equal(g_v, g)
    assert g_q.abs().max() == g_k.abs().max() == 0


@pytest.mark.parametrize("dtype", served)
def test_any_strides_and_a_scale(dtype):
    q, k, v, g = inputs((2, 4, 2, 70, 70, 16, None), dtype)
    expected = with_gradients(lambda *t: causal_attention(*t, scale=0.5), q, k, v, g)
    apart = [torch.cat((x, x), 3)[..., :16].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for other in (apart, turned):
        found = with_gradients(lambda *t: causal_attention(*t, scale=0.5), *other, g)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    halved = with_gradients(causal_attention, q * 2, k, v, g)  # 1 / sqrt(16) = 0.25
    torch.testing.assert_close(halved[0], expected[0])


@pytest.mark.parametrize("dtype", served)
def test_large_scores_and_the_number_of_threads(dtype):
    """Weights of a single key each, as far as float32 goes; the same bits whatever the number of threads."""
    q, k, v, g = inputs((3, 2, 1, 90, 90, 16, None), dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(causal_attention, q * 1e4, k, v, g))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.combinations(results, 2):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    exact = definition((q * 1e4).double(), k.double(), v.double(), None)
    assert error(results[0][0], exact) < 0.01
    assert all(tensor.isfinite().all() for tensor in results[0])


def test_nothing_grows_with_the_square_of_the_length():
    """A backward pass is left with q, k, v and one number a query."""
    dtype = served[0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        q = draw(1, 500, 1, 8).to(dtype).requires_grad_()
        causal_attention(q, q, q)
    assert sum(kept) == 3 * 500 * 8 + 500


def test_refused():
    q = torch.zeros(1, 4, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="causal_attention is not there for torch.float64"):
        causal_attention(q, q, q)
    q = q.to(served[0])
    for k, v in ((q[:, :3], q[:, :3]), (q, q[:, :3]), (q[:, :, :0], q[:, :, :0]), (q[..., :4], q)):
        with pytest.raises(RuntimeError):
            causal_attention(q, k, v)


# ------------------------------------------------------------------------------------------ packed sequences

LENGTHS = (70, 1, 0, 33, 130, 2)


def packed_inputs(dtype, heads=4, kv_heads=2, depth=24):
    """q, k, v, g as slices of one tensor [tokens, .., depth], and where the sequences end."""
    every = draw(sum(LENGTHS), 2 * heads + 2 * kv_heads, depth).to(dtype)
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    return every.split([heads, kv_heads, kv_heads, heads], dim=1), ends


@pytest.mark.parametrize("dtype", served)
@pytest.mark.parametrize("window", [None, 1, 40])
def test_packed_is_every_sequence_alone(dtype, window):
    """To the last bit, and with any number of threads."""
    (q, k, v, g), ends = packed_inputs(dtype)
    expected = [[], [], [], []]
    for first, length in zip(ends.tolist(), LENGTHS):
        if length:
            alone = [x[None, first : first + length] for x in (q, k, v, g)]
            found = with_gradients(lambda *t: causal_attention(*t, window=window), *alone)
            for parts, part in zip(expected, found):
                parts.append(part[0])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = with_gradients(lambda *t: packed_causal_attention(*t, ends, window=window), q, k, v, g)
            for a, parts in zip(found, expected, strict=True):
                assert a.is_contiguous() and torch.equal(a, torch.cat(parts))
    finally:
        torch.set_num_threads(before)


def test_packed_scale_and_what_is_kept():
    (q, k, v, _), ends = packed_inputs(served[0])
    doubled = packed_causal_attention(q * 2, k, v, ends)
    torch.testing.assert_close(doubled, packed_causal_attention(q, k, v, ends, scale=2 * 24**-0.5))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        packed_causal_attention(q.detach().requires_grad_(), k, v, ends)
    assert sum(kept) == q.numel() + k.numel() + v.numel() + len(q) * 4 + len(ends)


def test_packed_refused():
    (q, k, v, _), ends = packed_inputs(served[0])
    with pytest.raises(ValueError, match="packed_causal_attention is not there for torch.float64"):
        packed_causal_attention(q.double(), k, v, ends)
    wrong = [ends[:-1], ends + 1, ends.long(), ends.flip(0), ends[:0], ends[None]]
    for other in (*wrong, torch.cat((ends[:2], ends[:1], ends[1:]))):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            packed_causal_attention(q, k, v, other)
    for other in (k[:-1], k[:, :0], k[..., :4], k[:, :1]):
        with pytest.raises(RuntimeError):
            packed_causal_attention(q, other, v, ends)
