"""Products of narrow operands against float64, on every path of ``whp_kernels.gemm``.

A float32 sum of K products is off by the roundings of its partial sums. `assert_float32_sums` allows two to
four times what they come to, at most 1e-6: rounding results to bfloat16 would be off by 1.7e-3.
"""

import contextlib
import ctypes
import math
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from whp_kernels import extension, gemm

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LIBC = ctypes.CDLL(None, use_errno=True)
LAYOUTS = ("rows", "transposed", "elements")


def missing_operator() -> str | None:
    if extension.load() is None:
        return extension.reason()
    if not torch.ops.whp_kernels_C.has_avx512_bf16():
        return "this processor has no AVX-512 BF16"
    return None


needs_operator = pytest.mark.skipif(missing_operator() is not None, reason=str(missing_operator()))


def operator(out, a, b, accumulate):
    torch.ops.whp_kernels_C.mm_bf16_f32_(out, a, b, accumulate)
    return out


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matrix(rows, columns, seed, dtype=BF16, layout="rows"):
    """Normal numbers, whose rows are adjacent, whose columns are, or neither."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=random).to(dtype)
    if layout == "rows":
        return torch.full((rows, columns + 3), math.nan, dtype=dtype)[:, 1 : columns + 1].copy_(values)
    if layout == "transposed":
        return torch.full((columns, rows + 5), math.nan, dtype=dtype).t()[2 : rows + 2].copy_(values)
    return torch.full((columns, rows, 2), math.nan, dtype=dtype)[:, :, 0].t().copy_(values)


def assert_float32_sums(result, a, b, added=None):
    """``result`` is ``a @ b`` (+ ``added``) with the error of float32 sums, each element and as a whole.

    The whole is measured by what sums of random signs come to, for a single sum can by chance be near zero.
    """
    assert result.dtype == F32 and result.shape == (a.shape[0], b.shape[1])
    a, b, result = a.double().cpu(), b.double().cpu(), result.double().cpu()
    added = torch.zeros_like(result) if added is None else added.double()
    error = (result - (a @ b + added)).abs()
    unit, depth = 2.0**-24, a.shape[1] + 1
    bound = depth * unit * (a.abs() @ b.abs() + added.abs())
    assert bool((error <= bound).all()), f"one element is off by {error.max():.3g}"
    relative = float(error.norm() / (a.square() @ b.square() + added.square()).sum().sqrt())
    allowed = (math.sqrt(min(depth, 1024)) / 2 + 1) * unit
    assert relative <= allowed, f"error {relative:.3g}, {allowed:.3g} is allowed"


# ---------------------------------------------------------------------------------------------- the operator

# around the register tile (14 x 32), the pairs and words of packing (2, 32) and the blocks (1022, 256, 1024)
SHAPES = [
    (1, 1, 1),
    (14, 2, 32),
    (13, 31, 31),
    (15, 33, 33),
    (28, 64, 64),
    (1023, 65, 34),
    (30, 1025, 257),
    (29, 2049, 40),
    (3, 7, 600),
]


@needs_operator
@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("m, k, n", SHAPES)
def test_every_layout(m, k, n, a_layout, b_layout):
    a, b = matrix(m, k, 1, layout=a_layout), matrix(k, n, 2, layout=b_layout)
    out = torch.full((m, n), math.nan)
    operator(out, a, b, False)
    assert_float32_sums(out, a, b)
    before = torch.randn(m, n, generator=torch.Generator().manual_seed(3)) * math.sqrt(k)
    assert_float32_sums(operator(before.clone(), a, b, True), a, b, before)


@needs_operator
@given(
    m=st.integers(1, 45),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    accumulate=st.booleans(),
    gap=st.integers(0, 3),
)
def test_any_size(m, k, n, layouts, accumulate, gap):
    a, b = matrix(m, k, 4, layout=layouts[0]), matrix(k, n, 5, layout=layouts[1])
    memory = torch.full((m + 2, n + gap), 3.0)
    out = memory[1 : m + 1, :n]
    operator(out, a, b, accumulate)
    assert_float32_sums(out, a, b, torch.full((m, n), 3.0) if accumulate else None)
    assert bool((memory[0] == 3).all() and (memory[-1] == 3).all() and (memory[1:-1, n:] == 3).all())


@needs_operator
def test_the_check_rejects_results_rounded_to_bfloat16():
    a, b = matrix(40, 1024, 6), matrix(1024, 50, 7)
    out = operator(torch.empty(40, 50), a, b, False)
    assert_float32_sums(out, a, b)
    for wrong in (out.to(BF16).float(), (a @ b).float(), out * 0, -out, 2 * out):
        with pytest.raises(AssertionError):
            assert_float32_sums(wrong, a, b)


@needs_operator
def test_sums_are_float32_where_bfloat16_ones_would_stand_still():
    a, b = torch.ones(3, 3000, dtype=BF16), torch.ones(3000, 40, dtype=BF16)
    a[:, 0] = 2.0**12
    assert torch.equal(operator(torch.empty(3, 40), a, b, False), torch.full((3, 40), 2.0**12 + 2999))


@needs_operator
@pytest.mark.parametrize("m, k, n", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0), (1, 0, 1)])
def test_empty(m, k, n):
    a, b = torch.ones(m, k, dtype=BF16), torch.ones(k, n, dtype=BF16)
    memory = torch.full((m, n + 1), 5.0)
    operator(memory[:, :n], a, b, True)
    assert bool((memory == 5).all())
    operator(memory[:, :n], a, b, False)
    assert bool((memory[:, :n] == 0).all() and (memory[:, n:] == 5).all())


@needs_operator
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nans_reach_what_they_must_and_nothing_else(value, layout):
    m, k, n = 17, 35, 37  # nothing is a multiple of anything: the rest of each tile and pair is filled up
    a, b = matrix(m, k, 8, layout=layout), matrix(k, n, 9, layout=layout)
    a[16, 34] = a[3, 0] = value
    b[34, 36] = b[10, 5] = value
    b[34, 7] = 0  # inf * 0 is NaN
    truth = a.double() @ b.double()
    out = operator(torch.empty(m, n), a, b, False)
    odd = ~torch.isfinite(truth)
    assert 0 < int(odd.sum()) < m * n / 2
    assert torch.equal(out[odd].double().nan_to_num(nan=0.5), truth[odd].nan_to_num(nan=0.5))
    torch.testing.assert_close(out[~odd].double(), truth[~odd], rtol=1e-4, atol=1e-5)
    stays = torch.zeros(m, n)
    stays[0, 0], stays[16, 35] = math.nan, math.inf
    out = operator(stays, matrix(m, k, 8), matrix(k, n, 9), True)
    assert bool(out[0, 0].isnan()) and out[16, 35] == math.inf and int(torch.isfinite(out).sum()) == m * n - 2


@needs_operator
@pytest.mark.parametrize("number", [2, 4, 7])
@pytest.mark.parametrize("m, k, n", [(300, 1025, 200), (29, 1300, 1999), (2036, 64, 300), (14, 8000, 160)])
def test_threads_and_other_rows_change_no_bit(m, k, n, number):
    a, b = matrix(m, k, 10), matrix(n, k, 11).t()
    out = operator(torch.empty(m, n), a, b, False)
    with threads(number):
        for _ in range(5):  # threads that disturb each other do not always do so
            assert torch.equal(operator(torch.full((m, n), math.nan), a, b, False), out)
    assert torch.equal(operator(torch.empty(5, n), a[7:12], b, False), out[7:12])


@needs_operator
def test_expanded_operands():
    row, column = matrix(1, 65, 12), matrix(65, 1, 13)
    a, b = row.expand(20, 65), column.expand(65, 40)
    assert_float32_sums(operator(torch.empty(20, 40), a, b, False), a, b)


def before_a_forbidden_page(values):
    """``values`` in memory that ends where a page begins that must not be touched."""
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert LIBC.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    start = pages * mmap.PAGESIZE - size
    return (
        torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=start)
        .view(values.shape)
        .copy_(values)
    )


@needs_operator
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (15, 35, 37), (13, 33, 15)])
def test_nothing_past_the_end_is_touched(m, k, n):
    wide, tall = before_a_forbidden_page(matrix(m, k, 32)), before_a_forbidden_page(matrix(k, m, 33))
    right, down = before_a_forbidden_page(matrix(k, n, 34)), before_a_forbidden_page(matrix(n, k, 35))
    out = before_a_forbidden_page(torch.zeros(m, n))
    for a in (wide, tall.t()):
        for b in (right, down.t()):
            for accumulate in (False, True):
                operator(out, a, b, accumulate)  # a fault ends the process


@needs_operator
def test_strides_past_two_to_the_31():
    try:  # pages that nothing is written to cost nothing
        memory = torch.empty(2**32 // 2 + 100, dtype=BF16)
    except RuntimeError:
        pytest.skip("4 GiB of address space are not to be had")
    a, b = memory.as_strided((2, 40), (2**31 + 8, 1)), matrix(40, 33, 14)
    a.copy_(matrix(2, 40, 15))
    assert_float32_sums(operator(torch.empty(2, 33), a, b, False), a, b)
    assert_float32_sums(operator(torch.empty(33, 2), b.t(), a.t(), False), b.t(), a.t())


@needs_operator
@pytest.mark.parametrize(
    "out, a, b",
    [
        (torch.empty(2, 4), torch.ones(2, 3), torch.ones(3, 4, dtype=BF16)),
        (torch.empty(2, 4), torch.ones(2, 3, dtype=BF16), torch.ones(3, 4, dtype=F16)),
        (torch.empty(2, 4, dtype=BF16), torch.ones(2, 3, dtype=BF16), torch.ones(3, 4, dtype=BF16)),
        (torch.empty(2, 4), torch.ones(2, 3, dtype=BF16), torch.ones(4, 4, dtype=BF16)),
        (torch.empty(2, 5), torch.ones(2, 3, dtype=BF16), torch.ones(3, 4, dtype=BF16)),
        (torch.empty(3, 4), torch.ones(2, 3, dtype=BF16), torch.ones(3, 4, dtype=BF16)),
        (torch.empty(2, 8)[:, ::2], torch.ones(2, 3, dtype=BF16), torch.ones(3, 4, dtype=BF16)),
        (torch.empty(1, 4).expand(2, 4), torch.ones(2, 3, dtype=BF16), torch.ones(3, 4, dtype=BF16)),
        (torch.empty(4), torch.ones(2, 3, dtype=BF16), torch.ones(3, 4, dtype=BF16)),
    ],
)
def test_operator_refuses_what_does_not_fit(out, a, b):
    with pytest.raises(RuntimeError, match="mm_bf16_f32_"):
        operator(out, a, b, False)


# ------------------------------------------------------------------------------------------------- product()


@pytest.fixture(params=["accumulator", "copies", "pieces"])
def path(request, monkeypatch):
    """Each way that ``product`` has for bfloat16 on the CPU; the last halves operands along every side."""
    if request.param == "accumulator":
        if missing_operator() is not None:
            pytest.skip(missing_operator())
        monkeypatch.setattr(gemm, "_copied_product", None)  # must not be called
    else:
        monkeypatch.setattr(gemm, "from_accumulator", lambda dtype, device: False)
    if request.param == "pieces":
        whole = gemm._torch_product

        def small(a, b, out, accumulate):
            assert a.numel() + b.numel() <= 60
            return whole(a, b, out, accumulate)

        monkeypatch.setattr(gemm, "PIECE_ELEMENTS", 60)
        monkeypatch.setattr(gemm, "_torch_product", small)
    return request.param


@pytest.mark.parametrize("m, k, n", [(9, 33, 70), (41, 12, 3), (6, 130, 5), (1, 1, 1), (64, 1, 64)])
def test_product_on_each_path(path, m, k, n):
    a, b = matrix(m, k, 20), matrix(n, k, 21).t()
    assert_float32_sums(gemm.product(a, b, out_dtype=F32), a, b)
    memory = torch.full((m, n + 2), 7.0)
    out = memory[:, :n]
    assert gemm.product(a, b, out_dtype=F32, out=out) is out
    assert_float32_sums(out, a, b)
    before = out.clone()
    assert gemm.product(a, b, out_dtype=F32, out=out, accumulate=True) is out
    assert_float32_sums(out, a, b, before)
    assert bool((memory[:, n:] == 7).all())


def test_product_of_nothing(path):
    a, b = torch.ones(4, 0, dtype=BF16), torch.ones(0, 3, dtype=BF16)
    assert torch.equal(gemm.product(a, b, out_dtype=F32), torch.zeros(4, 3))
    ones = torch.ones(4, 3)
    assert torch.equal(gemm.product(a, b, out_dtype=F32, out=ones, accumulate=True), torch.ones(4, 3))
    assert gemm.product(a.t(), a, out_dtype=F32).shape == (0, 0)


def test_product_is_noticed_by_autograd_as_a_change(path):
    out = torch.zeros(3, 4)
    version = out._version
    gemm.product(matrix(3, 5, 22), matrix(5, 4, 23), out_dtype=F32, out=out)
    assert out._version > version


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", [BF16, F16, F32])
@pytest.mark.parametrize("right", [BF16, F16, F32])
def test_product_of_all_dtypes(left, right, device):
    a, b = matrix(11, 40, 24, left).to(device), matrix(40, 13, 25, right).to(device)
    result = gemm.product(a, b, out_dtype=F32)
    assert_float32_sums(result, a, b)
    out = torch.ones(11, 13, device=device)
    assert_float32_sums(gemm.product(a, b, out_dtype=F32, out=out, accumulate=True), a, b, torch.ones(11, 13))
    assert result.device.type == device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_product_in_float64(dtype, device):
    a, b = matrix(11, 40, 26, dtype).to(device), matrix(40, 13, 27, dtype).to(device)
    truth = a.double() @ b.double()
    torch.testing.assert_close(gemm.product(a, b, out_dtype=F64), truth, rtol=1e-13, atol=1e-13)
    out = truth.clone()
    gemm.product(a, b, out_dtype=F64, out=out, accumulate=True)
    torch.testing.assert_close(out, 2 * truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_product_in_the_dtype_of_the_operands_is_torchs(device):
    a, b = matrix(11, 40, 28).to(device), matrix(40, 13, 29).to(device)
    assert torch.equal(gemm.product(a, b, out_dtype=BF16), a @ b)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_product_has_no_gradient(dtype):
    a, b = matrix(3, 4, 30, dtype).requires_grad_(), matrix(4, 5, 31, dtype).requires_grad_()
    assert not gemm.product(a, b, out_dtype=F32).requires_grad


@pytest.mark.parametrize(
    "a, b, arguments, message",
    [
        ((2, 3), (4, 5), {}, "expected a"),
        ((2, 3, 1), (3, 5), {}, "expected a"),
        ((2, 3), (3, 5), {"accumulate": True}, "no out is given"),
        ((2, 3), (3, 5), {"out_dtype": F16}, "wider out_dtype"),
        ((2, 3), (3, 5), {"out": torch.empty(2, 4)}, "expected \\(2, 5\\)"),
        ((2, 3), (3, 5), {"out": torch.empty(2, 5, dtype=F64)}, "torch.float64"),
        ((2, 3), (3, 5), {"out": torch.empty(2, 10)[:, ::2]}, "adjacent"),
        ((2, 3), (3, 5), {"out": torch.empty(1, 5).expand(2, 5)}, "apart"),
    ],
)
def test_product_refuses(a, b, arguments, message):
    a, b = torch.ones(a, dtype=BF16), torch.ones(b, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        gemm.product(a, b, **{"out_dtype": F32, **arguments})


def test_from_accumulator():
    assert gemm.from_accumulator(BF16, CPU) == (missing_operator() is None)
    assert not gemm.from_accumulator(F16, CPU) and not gemm.from_accumulator(F32, CPU)
    cuda = torch.device("cuda")
    assert gemm.from_accumulator(BF16, cuda) and gemm.from_accumulator(F16, cuda)
    assert not gemm.from_accumulator(F32, cuda)
