"""Attention over equal lengths against its definition in float64, for all backends."""

import itertools

import pytest
import torch

from whp_fast import attention_dense as module
from whp_fast.attention_dense import BLOCK, LONGEST_BLOCKED, causal_mask, dense_attention


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "blocked"])
def on_cpu(request, monkeypatch):
    """Both backends for causal bfloat16 on the CPU."""
    compiled = request.param == "compiled"
    if compiled and not module.has_causal_attention(torch.bfloat16):
        pytest.skip("no compiled attention on this machine")
    monkeypatch.setattr(module, "has_causal_attention", lambda dtype: compiled and dtype == torch.bfloat16)


def definition(q, k, v, causal=True, window=None, key_mask=None):
    """One query at a time, one head at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    (b, heads, length, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    for row, head, i in itertools.product(range(b), range(heads), range(length)):
        place = keys - length + i
        seen = [
            j
            for j in range(keys)
            if (not causal or j <= place)
            and (window is None or j > place - window)
            and (key_mask is None or key_mask[row, j])
        ]
        if seen:
            kv = head // (heads // kv_heads)
            weights = torch.softmax(k[row, kv, seen] @ q[row, head, i] / d**0.5, 0)
            out[row, head, i] = weights @ v[row, kv, seen]
    return out


def make(b, heads, kv_heads, length, keys, d, dtype=torch.float64, seed=0):
    """q, k, v as a model makes them: [B, T, heads, D] seen as [B, heads, T, D], not contiguous."""
    g = torch.Generator().manual_seed(seed)
    shapes = (length, heads), (keys, kv_heads), (keys, kv_heads)
    return [
        torch.randn(b, t, h, d, dtype=torch.float64, generator=g).to(dtype).transpose(1, 2) for t, h in shapes
    ]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "length, keys, causal, window",
    [
        (1, 1, True, None),
        (9, 9, True, None),
        (9, 9, True, 1),
        (9, 9, True, 4),
        (9, 9, True, 9),
        (9, 9, True, 100),
        (9, 9, False, None),
        (4, 9, True, None),
        (4, 9, True, 3),
        (1, 9, True, None),
        (1, 9, True, 3),
        (1, 9, False, None),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_against_definition(heads, kv_heads, length, keys, causal, window, masked):
    q, k, v = make(2, heads, kv_heads, length, keys, 6)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) < 0.6
        key_mask[0] = False  # a row with nothing to see gives 0, no NaN
    found = dense_attention(q, k, v, causal=causal, window=window, key_mask=key_mask)
    assert found.shape == q.shape
    torch.testing.assert_close(found, definition(q, k, v, causal, window, key_mask), atol=1e-12, rtol=0)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def run(q, k, v, g, **options):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*inputs, **options)
    assert out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, inputs, g.to(out.dtype))]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "length, window",
    [(2, None), (BLOCK, None), (BLOCK + 1, None), (150, None), (150, 1), (150, 40), (150, BLOCK), (200, 100)],
)
def test_against_float64(on_cpu, heads, kv_heads, length, window):
    q, k, v = make(2, heads, kv_heads, length, length, 16, torch.bfloat16, seed=length)
    g = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = run(q.double(), k.double(), v.double(), g, window=window)
    found = run(q, k, v, g, window=window)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
        if window == 1 and name in ("dq", "dk"):
            assert a.abs().max() == b.abs().max() == 0  # a softmax of one key is constant
        else:
            assert error(a, b) < 0.012, name
            # The tolerance sees a gradient of the wrong size or sign.
            assert min(error(a * c, b) for c in (0.0, -1.0, 2.0, 0.9)) > 0.05


def test_is_no_worse_than_eager(on_cpu):
    """Within twice the error of the same arithmetic written out in torch: bf16 scores and bf16 weights."""
    q, k, v = make(2, 6, 2, 200, 200, 32, torch.bfloat16)
    q = q * 3
    g = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, found = run(q.double(), k.double(), v.double(), g), run(q, k, v, g)

    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    scores = inputs[0] @ inputs[1].repeat_interleave(3, 1).transpose(2, 3) * 32**-0.5
    scores = scores.masked_fill(~causal_mask(200, 200, None, "cpu"), float("-inf"))
    out = torch.softmax(scores.float(), -1).bfloat16() @ inputs[2].repeat_interleave(3, 1)
    eager = [out.detach(), *torch.autograd.grad(out, inputs, g)]
    for a, b, c in zip(found, eager, exact, strict=True):
        assert error(a, c) < 2 * error(b, c)


def test_gradients_of_keys_seen_by_many_blocks(on_cpu):
    """Sums over blocks are kept in float32: kept in bf16 these errors are 0.007."""
    q, k, v = make(1, 2, 2, 1000, 1000, 16, torch.bfloat16)
    g = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, found = run(q.double(), k.double(), v.double(), g), run(q, k, v, g)
    assert max(error(a, b) for a, b in zip(found, exact, strict=True)) < 0.006


def test_second_backward_and_partial_gradients(on_cpu):
    q, k, v = make(1, 4, 2, 70, 70, 8, torch.bfloat16)
    v = v.detach().requires_grad_()
    out = dense_attention(q, k, v)
    first = torch.autograd.grad(out.sum(), v, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), v)[0])


def test_longer_than_the_blocked_backend_takes(on_cpu):
    q, k, v = make(1, 1, 1, LONGEST_BLOCKED + 3, LONGEST_BLOCKED + 3, 4, torch.bfloat16)
    exact = dense_attention(q.double(), k.double(), v.double(), window=50)
    assert error(dense_attention(q, k, v, window=50), exact) < 0.01


def test_which_backend(monkeypatch):
    """The compiled one wherever it can be; SDPA for masks, single queries, other dtypes and no causality."""
    called = []
    monkeypatch.setattr(module, "has_causal_attention", lambda dtype: dtype != torch.float64)
    monkeypatch.setattr(module, "causal_attention", lambda q, k, v, window: called.append(window) or q)
    q, k, v = make(1, 2, 1, 5, 9, 4, torch.bfloat16)
    assert dense_attention(q, k, v, window=3).shape == q.shape and called == [3]
    dense_attention(q.float(), k.float(), v.float(), window=9)
    assert called == [3, None]
    for tensors, options in (
        ((q, k, v), {"causal": False}),
        ((q, k, v), {"key_mask": torch.ones(1, 9, dtype=torch.bool)}),
        ((q[:, :, :1], k, v), {}),
        ((q.double(), k.double(), v.double()), {}),
    ):
        dense_attention(*tensors, **options)
    assert len(called) == 2


def test_wrong_calls():
    q, k, v = make(1, 2, 2, 4, 3, 4)
    with pytest.raises(ValueError, match="4 queries"):
        dense_attention(q, k, v)
    with pytest.raises(ValueError, match="needs causal=True"):
        dense_attention(q, k, v, causal=False, window=2)
