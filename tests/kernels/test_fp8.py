"""Products in 8-bit floats: their definition, gradients, what is kept, and what must not be hidden."""

import pytest
import torch
from whp_kernels.layers import fp8
from whp_kernels.layers.fp8 import E4M3, E5M2, fp8_linear, fp8_linears, quantise

SCALINGS = ("tensorwise", "rowwise")


def numbers(*shape, seed=0, spread=1.0, dtype=torch.bfloat16):
    """Magnitudes over several powers of two, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    return (values * spread).to(dtype)


def in_8_bits(x, dtype, axis):
    """Brute force: float64 numbers that 8 bits stand for, by Python's arithmetic for the scale."""
    largest = x.double().abs().amax() if axis is None else x.double().abs().amax(axis, keepdim=True)
    scale = torch.tensor(
        [2.0 ** int((torch.finfo(dtype).max / m).log2().floor()) for m in largest.flatten()],
        dtype=torch.float64,
    ).view(largest.shape)
    return (x.double() * scale).to(dtype).double() / scale


def expected(x, weights, gradients, scaling):
    """y, dX and dW in float64 of operands rounded to 8 bits."""
    whole = scaling == "tensorwise"
    narrow = E5M2 if whole else E4M3
    of_rows, of_columns = (None, None) if whole else (1, 0)
    y = [in_8_bits(x, E4M3, of_rows) @ in_8_bits(w, E4M3, of_rows).t() for w in weights]
    pairs = list(zip(gradients, weights))
    d_x = sum(in_8_bits(g, narrow, of_rows) @ in_8_bits(w, E4M3, of_columns) for g, w in pairs)
    d_w = [in_8_bits(g, narrow, of_columns).t() @ in_8_bits(x, E4M3, of_columns) for g in gradients]
    return y, d_x, d_w


def run(x, weights, gradients, scaling):
    x = x.clone().requires_grad_()
    weights = [w.clone().requires_grad_() for w in weights]
    results = fp8_linears(x, weights, scaling=scaling)
    torch.autograd.backward(results, gradients)
    return results, x.grad, [w.grad for w in weights]


def scaled_mm_on_cpu(monkeypatch):
    """The way of GPUs: torch's operator on the CPU takes the same operands."""
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)


@pytest.mark.parametrize("way", ["reference", "_scaled_mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_three_products_are_those_of_rounded_operands(scaling, dtype, way, monkeypatch):
    if way == "_scaled_mm":
        scaled_mm_on_cpu(monkeypatch)
    rows = 23  # the third product is over them, and 16 does not divide it
    x = numbers(rows, 48, dtype=dtype)
    weights = [numbers(n, 48, seed=n, spread=0.02, dtype=dtype) for n in (32, 16)]
    gradients = [numbers(rows, n, seed=n + 1, spread=1e-6, dtype=dtype) for n in (32, 16)]
    y, d_x, d_w = run(x, weights, gradients, scaling)
    want_y, want_x, want_w = expected(x, weights, gradients, scaling)
    rounded = dtype == torch.bfloat16 or (way == "_scaled_mm" and scaling == "rowwise")
    for got, want in zip((*y, d_x, *d_w), (*want_y, want_x, *want_w)):
        assert got.dtype == dtype
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < (2**-8 if rounded else 1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_gradients_are_near_those_of_exact_products(scaling):
    x, weight, g = numbers(64, 64), numbers(32, 64, seed=1), numbers(64, 32, seed=2)
    (y,), d_x, (d_w,) = run(x, [weight], [g], scaling)
    for got, want in zip(
        (y, d_x, d_w),
        (x.double() @ weight.double().t(), g.double() @ weight.double(), g.double().t() @ x.double()),
    ):
        assert 0.005 < (got.double() - want).norm() / want.norm() < 0.1


def test_row_wise_scales_spare_small_rows():
    x, weight = numbers(32, 64, dtype=torch.float32), numbers(16, 64, seed=1, dtype=torch.float32)
    x[0] *= 1e6
    small = (x[1:] @ weight.t()).double()
    wrong = {
        s: (fp8_linear(x, weight, scaling=s)[1:].double() - small).norm() / small.norm() for s in SCALINGS
    }
    assert wrong["rowwise"] < 0.06 and wrong["tensorwise"] > 0.5


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "weight", "gradient"])
def test_what_is_not_finite_is_seen(where, bad, scaling):
    tensors = {"x": numbers(16, 32), "weight": numbers(16, 32, seed=1), "gradient": numbers(16, 16, seed=2)}
    tensors[where][3, 5] = bad
    (y,), d_x, (d_w,) = run(tensors["x"], [tensors["weight"]], [tensors["gradient"]], scaling)
    read_by = {"x": (y, d_w), "weight": (y, d_x), "gradient": (d_x, d_w)}[where]
    for result in read_by:
        assert result.isnan().all() if scaling == "tensorwise" else result.isnan().any()


def test_zeros_and_the_largest_magnitudes_do_not_overflow():
    zero = torch.zeros(16, 32)
    for scaling in SCALINGS:
        (y,), d_x, (d_w,) = run(zero, [zero], [torch.zeros(16, 16)], scaling)
        assert not y.any() and not d_x.any() and not d_w.any()
    for largest in (448.0, 447.9, 1.0, 0.99999994, 3e38, 1e-37):
        q = quantise(torch.tensor([[largest, -largest / 3]]), E4M3)
        found = (q.values.double() * q.inverse.double())[0, 0]
        if largest > 1e-30:
            assert abs(found / torch.tensor(largest).double() - 1) < 2**-4
        assert q.values.double().abs().max() <= 448 and (largest < 1e-30 or q.values.double()[0, 0] >= 224)


def test_scales_are_powers_of_two():
    q = quantise(numbers(64, 32, spread=1e-3), E4M3, 1)
    assert (q.inverse.log2() == q.inverse.log2().round()).all() and len(q.inverse.unique()) > 2


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_input_is_kept_in_one_byte(scaling):
    x, weights = (
        numbers(64, 128).requires_grad_(),
        [numbers(16, 128, seed=s).requires_grad_() for s in (1, 2)],
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linears(x, weights, scaling=scaling)
    own = [t for t in kept if all(t.data_ptr() != w.data_ptr() for w in weights)]
    assert sum(t.nbytes for t in own) <= 64 * 128 + 4 * (128 + 2 * 16)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linears(x, [w.detach() for w in weights], scaling=scaling)
    assert not any(t.dtype == E4M3 for t in kept)  # frozen weights have no gradient that would read it


def test_a_gradient_has_the_dtype_that_is_added_up(monkeypatch):
    weight = numbers(16, 32).requires_grad_()
    weight.grad_dtype = torch.float32
    fp8_linear(numbers(16, 32), weight).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())  # never rounded in between


def test_under_autocast_and_with_a_bias():
    x, weight = numbers(2, 8, 32, dtype=torch.float32), numbers(16, 32, seed=1, dtype=torch.float32)
    bias = torch.arange(16.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fp8_linear(x, weight, bias)
    plain = fp8_linear(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 8, 16)
    assert ((y.float() - plain - bias).abs() <= 2**-7 * (plain.abs() + bias)).all()


def test_what_does_not_fit_is_refused():
    assert fp8.fits((32, 48)) and not fp8.fits((32, 40)) and not fp8.fits((8, 48))
    with pytest.raises(ValueError, match="divisible by 16"):
        fp8_linear(numbers(16, 40), numbers(16, 40))
    with pytest.raises(ValueError, match=r"\(16, 32\)"):
        fp8_linear(numbers(16, 48), numbers(16, 32))
    with pytest.raises(ValueError, match="tensorwise"):
        fp8_linear(numbers(16, 32), numbers(16, 32), scaling="blocks")
    assert not fp8.has_fp8(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_which_gpus_have_it(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fp8.has_fp8(torch.device("cuda")) is has
