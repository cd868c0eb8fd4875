"""The Triton AdamW against the reference, in the interpreter or on a GPU; test_optim_triton.py runs this."""

import os

import pytest
import torch
from whp_kernels.optim import AdamW, offload
from whp_kernels.optim.moments import BLOCK

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
MOMENTS = ("float32", "bfloat16", "int8")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def train(device, impl, shape, dtype, gradient_dtype, grad_scale=None, steps=2, **options):
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    param = torch.nn.Parameter(weights.to(device))
    param.grad_dtype = gradient_dtype
    optimizer = AdamW([param], lr=1e-3, weight_decay=0.1, impl=impl, **options)
    for _ in range(steps):
        sizes = torch.randn(shape, generator=generator).mul(2).exp() * 1e-4
        gradient = torch.randn(shape, generator=generator) * sizes
        gradient.view(-1)[::5] = 0
        gradient[0] *= 1e-36
        param.grad = gradient.to(gradient_dtype).to(device)
        optimizer.step(None if grad_scale is None else torch.tensor(grad_scale, device=device))
    state = {name: value for name, value in optimizer.state[param].items() if name != "step"}
    return {"master": optimizer.master(param).cpu(), **{name: value.cpu() for name, value in state.items()}}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(
    "dtype, gradient_dtype", [(BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT32, FLOAT32)]
)
def test_the_bits_of_the_reference(moments, dtype, gradient_dtype):
    for shape, betas, scale in (((7, 2401), (0.9, 0.95), None), ((3, 2, 1300), (0.4, 0.95), 0.37)):
        options = {"moments": moments, "betas": betas, "grad_scale": scale}
        arguments = (shape, dtype, gradient_dtype)
        assert_same(
            train(DEVICE, "triton", *arguments, **options),
            train(torch.device("cpu"), "reference", *arguments, **options),
        )


def test_nan_stays_where_it_is():
    param = torch.nn.Parameter(torch.zeros(8, 2048, device=DEVICE))
    optimizer = AdamW([param], moments="int8", impl="triton")
    for _ in range(2):
        param.grad = torch.ones(8, 2048, device=DEVICE)
        param.grad[3, 1300] = float("nan")
        optimizer.step()
    bad = param.detach().isnan().nonzero().tolist()
    assert [3, 1300] in bad and all(row == 3 and column >= BLOCK for row, column in bad)


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_in_host_memory(monkeypatch, moments):
    monkeypatch.setattr(offload, "PIECE_ELEMENTS", 5000)
    arguments = (DEVICE, "triton", (7, 2401), BFLOAT16, FLOAT32)
    assert_same(train(*arguments, moments=moments, offload=True), train(*arguments, moments=moments))
