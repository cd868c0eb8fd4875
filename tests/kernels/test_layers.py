"""The layers against float64, every instruction set of this machine beside the plain torch definition."""

import itertools

import pytest
import torch
from whp_kernels import extension
from whp_kernels.layers import (
    columns,
    cpp,
    dispatch,
    embedding,
    reference,
    residual_rms_norm,
    rms_norm,
    rope,
    stacked_linear,
    swiglu,
)
from whp_kernels.losses.cpp import isas

compiled = pytest.mark.skipif(extension.load() is None, reason=str(extension.reason()))
ISAS = isas() if extension.load() is not None else []
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
EPS = 1e-5


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def as_good_as_torch(found, plain, exact, what):
    """At most twice the error of plain torch; the check itself would see a wrong factor."""
    allowed = max(2 * error(plain, exact), 2e-7)
    assert error(found, exact) <= allowed, what
    assert min(error(found * factor, exact) for factor in (0.0, -1.0, 2.0, 0.95)) > allowed, what


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("WHP_KERNELS_ISA", request.param)
    return request.param


SHAPES = [(1, 1), (3, 7), (5, 16), (2, 3, 33), (67, 256), (200, 40)]


@compiled
@pytest.mark.parametrize(
    "x_dtype, branch_dtype, dtype", [(F32, BF16, BF16), (F32, F32, F32), (BF16, BF16, BF16)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(isa, shape, x_dtype, branch_dtype, dtype):
    x, branch = draw(*shape).to(x_dtype), draw(*shape, seed=1).to(branch_dtype)
    weight = draw(shape[-1], seed=2).to(dtype)
    g_out, g_sum = draw(*shape, seed=3).to(dtype), draw(*shape, seed=4).to(x_dtype)
    results = []
    for backend, cast in ((cpp, lambda t: t), (reference, lambda t: t), (reference, torch.Tensor.double)):
        dtypes = [cast(torch.empty(0, dtype=d)).dtype for d in (dtype, branch_dtype)]
        total, out, scale = backend.rms_norm(cast(x), cast(branch), cast(weight), EPS, dtypes[0])
        # one sum for all, so that its rounding is not counted again
        start = (results[0][0] if results else total, results[0][2] if results else scale)
        gradients = backend.rms_norm_backward(
            cast(g_out), cast(g_sum), cast(start[0]), cast(weight), start[1].to(scale.dtype), dtypes[1], True
        )
        results.append((total, out, scale, *gradients))
    names = ("sum", "out", "scale", "g_x", "g_branch", "g_weight")
    for name, found, plain, exact in zip(names, *results, strict=True):
        assert found.dtype == plain.dtype and found.shape == plain.shape, name
        as_good_as_torch(found.flatten(), plain.flatten(), exact.flatten(), name)


@compiled
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 5, 16), (33, 65), (7, 704)])
def test_swiglu(isa, shape, dtype):
    g, gate, up = (draw(*shape, seed=k, scale=3.0).to(dtype) for k in range(3))
    results = [
        (backend.swiglu(*map(cast, (gate, up))), *backend.swiglu_backward(*map(cast, (g, gate, up))))
        for backend, cast in ((cpp, torch.clone), (reference, torch.clone), (reference, torch.Tensor.double))
    ]
    for name, found, plain, exact in zip(("out", "g_gate", "g_up"), *results, strict=True):
        assert found.shape == shape and found.dtype == dtype
        as_good_as_torch(found, plain, exact, name)


@compiled
def test_swiglu_far_out(isa):
    gate = torch.tensor([1e4, -1e4, 88.5, -88.5, 0.0, -0.0, torch.inf, torch.nan])
    up = torch.full_like(gate, 2.0)
    out = cpp.swiglu(gate, up)
    assert out[:6].tolist() == [2e4, 0.0, 177.0, pytest.approx(0.0, abs=1e-34), 0.0, 0.0]
    assert out[6] == torch.inf and out[7].isnan()
    g_gate, g_up = cpp.swiglu_backward(torch.ones_like(gate), gate, up)
    assert g_gate[:6].tolist() == pytest.approx([2.0, 0.0, 2.0, 0.0, 1.0, 1.0], abs=1e-30)
    assert g_up[:6].tolist() == pytest.approx([1e4, 0.0, 88.5, 0.0, 0.0, 0.0], abs=1e-30)


def tables(places, depth, batch=None):
    shape = (places, depth // 2) if batch is None else (batch, places, depth // 2)
    angles = draw(*shape, seed=9).float()
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


@compiled
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "batch, places, heads, depth", [(1, 1, 1, 2), (2, 5, 3, 12), (2, 9, 2, 64), (3, 4, 1, 34)]
)
@pytest.mark.parametrize("own_tables", [False, True])
def test_rope(isa, batch, places, heads, depth, own_tables, dtype):
    x = draw(batch, places, heads + 1, depth).to(dtype)[:, :, 1:]  # rows that are not adjacent
    cos, sin = tables(places, depth, batch if own_tables else None)
    for inverse in (False, True):
        found = cpp.rope(x, cos, sin, inverse)
        plain = reference.rope(x, cos, sin, inverse)
        exact = reference.rope(x.double(), cos.double(), sin.double(), inverse)
        assert found.shape == x.shape and found.dtype == dtype
        as_good_as_torch(found, plain, exact, inverse)


@pytest.mark.parametrize("backend", [reference, pytest.param(cpp, marks=compiled)])
def test_results_beside_each_other(backend):
    """What the gradients of stacked products are written into."""
    apart = [draw(2, 3, n, 6, seed=n).float() for n in (4, 2, 1)]
    cos, sin = tables(3, 6)
    expected = [backend.rope(apart[0], cos, sin, True), backend.rope(apart[1], cos, sin, True), apart[2]]
    found = backend.rope_heads(*apart, cos, sin, True, True)
    assert columns.are_columns(found, 2) and all(map(torch.equal, found, expected))
    plain = backend.rope_heads(*apart[:2], None, cos, sin, True)
    assert not columns.are_columns(plain, 2) and all(map(torch.equal, plain, expected))
    g, gate, up = (draw(3, 5, seed=k).float() for k in range(3))
    found, expected = (backend.swiglu_backward(g, gate, up, in_one) for in_one in (True, False))
    assert columns.are_columns(found) and not columns.are_columns(expected)
    assert all(map(torch.equal, found, expected))
    assert columns.whole_of(found).data_ptr() == found[0].data_ptr()
    assert torch.equal(columns.whole_of(found), torch.cat(expected, -1))


def test_what_is_not_beside_each_other():
    whole = draw(3, 4, 10)
    a, b = whole.split([4, 6], -1)
    assert columns.are_columns((a, b)) and not columns.are_columns((b, a))
    assert not columns.are_columns((a, b[..., 1:])) and not columns.are_columns((a[:2], b[:2].clone()))
    assert not columns.are_columns((a, b.float())) and not columns.are_columns((a[:2], b[1:]))
    assert not columns.are_columns((a.transpose(0, 1), b)) and not columns.are_columns((a[..., ::2], b))
    overlapping = whole.as_strided((3, 10), (7, 1)).split(5, -1)
    assert not columns.are_columns(overlapping)
    heads = a.unflatten(-1, (2, 2)), b.unflatten(-1, (3, 2))
    assert columns.are_columns(heads, 2) and torch.equal(columns.whole_of(heads, 2), whole)
    assert not columns.are_columns((heads[0].transpose(2, 3), heads[1]), 2)


def test_rope_is_a_rotation_and_its_inverse_the_transpose():
    cos, sin = (t.double() for t in tables(5, 8))
    x, y = draw(2, 5, 3, 8), draw(2, 5, 3, 8, seed=1)
    turned = reference.rope(x, cos, sin, False)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos[..., :4], sin[..., 4:])
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1))
    torch.testing.assert_close(reference.rope(turned, cos, sin, True), x)
    # of any table, also one that is no rotation
    cos, sin = draw(5, 1, 8, seed=2), draw(5, 1, 8, seed=3)
    left, right = reference.rope(x, cos, sin, False), reference.rope(y, cos, sin, True)
    torch.testing.assert_close((left * y).sum(), (x * right).sum())


# ------------------------------------------------------------------------------------------ with autograd


def test_gradients_of_the_definitions():
    x, branch, weight = (
        draw(*s, seed=k).requires_grad_() for k, s in enumerate([(2, 3, 5), (2, 3, 5), (5,)])
    )
    assert torch.autograd.gradcheck(lambda *t: residual_rms_norm(*t, 1e-2), (x, branch, weight))
    assert torch.autograd.gradcheck(lambda x, w: residual_rms_norm(x, None, w, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (x, branch))
    q, k = draw(2, 3, 4, 6).requires_grad_(), draw(2, 3, 1, 6, seed=5).requires_grad_()
    cos, sin = (t.double() for t in tables(3, 6))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_residual_stream_and_its_gradients(dtype):
    """x is float32, what is added may be narrower; each gradient comes in the dtype of its tensor, and that
    of the stream is added within."""
    x, y = draw(4, 6).float().requires_grad_(), draw(4, 6, seed=1).to(dtype).requires_grad_()
    weight = draw(6, seed=2).to(dtype).requires_grad_()
    total, out = residual_rms_norm(x, y, weight, EPS)
    assert (total.dtype, out.dtype) == (F32, dtype)
    assert torch.equal(total, x + y)
    upstream = draw(4, 6, seed=3).float()
    both = torch.autograd.grad((total, out), (x, y, weight), (upstream, out.detach()), retain_graph=True)
    alone = torch.autograd.grad(out, (x, y, weight), out.detach(), retain_graph=True)
    through = torch.autograd.grad(total, (x, y), upstream)
    assert [t.dtype for t in both] == [F32, dtype, dtype]
    torch.testing.assert_close(both[0], alone[0] + upstream)
    assert torch.equal(both[1], both[0].to(dtype)) and torch.equal(both[2], alone[2])
    assert torch.equal(through[0], upstream) and torch.equal(through[1], upstream.to(dtype))


def test_without_a_branch_the_stream_is_x_itself():
    x, weight = draw(3, 4).float().requires_grad_(), torch.ones(4, requires_grad=True)
    total, out = residual_rms_norm(x, None, weight, EPS, BF16)
    assert total.data_ptr() == x.data_ptr() and out.dtype == BF16
    (g,) = torch.autograd.grad((total, out), x, (torch.ones(3, 4), torch.zeros(3, 4, dtype=BF16)))
    assert torch.equal(g, torch.ones(3, 4))
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x.t().contiguous().t(), weight, EPS))


def test_frozen_weight_and_second_backward():
    x, weight = draw(3, 4).float().requires_grad_(), torch.ones(4)
    out = rms_norm(x, weight, EPS)
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), x)[0])


@compiled
def test_gradients_do_not_depend_on_the_number_of_threads():
    g, x, weight = draw(500, 96).float(), draw(500, 96, seed=1).float(), draw(96, seed=2).float()
    _, _, scale = cpp.rms_norm(x, None, weight, EPS, F32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpp.rms_norm_backward(g, None, x, weight, scale, None, True))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.combinations(results, 2):
        assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])


def test_no_rows():
    x, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.shape == (0, 5) and torch.equal(weight.grad, torch.zeros(5))
    assert swiglu(x, x).shape == (0, 5)


# ---------------------------------------------------------------------------------------------- embedding


def test_a_frequent_token_keeps_its_gradient():
    """2,000 places with one token: in bfloat16 the sum would stop growing at 256."""
    weight = draw(4, 3).to(BF16).requires_grad_()
    ids = torch.ones(2, 1000, dtype=torch.int64)
    ids[0, :5] = 3
    out = embedding(ids, weight, F32)
    assert out.dtype == F32 and torch.equal(out[0, 0], weight[3].float())
    out.sum().backward()
    expected = torch.tensor([0, 1995, 0, 5]).to(BF16)[:, None].expand(4, 3)
    assert torch.equal(weight.grad, expected)
    assert embedding(ids, weight).dtype == BF16


@pytest.mark.parametrize("dtype", [F32, F64])
def test_embedding_is_torchs(dtype):
    weight, ids = draw(7, 3).to(dtype).requires_grad_(), torch.tensor([[1, 2, 2], [6, 0, 1]])
    g = draw(2, 3, 3, seed=1).to(dtype)
    expected = torch.autograd.grad(torch.nn.functional.embedding(ids, weight), weight, g)[0]
    out = embedding(ids, weight)
    assert torch.equal(out, weight[ids])
    torch.testing.assert_close(torch.autograd.grad(out, weight, g)[0], expected)


# ----------------------------------------------------------------------------------------------- dispatch


@compiled
def test_which_backend():
    f32, bf16, f64 = (torch.empty(1, dtype=dtype) for dtype in (F32, BF16, F64))
    assert dispatch.backend(f32, None, bf16) is cpp
    assert dispatch.backend(f32, f64) is reference
    assert dispatch.backend(f32, torch.empty(1, device="meta")) is reference


@pytest.fixture
def asking(monkeypatch):
    """Sets WHP_KERNELS_LAYERS as if no layer had run before."""

    def ask(name):
        monkeypatch.setenv("WHP_KERNELS_LAYERS", name)
        dispatch._asked.cache_clear()

    yield ask
    dispatch._asked.cache_clear()


@compiled
def test_a_backend_can_be_asked_for(asking, monkeypatch):
    f32, f16, f64 = (torch.empty(1, dtype=dtype) for dtype in (F32, torch.float16, F64))
    asking("reference")
    assert dispatch.backend(f32) is reference
    asking("cpp")
    assert dispatch.backend(f32) is cpp and dispatch.backend(f16) is reference
    triton = pytest.importorskip("whp_kernels.layers.triton")
    asking("triton")
    assert dispatch.backend(f32, f16) is triton and dispatch.backend(f32, f64) is reference
    asking("fast")
    with pytest.raises(ValueError, match="WHP_KERNELS_LAYERS is 'fast'"):
        dispatch.backend(f32)
    monkeypatch.setattr(dispatch, "_triton", lambda: None)
    asking("triton")
    with pytest.raises(ValueError, match="install triton"):
        dispatch.backend(f32)
    monkeypatch.setattr(dispatch.extension, "load", lambda: None)
    asking("cpp")
    with pytest.raises(ValueError, match="WHP_KERNELS_LAYERS is 'cpp', but"):
        dispatch.backend(f32)


def test_on_a_gpu_it_is_triton(monkeypatch):
    """By the device alone: a tensor that says it is there."""

    class OnGPU:
        is_cuda, is_cpu, dtype = True, False, BF16

    triton = pytest.importorskip("whp_kernels.layers.triton")
    assert dispatch.backend(OnGPU(), None, OnGPU()) is triton
    assert dispatch.backend(OnGPU(), torch.empty(1)) is reference
    monkeypatch.setattr(OnGPU, "dtype", F64)
    assert dispatch.backend(OnGPU()) is reference


# ------------------------------------------------------------------------------------- under torch.compile


def compiled_and_eager(call, *leaves):
    """The results and gradients of both; whatever breaks the graph raises."""
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        made = run(*leaves)
        made = made if isinstance(made, tuple) else (made,)
        grads = torch.autograd.grad(made, leaves, [draw(*y.shape, seed=7).to(y.dtype) for y in made])
        results.append([*made, *grads])
    return zip(*results, strict=True)


def test_norm_under_compile():
    x, branch = draw(3, 6).float().requires_grad_(), draw(3, 6, seed=1).to(BF16).requires_grad_()
    weight = draw(6, seed=2).to(BF16).requires_grad_()
    for found, eager in compiled_and_eager(lambda *t: residual_rms_norm(*t, EPS), x, branch, weight):
        torch.testing.assert_close(found, eager)
    for found, eager in compiled_and_eager(lambda x, w: rms_norm(x, w, EPS), x, weight):
        torch.testing.assert_close(found, eager)


def test_swiglu_under_compile():
    gate, up = draw(3, 10).float().split(5, -1)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    for found, eager in compiled_and_eager(swiglu, gate, up):
        torch.testing.assert_close(found, eager)


def test_rope_and_stacked_products_under_compile():
    cos, sin = tables(3, 4)
    x, w = draw(2, 3, 6).float().requires_grad_(), draw(16, 6, seed=1).float()
    weights = [part.detach().requires_grad_() for part in w.split([8, 4, 4])]

    def call(x, *weights):
        q, k, v = (y.unflatten(-1, (-1, 4)) for y in stacked_linear(x, weights))
        return rope(q, k, cos, sin, v)

    for found, eager in compiled_and_eager(call, x, *weights):
        torch.testing.assert_close(found, eager)


def test_wrong_calls():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"weight \(5,\)"):
        rms_norm(x, torch.ones(5), EPS)
    with pytest.raises(ValueError, match=r"branch \(4, 2\)"):
        residual_rms_norm(x, x.t(), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="the same shape and dtype"):
        swiglu(x, x.double())
