"""Projections that share their input, in one product: the same numbers, gradients and parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from whp_kernels.layers import are_adjacent, columns, rope, stacked_linear, swiglu

from whp_fast import projections
from whp_fast.adapters import add_adapter, use_adapter
from whp_fast.config import MemoryConfig, UnlearnConfig
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.projections import project, stack_in_memory
from whp_fast.trainee import Trainee

SIZES = (12, 4, 4)
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def on_the_cpu_too(monkeypatch):
    monkeypatch.setattr(projections, "STACKED_DEVICES", ("cpu",))


def draw(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype=F32, bias=True, stacked=True):
    weights, biases = draw(sum(SIZES), 8, seed=1, dtype=dtype), draw(sum(SIZES), seed=2, dtype=dtype)
    made = [list(t.split(SIZES)) for t in (weights, biases)]
    if not stacked:
        made = [[t.clone() for t in group] for group in made]
    return [[nn.Parameter(t) for t in group] for group in (made if bias else made[:1])]


def model(family=None, bias=False, seed=0):
    config = LlamaConfig(
        model_type=family or "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        attention_bias=bias,
    )
    made = Llama(config)
    made.init_weights(torch.Generator().manual_seed(seed))
    return made


def products(monkeypatch):
    """The numbers of weights of the products that are made together from here on."""
    calls = []
    right = projections.stacked_linear
    monkeypatch.setattr(
        projections, "stacked_linear", lambda x, w, b=None: calls.append(len(w)) or right(x, w, b)
    )
    return calls


# ------------------------------------------------------------------------------------------ stacked_linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "dtype, autocast", [(F32, False), (F32, True), (BF16, False), (torch.float64, False)]
)
def test_numbers_and_gradients_are_those_of_single_layers(dtype, autocast, bias):
    results = []
    for stacked in (True, False):
        groups = parameters(dtype, bias, stacked)
        assert are_adjacent(groups[0]) == stacked
        x = draw(2, 3, 8, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", BF16, enabled=autocast):
            ys = stacked_linear(x, *groups)
        assert [y.shape[-1] for y in ys] == list(SIZES)
        assert stacked == columns.are_columns(ys)
        gs = [draw(*y.shape, seed=k, dtype=y.dtype) for k, y in enumerate(ys)]
        leaves = [x, *groups[0], *(groups[1] if bias else [])]
        results.append((ys, torch.autograd.grad(ys, leaves, gs)))
    close = {"rtol": 2e-2, "atol": 2e-2} if autocast or dtype == BF16 else {}
    for found, expected in zip(*results):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, **close)
            assert (a - 2 * b).norm() > 0.5 * b.norm() and (a + b).norm() > 0.5 * b.norm()


def test_only_what_is_asked_for():
    x = draw(3, 8).requires_grad_()
    weights = [w.requires_grad_(False) for w in parameters(bias=False)[0]]
    ys = stacked_linear(x, weights)
    (g,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
    torch.testing.assert_close(g, torch.cat(weights).sum(0).expand(3, 8))
    assert not stacked_linear(x.detach(), weights)[0].requires_grad
    weights = parameters(bias=False)[0]
    loss = stacked_linear(x.detach(), weights)[1].sum()  # one result of three is used
    loss.backward()
    torch.testing.assert_close(weights[1].grad, x.detach().sum(0).expand(4, 8))
    assert not weights[0].grad.any() and not weights[2].grad.any()


def test_what_is_not_adjacent():
    weights = parameters(bias=False)[0]
    assert are_adjacent(weights) and are_adjacent(weights[1:])
    assert not are_adjacent(weights[::-1]) and not are_adjacent(weights[::2])
    assert not are_adjacent([weights[0], weights[1].requires_grad_(False)])
    assert not are_adjacent([draw(4, 8).t(), draw(4, 8).t()])
    assert not are_adjacent([draw(4, 8), draw(4, 8)])

    class Sub(torch.Tensor):
        pass

    whole = draw(8, 8)
    assert not are_adjacent([whole[:4].as_subclass(Sub), whole[4:].as_subclass(Sub)])
    assert not are_adjacent([whole[:4], whole[4:].view(BF16)[:, :8]])


def test_a_weight_that_was_changed_before_the_backward_is_noticed():
    weights = parameters(bias=False)[0]
    loss = stacked_linear(draw(3, 8).requires_grad_(), weights)[0].sum()
    with torch.no_grad():
        weights[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_columns_are_read_and_gradients_written_without_a_copy(monkeypatch):
    """q, k, v and gate, up come back from rope and swiglu beside each other."""
    seen = []
    right = columns.are_columns
    monkeypatch.setattr(columns, "are_columns", lambda *a: seen.append(right(*a)) or seen[-1])
    x = draw(2, 3, 8).requires_grad_()
    q, k, v = (y.unflatten(-1, (-1, 4)) for y in stacked_linear(x, parameters(bias=False)[0]))
    angles = draw(3, 1, 4)
    q, k, v = rope(q, k, angles.cos(), angles.sin(), v)
    assert v.is_contiguous()
    loss = (q * (k + v).repeat(1, 1, 3, 1)).sum() + swiglu(
        *stacked_linear(x, parameters(bias=False)[0][1:])
    ).sum()
    loss.backward()
    assert seen[1::2] == [True, True]  # in the backward of the products; the others are of the reference


# --------------------------------------------------------------------------------------------- in the model


@pytest.mark.parametrize("family, bias", [("llama", False), ("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize("kept", ["none", "selective", "full"])
def test_a_model_trains_as_before(family, bias, kept, monkeypatch):
    plain, stacked = model(family, bias), model(family, bias)
    before = dict(stacked.named_parameters())
    assert stack_in_memory(stacked) is stacked
    after = dict(stacked.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    calls = products(monkeypatch)
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
    for each in (plain, stacked):
        each.checkpointing = kept
        for part in ids:  # two micro-batches add up
            F.cross_entropy(each(part[None])[0], part).backward()
    assert calls.count(3) == calls.count(2) >= 4
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(after[name].grad, parameter.grad, msg=name)
        assert parameter.grad.any()
    torch.testing.assert_close(stacked(ids), plain(ids))
    attn = stacked.model.layers[0].self_attn
    attn.q_proj.weight.grad.zero_()
    assert attn.k_proj.weight.grad.any() and attn.v_proj.weight.grad.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_ends_where_it_did(dtype, monkeypatch):
    """Gradients of two micro-batches in float32, and an optimizer that writes into the shared storage."""
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(projections, "STACKED_DEVICES", devices)
        calls = products(monkeypatch)
        trainee = Trainee.from_model(
            model(),
            UnlearnConfig(lr=1e-2),
            MemoryConfig(weights=dtype, gradients="float32"),
            compute_dtype=getattr(torch, dtype),
        )
        for step in range(3):
            for ids in (torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, step]])):
                with trainee.forward():
                    F.cross_entropy(trainee.model(ids)[0].float(), ids[0]).backward()
            assert all(p.grad.dtype == F32 for p in trainee.trained.values())
            assert trainee.gradient_norm() > 0
            trainee.update(1.0)
        assert bool(calls) == bool(devices)
        results.append({name: make() for name, make in trainee.masters().items()})
    start = dict(model().named_parameters())
    for name, found in results[0].items():
        moved = results[1][name] - start[name].detach()
        assert (found - results[1][name]).norm() <= (0.1 if dtype == "bfloat16" else 1e-3) * moved.norm(), (
            name
        )


def test_where_layers_stay_apart(monkeypatch):
    calls = products(monkeypatch)
    x = draw(3, 32)
    made = model()
    attn = made.model.layers[0].self_attn
    linears = attn.q_proj, attn.k_proj, attn.v_proj
    with monkeypatch.context() as patch:
        patch.setattr(projections, "STACKED_DEVICES", ("cuda",))
        stack_in_memory(made)
    project(x, *linears)
    assert not calls
    stack_in_memory(made)
    expected = [linear(x) for linear in linears]
    for y, z in zip(project(x, *linears), expected):
        torch.testing.assert_close(y, z)
    assert calls == [3]
    seen = linears[1].register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(project(x, *linears)[1], 2 * expected[1])
    seen.remove()
    project(x, *copy.deepcopy(linears))  # each with a storage of its own
    assert calls == [3]
    project(x, *linears)
    made.to(BF16)
    project(x.to(BF16), *linears)
    assert calls == [3, 3]


def test_adapters_are_not_left_out(monkeypatch):
    made = stack_in_memory(model())
    add_adapter(made, "a", rank=2, alpha=2, targets=["k_proj"], generator=torch.Generator().manual_seed(0))
    attn = made.model.layers[0].self_attn
    with torch.no_grad():
        attn.k_proj.adapters["a"].b.fill_(1.0)
    use_adapter(made, "a")
    x, linears = draw(3, 32), (attn.q_proj, attn.k_proj, attn.v_proj)
    for y, linear in zip(project(x, *linears), linears):
        assert torch.equal(y, linear(x))
    assert not torch.equal(attn.k_proj(x), F.linear(x, attn.k_proj.weight))


def test_recomputation_of_the_product():
    weights = parameters(bias=False)[0]
    x = draw(3, 8).requires_grad_()

    def run(x):
        q, k, v = stacked_linear(x, weights)
        return (q[:, :4] * k * v).sum()

    expected = torch.autograd.grad(run(x), [x, *weights])
    found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), [x, *weights])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
