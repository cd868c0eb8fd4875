"""AdamW on an exact float32 master: against torch's, against itself, its state and what it refuses."""

import copy
import io
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from whp_kernels import extension
from whp_kernels.optim import AdamW, join, offload, split

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
MOMENTS = ("float32", "bfloat16", "int8")
COMPILED = extension.load() is not None
IMPLS = ("reference", "cpp") if COMPILED else ("reference",)
needs_extension = pytest.mark.skipif(not COMPILED, reason=str(extension.reason()))
# torch's fused AdamW uses fused multiply-adds only with these
needs_fma = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no AVX2"
)


def isas():
    return torch.ops.whp_kernels_C.cpu_isas().split() if COMPILED else []


def start(shape, seed=0):
    """Weights that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(BFLOAT16).to(FLOAT32)


def gradients(shape, steps, dtype=FLOAT32):
    """Of sizes over five orders of magnitude."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        sizes = torch.randn(shape, generator=generator).mul(2).exp() * 1e-4
        yield (torch.randn(shape, generator=generator) * sizes).to(dtype)


def parameter(weights, dtype, gradient_dtype=None):
    param = torch.nn.Parameter(weights.detach().to(dtype, copy=True))
    if gradient_dtype is not None:
        param.grad_dtype = gradient_dtype
    return param


def train(shape=(48, 320), steps=4, dtype=BFLOAT16, gradient_dtype=FLOAT32, grad_scale=None, **options):
    """A parameter and its optimizer after some steps."""
    param = parameter(start(shape), dtype, gradient_dtype)
    optimizer = AdamW([param], **({"lr": 1e-3, "weight_decay": 0.1} | options))
    for gradient in gradients(shape, steps, gradient_dtype):
        param.grad = gradient
        optimizer.step(grad_scale)
    return param, optimizer


def everything(param, optimizer):
    """All bits that training has left."""
    kept = {"weights": param.detach(), "master": optimizer.master(param), **optimizer.state[param]}
    return {
        name: value.view(torch.uint8) if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in kept.items()
    }


def assert_same(first, second):
    first, second = everything(*first), everything(*second)
    assert first.keys() == second.keys()
    different = [
        name
        for name, value in first.items()
        if not (torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name])
    ]
    assert not different


# ------------------------------------------------------------------------------------------- split and join


def test_every_upper_half_with_lower_halves_that_bite():
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = (upper << 16) + lower
        assert_split(bits)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_any_bits(bits):
    assert_split(torch.tensor(bits, dtype=torch.int64))


def assert_split(bits):
    """By the formulas in 64 bits, and back."""
    high, low = split(bits.to(torch.int32).view(FLOAT32))
    assert high.dtype == BFLOAT16 and low.dtype == torch.int16
    assert torch.equal(high.view(torch.int16), ((bits + 0x8000) >> 16).to(torch.int16))
    assert torch.equal(low, bits.to(torch.int16))
    assert torch.equal(join(high, low).view(torch.int32), bits.to(torch.int32))


def test_the_upper_half_is_the_nearest():
    """Ties away from zero; elsewhere what torch rounds to."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(split(x)[0][~tie], x.to(BFLOAT16)[~tie])
    one_tie = torch.tensor([1.00390625, -1.00390625])  # between 1 and 1.0078125
    assert split(one_tie)[0].tolist() == [1.0078125, -1.0078125]


def test_split_and_join_refuse_other_dtypes():
    with pytest.raises(ValueError, match="float64"):
        split(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="int32"):
        join(torch.zeros(1, dtype=BFLOAT16), torch.zeros(1, dtype=torch.int32))


# ------------------------------------------------------------------------------------------- torch's numbers


@needs_fma
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtype, gradient_dtype", [(BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT32, FLOAT32)]
)
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_the_master_is_torchs_float32_weight(impl, dtype, gradient_dtype, beta1):
    """Bit for bit, with two groups whose learning rates change."""
    shapes = [(48, 320), (640,)]  # whole vectors: torch rounds what does not fill one otherwise
    mine = [parameter(start(shape), dtype, gradient_dtype) for shape in shapes]
    theirs = [parameter(start(shape), FLOAT32) for shape in shapes]
    numbers = {"lr": 1e-3, "betas": (beta1, 0.95), "eps": 1e-8}
    decays = (0.1, 0.0)

    def groups(params):
        return [{"params": [p], "weight_decay": decay} for p, decay in zip(params, decays)]

    optimizer = AdamW(groups(mine), **numbers, impl=impl)
    expected = torch.optim.AdamW(groups(theirs), **numbers, fused=True)
    sequences = [gradients(shape, 20, gradient_dtype) for shape in shapes]
    for step in range(20):
        for own, other, sequence in zip(mine, theirs, sequences):
            own.grad = next(sequence)
            other.grad = own.grad.float()
        for each in (optimizer, expected):
            each.param_groups[0]["lr"] = 1e-3 / (1 + step)
            each.step()
    for own, other in zip(mine, theirs):
        assert torch.equal(optimizer.master(own), other.detach())
        assert torch.equal(own.detach(), split(other.detach())[0] if dtype == BFLOAT16 else other.detach())
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[own][name], expected.state[other][name])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_by_hand(impl):
    """In float64, with an odd number of elements and a gradient scale."""
    param = parameter(start((3, 5)), FLOAT32)
    before, gradient = param.detach().double(), torch.linspace(-2, 3, 15).view(3, 5)
    param.grad = gradient.clone()
    AdamW([param], lr=0.5, betas=(0.8, 0.6), eps=0.25, weight_decay=0.5, impl=impl).step(torch.tensor(3.0))
    g = 3 * gradient.double()
    expected = before * 0.75 - 0.5 * (0.2 * g / 0.2) / ((0.4 * g * g / 0.4).sqrt() + 0.25)
    assert torch.allclose(param.detach().double(), expected, rtol=1e-6, atol=1e-7)


# --------------------------------------------------------------------------------------- one set of numbers


@needs_extension
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("isa", isas())
def test_compiled_and_reference_are_the_same(monkeypatch, isa, moments):
    monkeypatch.setenv("WHP_KERNELS_ISA", isa)
    shapes = [(48, 1320), (17, 241), (4, 3, 1343), (4097, 1), (8, 2048), (70,)]
    dtypes = [(BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT32, FLOAT32)]
    for shape, (dtype, gradient_dtype) in zip(shapes, itertools.cycle(dtypes)):
        options = {
            "shape": shape,
            "dtype": dtype,
            "gradient_dtype": gradient_dtype,
            "moments": moments,
            "betas": (0.4 if shape == (8, 2048) else 0.9, 0.95),
            "grad_scale": torch.tensor(0.37) if shape[0] == 17 else None,
        }
        assert_same(train(**options, impl="cpp"), train(**options, impl="reference"))


@needs_extension
@pytest.mark.parametrize("moments", MOMENTS)
def test_compiled_and_reference_agree_on_numbers_that_bite(moments):
    """Zeros, NaN, infinities, subnormal and huge gradients; a block of them each."""
    shape = (8, 2400)
    gradient = next(gradients(shape, 1))
    gradient[0] = 0
    gradient[1, ::7] = 0
    gradient[2, 1300] = float("nan")
    gradient[3, 5], gradient[4, 6] = float("inf"), -float("inf")
    gradient[5] *= 1e-36
    gradient[6] *= 1e-41
    gradient[7] *= 1e15
    found = []
    for impl in ("cpp", "reference"):
        param = parameter(start(shape), FLOAT32)
        optimizer = AdamW([param], moments=moments, impl=impl)
        for _ in range(3):
            param.grad = gradient.clone()
            optimizer.step()
        found.append((param.detach(), optimizer.state[param]))
    for name in (
        "exp_avg",
        "exp_avg_sq",
        *(["exp_avg_scale", "exp_avg_sq_scale"] if moments == "int8" else []),
    ):
        clean = [0, 1, 5, 6, 7]
        first, second = (state[name] for _, state in found)
        assert torch.equal(first[clean], second[clean]), name
    assert torch.equal(found[0][0].nan_to_num(7), found[1][0].nan_to_num(7))
    assert found[0][0][[0, 1, 5, 6, 7]].isfinite().all()
    assert found[0][0][2, 1300].isnan() and not found[0][0][2, :1024].isnan().any()


@needs_extension
@pytest.mark.parametrize("moments", MOMENTS)
def test_threads_change_nothing(moments):
    alone = train((300, 1300), 2, moments=moments, impl="cpp")
    torch.set_num_threads(3)
    try:
        assert_same(alone, train((300, 1300), 2, moments=moments, impl="cpp"))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("moments", MOMENTS)
def test_in_host_memory_the_numbers_are_the_same(monkeypatch, moments):
    monkeypatch.setattr(offload, "PIECE_ELEMENTS", 6000)  # several pieces, and more than there are slots
    assert_same(train((24, 1321), moments=moments, offload=True), train((24, 1321), moments=moments))


def test_host_memory_of_a_gpu_is_registered_by_whole_pages(monkeypatch):
    """Two tensors never share a page: the driver registers a page once."""
    registered, freed = {}, []

    class Driver:
        def cudaHostRegister(self, address, size, flags):
            registered[address] = size
            return 0

        def cudaHostUnregister(self, address):
            freed.append(address)

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    tensors = [offload.host_zeros((3, n), torch.int16, torch.device("cuda")) for n in (5, 5000, 0, 700)]
    assert [tuple(t.shape) for t in tensors] == [(3, 5), (3, 5000), (3, 0), (3, 700)]
    assert all(t.dtype == torch.int16 and not t.any() for t in tensors)
    pages = [page for at, size in registered.items() for page in range(at, at + size, 4096)]
    assert len(registered) == 3 and len(set(pages)) == len(pages) and not any(at % 4096 for at in pages)
    for tensor in tensors:
        if tensor.numel():
            assert registered[tensor.data_ptr()] >= tensor.nbytes
    del tensor, tensors
    assert set(freed) == set(registered)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_grad_scale_of_one_changes_nothing(impl):
    assert_same(train(impl=impl, grad_scale=torch.tensor([1.0])), train(impl=impl))
    scaled = train(impl=impl, grad_scale=torch.tensor(0.5))
    assert not torch.equal(everything(*scaled)["exp_avg"], everything(*train(impl=impl))["exp_avg"])


def test_moments_do_not_follow_each_other_from_parameter_to_parameter():
    """Random bits differ between parameters and between steps."""
    params = [parameter(start((16, 256)), FLOAT32) for _ in range(2)]
    optimizer = AdamW(params, moments="bfloat16", lr=0)
    seen = []
    for _ in range(2):
        for param in params:
            param.grad = torch.full((16, 256), 0.1234567)
        optimizer.load_state_dict(optimizer.state_dict())
        for param in params:
            optimizer.state[param]["exp_avg"].zero_()
        optimizer.step()
        seen += [optimizer.state[param]["exp_avg"].clone() for param in params]
    assert all(len(moments.unique()) == 2 for moments in seen)  # the two neighbours
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


# ------------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_the_state_is_there_from_the_start(moments, dtype):
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((8, 2400), (5000,), (8, 500))]
    optimizer = AdamW(params, moments=moments)
    remainder = {"remainder": torch.int16} if dtype == BFLOAT16 else {}
    codes = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
    plain = dict.fromkeys(codes, getattr(torch, moments, None))
    for param, expected in zip(
        params, (codes if moments == "int8" else plain, *[dict.fromkeys(codes, FLOAT32)] * 2)
    ):
        state = dict(optimizer.state[param])
        assert state.pop("step") == 0
        scales = [state.pop(f"{name}_scale", None) for name in codes]
        assert {name: tensor.dtype for name, tensor in state.items()} == expected | remainder
        assert all(tensor.shape == param.shape and not tensor.any() for tensor in state.values())
        if expected is codes:
            assert all(scale.shape == (8, 3) and scale.dtype == FLOAT32 for scale in scales)
        else:
            assert scales == [None, None]


def test_only_parameters_with_gradients_step():
    param, other = (parameter(start((4, 4)), BFLOAT16) for _ in range(2))
    optimizer = AdamW([param, other])
    param.grad = torch.ones(4, 4, dtype=BFLOAT16)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1 and optimizer.state[other]["step"] == 0
    assert torch.equal(other.detach().float(), start((4, 4)))


def test_autograd_sees_that_weights_have_changed():
    param = parameter(start((4, 4)), FLOAT32)
    optimizer = AdamW([param])
    loss = (param * param).sum()
    param.grad = torch.ones(4, 4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_run_goes_on_from_a_saved_state_bit_for_bit(moments):
    def run(stop):
        param, sequence = parameter(start((20, 1300)), BFLOAT16, FLOAT32), gradients((20, 1300), 6)
        optimizer = AdamW([param], lr=1e-4, moments=moments)
        for step, gradient in enumerate(sequence):
            if step == stop:
                file = io.BytesIO()
                torch.save({"weights": param.detach(), "optimizer": optimizer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                param = parameter(saved["weights"], BFLOAT16, FLOAT32)
                optimizer = AdamW([param], lr=1.0, moments=moments)
                optimizer.load_state_dict(saved["optimizer"])
            param.grad = gradient
            optimizer.step()
        return param, optimizer

    assert_same(run(3), run(None))


def test_a_copy_is_an_optimizer_of_the_same_kind():
    _, optimizer = train(moments="int8", impl="reference")
    other = copy.deepcopy(optimizer)
    [param] = other.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    other.step()
    assert other.state[param]["step"] == 5 and other.moments == "int8" and other.impl == "reference"


@pytest.mark.parametrize("change", [{"moments": "int8"}, {"shape": (48, 330)}, {"dtype": FLOAT32}])
def test_another_state_is_refused_and_changes_nothing(change):
    saved = train(moments="bfloat16")[1].state_dict()
    other = train(**({"moments": "bfloat16", "steps": 2} | change))
    before = copy.deepcopy(everything(*other))
    with pytest.raises(ValueError, match="parameter 0"):
        other[1].load_state_dict(saved)
    after = everything(*other)
    assert all(torch.equal(after[k], v) if torch.is_tensor(v) else after[k] == v for k, v in before.items())


def test_a_state_of_other_parameters_is_refused():
    optimizer = train()[1]
    with pytest.raises(ValueError, match="1 parameters, this one 2"):
        AdamW([torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("in_host_memory", [False, True])
def test_the_master_can_be_set(dtype, in_host_memory):
    param = parameter(start((6, 7)), dtype)
    optimizer = AdamW([param], offload=in_host_memory)
    value = torch.randn(6, 7, generator=torch.Generator().manual_seed(3))
    optimizer.set_master(param, value)
    assert torch.equal(optimizer.master(param), value)
    assert torch.equal(param.detach(), split(value)[0] if dtype == BFLOAT16 else value)
    optimizer.master(param).zero_()  # a copy
    assert torch.equal(optimizer.master(param), value)
    with pytest.raises(ValueError, match="expected \\(6, 7\\)"):
        optimizer.set_master(param, value[:5])
    with pytest.raises(ValueError, match="float64"):
        optimizer.set_master(param, value.double())


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ({"moments": "int4"}, "moments is 'int4'"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"lr": -1.0}, "lr"),
        ({"eps": float("nan")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_arguments_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        AdamW([torch.nn.Parameter(torch.zeros(2))], **options)


def test_parameters_that_it_does_not_take():
    with pytest.raises(ValueError, match="float16"):
        AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(ValueError, match="contiguous"):
        AdamW([torch.nn.Parameter(torch.zeros(2, 3).t())])
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1


def test_a_refused_gradient_changes_nothing():
    good, bad = parameter(start((4, 4)), FLOAT32), parameter(start((4, 4)), FLOAT32, torch.float16)
    optimizer = AdamW([good, bad])
    good.grad, bad.grad = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        optimizer.step()
    assert torch.equal(good.detach(), start((4, 4))) and optimizer.state[good]["step"] == 0


def test_a_grad_scale_of_several_numbers_is_refused():
    param = parameter(start((4, 4)), FLOAT32)
    param.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="grad_scale"):
        AdamW([param]).step(torch.ones(2))


def test_the_backend_must_be_there(monkeypatch):
    monkeypatch.setattr(extension, "reason", lambda: "it was not built")
    param = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="it was not built"):
        AdamW([param], impl="cpp")
    with pytest.warns(UserWarning, match="the cpp AdamW is not available"):
        AdamW([param])


def test_importing_it_needs_torch_alone():
    program = (
        "import sys; sys.modules['triton'] = None; import torch; before = set(sys.modules); "
        "import whp_kernels.optim; new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert new <= {'whp_kernels'} | set(sys.stdlib_module_names) | {'torch'}, new; "
        "assert not [n for n in set(sys.modules) - before if n.startswith('torch.distributed.tensor')]"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
