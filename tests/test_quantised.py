"""Layers in 4 and 8 bits beside bitsandbytes' own functions; its optimizer on plain and sharded tensors."""

import copy
import sys

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.quantised import (
    PROJECTIONS,
    QuantisedLinear,
    ShardedAdamW8bit,
    bitsandbytes_adamw8bit,
    dequantised,
    model_bytes,
    quantise_,
    quantised_bytes,
)

CONFIG = LlamaConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
KINDS = ["nf4", "int8"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(kind, rows=48, columns=80, bias=True):
    quantised = QuantisedLinear(
        columns, rows, kind, nn.Parameter(normal(rows, seed=9)) if bias else None, torch.device("cpu")
    )
    quantised.quantise_from(normal(rows, columns))
    return quantised


def make(seed=0):
    model = Llama(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model


def ids():
    return torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind, least, most", [("nf4", 0.05, 0.12), ("int8", 0.003, 0.008)])
def test_the_error_is_that_of_the_bits(kind, least, most):
    weight = normal(48, 80)
    error = (layer(kind).dequantise() - weight).norm() / weight.norm()
    assert least < error < most


@pytest.mark.parametrize("rows, columns", [(48, 80), (3, 5), (1, 2), (7, 9), (64, 32), (1, 64), (300, 80)])
@pytest.mark.parametrize("kind, half_step", [("nf4", 0.1525), ("int8", 0.5 / 127)])
def test_every_weight_is_off_by_half_a_step_at_most(kind, half_step, rows, columns):
    """Of the largest value of its block, whatever the rows. NormalFloat's widest step: -1 to -0.6962."""
    weight = normal(rows, columns)
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    step = blocks.abs().amax(1, keepdim=True).expand_as(blocks).flatten()[: weight.numel()]
    # the scales of nf4 have 8 bits themselves; bfloat16 rounds the result by 1 / 256 of it
    for dtype, more in ((torch.float32, 0.01 if kind == "nf4" else 2e-4), (torch.bfloat16, 0.015)):
        found = layer(kind, rows, columns, bias=False).dequantise(dtype)
        assert found.dtype == dtype and found.shape == weight.shape
        error = (found.float() - weight).abs().flatten() / step
        assert error.max() < half_step + more


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    weight = normal(4, 64)
    weight[1] = 0
    quantised = QuantisedLinear(64, 4, kind, None, torch.device("cpu"))
    quantised.quantise_from(weight)
    assert quantised.dequantise()[1].abs().max() == 0
    assert (quantised.dequantise() - weight).norm() < 0.12 * weight.norm()


def test_nf4_is_what_bitsandbytes_stores_and_reads():
    weight = normal(300, 128)  # 600 blocks: the scales have three blocks themselves
    data, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = layer("nf4", rows=300, columns=128)
    assert torch.equal(ours.data, data) and ours.scale_scales.shape == (3,)
    assert torch.equal(ours.dequantise(), bnb.functional.dequantize_4bit(data, state))


def test_int8_codes_are_integers_of_equal_steps():
    ours = layer("int8", rows=1, columns=64)
    assert ours.scales[0] == normal(1, 64).abs().max()
    steps = ours.dequantise() / ours.scales[0] * 127
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.abs().max() == 127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_multiply_by_the_dequantised_weight(kind, dtype, training):
    quantised = layer(kind).train(training)
    x = normal(3, 5, 80, seed=1, dtype=dtype).requires_grad_()
    y = quantised(x)
    weight = dequantised(quantised, dtype)
    assert y.dtype == dtype and weight.dtype == dtype
    assert torch.equal(y, F.linear(x, weight) + quantised.bias.to(dtype))
    g = normal(3, 5, 48, seed=2, dtype=dtype)
    (found,) = torch.autograd.grad(y, x, g)
    assert torch.equal(found, g @ weight)


def test_bias_gets_a_gradient_where_it_is_asked_for():
    quantised = layer("int8")
    quantised(normal(3, 80)).sum().backward()
    assert torch.equal(quantised.bias.grad, torch.full((48,), 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_its_dtype(kind):
    quantised = layer(kind, bias=False)
    x = normal(4, 80, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = quantised(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x, quantised.dequantise()))
        y.sum().backward()
    assert x.grad.dtype == torch.float32
    expected = torch.ones(4, 48, dtype=torch.bfloat16) @ quantised.dequantise(torch.bfloat16)
    assert torch.equal(x.grad, expected.float())


def test_a_backward_pass_inside_autocast_is_that_of_its_forward_pass():
    quantised = layer("int8")
    x = normal(4, 80, seed=1).requires_grad_()
    y = quantised(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 48) @ quantised.dequantise())


@pytest.mark.parametrize("kind", KINDS)
def test_only_projections_are_quantised_and_all_is_frozen(kind):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert quantise_(model, kind) is model
    replaced = {name for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(replaced) == 2 * len(PROJECTIONS)
    left = dict(model.named_parameters())
    assert set(before) - set(left) == {f"{name}.weight" for name in replaced}
    for name, parameter in left.items():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad
    assert not any(isinstance(m, nn.Linear) for m in model.model.modules())
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_the_dequantised_weights(kind):
    model = make()
    quantised = quantise_(make(), kind)
    with torch.no_grad():
        for path, module in quantised.named_modules():
            if isinstance(module, QuantisedLinear):
                model.get_submodule(path).weight.copy_(dequantised(module))
        torch.testing.assert_close(quantised(ids()), model(ids()), atol=1e-5, rtol=1e-5)
        assert (quantised(ids()) - make()(ids())).abs().max() > 1e-3


def test_gradient_passes_through_recomputed_blocks():
    grads = []
    for recompute in (False, True):
        model = quantise_(make(), "nf4")
        model.model.embed_tokens.weight.requires_grad_()
        model.activation_checkpointing = recompute
        model(ids()).square().sum().backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert grads[0].abs().max() > 0 and torch.equal(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_before_anything_is_loaded(kind):
    real = quantise_(make(), kind)
    with torch.device("meta"):
        planned = quantise_(Llama(CONFIG), kind)
    assert all(t.is_meta for t in (*planned.parameters(), *planned.buffers()))
    assert model_bytes(planned) == model_bytes(real)
    for name, shape in {name: b.shape for name, b in real.named_buffers()}.items():
        assert planned.get_buffer(name).shape == shape

    numel = 4096 * 11008
    blocks = numel // 64
    expected = {"nf4": numel // 2 + blocks + 4 * -(-blocks // 256) + 4, "int8": numel + 4 * blocks}
    assert quantised_bytes(4096, 11008, kind) == expected[kind]


def test_a_tensor_that_two_names_share_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert model_bytes(model) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts_carry_the_data(kind):
    quantised = layer(kind)
    empty = QuantisedLinear(80, 48, kind, nn.Parameter(torch.zeros(48)), torch.device("cpu"))
    empty.load_state_dict(quantised.state_dict())
    for other in (empty, copy.deepcopy(quantised)):
        assert torch.equal(other.dequantise(), quantised.dequantise())
        assert other.data.data_ptr() != quantised.data.data_ptr()
    assert torch.equal(quantised.to(torch.bfloat16).data, empty.data)  # a cast leaves the codes alone


def test_wrong_use_is_told():
    with pytest.raises(ValueError, match="one of nf4, int8, got 'fp4'"):
        quantise_(make(), "fp4")
    with pytest.raises(ValueError, match=r"shape \[80, 48\], expected \[48, 80\]"):
        layer("nf4").quantise_from(normal(80, 48))


def test_a_missing_package_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="install it with: pip install bitsandbytes"):
        quantise_(make(), "nf4")
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        ShardedAdamW8bit([nn.Parameter(torch.ones(3))], lr=1.0)


def parameters(seed=0):
    """One tensor with 8-bit moments, one too small for them."""
    return [nn.Parameter(normal(70, 90, seed=seed)), nn.Parameter(normal(5, seed=seed + 1))]


def steps(optimizer, params, first, last):
    for step in range(first, last):
        for number, parameter in enumerate(params):
            parameter.grad = normal(*parameter.shape, seed=100 * step + number)
        optimizer.step()


def test_updates_are_those_of_bitsandbytes():
    ours, theirs = parameters(), parameters()
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    steps(bitsandbytes_adamw8bit(ours, **settings), ours, 0, 3)
    steps(bnb.optim.AdamW8bit(theirs, **settings), theirs, 0, 3)
    exact = parameters()
    steps(torch.optim.AdamW(exact, **settings), exact, 0, 3)
    for a, b, c, start in zip(ours, theirs, exact, parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm() < 0.1 * (c - start).norm()


def test_groups_and_their_learning_rates_hold():
    params = parameters()
    optimizer = ShardedAdamW8bit(
        [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "lr": 0.0}], lr=1e-2
    )
    before = [p.detach().clone() for p in params]
    steps(optimizer, params, 0, 1)
    assert not torch.equal(params[0], before[0]) and torch.equal(params[1], before[1])
    optimizer.param_groups[0]["lr"] = 0.0
    middle = params[0].detach().clone()
    steps(optimizer, params, 1, 2)
    assert torch.equal(params[0], middle)


def test_gradients_are_read_from_and_cleared_on_the_parameters():
    params = parameters()
    before = params[1].detach().clone()
    optimizer = ShardedAdamW8bit(params, lr=1e-2, weight_decay=0.5)
    params[0].grad = normal(70, 90, seed=3, dtype=torch.float32)
    optimizer.step()
    assert torch.equal(params[1], before)  # no gradient: no step, no decay
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad.abs().max() == 0 and params[1].grad is None
    optimizer.zero_grad()
    assert params[0].grad is None
    after = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], after)


def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, parted = parameters(), parameters()
    steps(ShardedAdamW8bit(whole, lr=1e-2), whole, 0, 4)
    first = ShardedAdamW8bit(parted, lr=1e-2)
    steps(first, parted, 0, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = ShardedAdamW8bit(parted, lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    steps(resumed, parted, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_bfloat16_weights_are_refused():
    with pytest.raises(UserError, match="^memory.optimizer: .*torch.bfloat16.*set memory.weights to float32"):
        ShardedAdamW8bit([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], lr=1.0)


def test_a_shard_of_another_layout_is_refused():
    with pytest.raises(ValueError, match=r"shape \[4, 3\] is not contiguous"):
        ShardedAdamW8bit([nn.Parameter(torch.ones(3, 4).t())], lr=1.0)


@pytest.fixture
def second_of_two():
    """This process as the second of two that never talk."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_shards_are_updated_in_place(second_of_two):
    from torch.distributed.tensor import Shard, distribute_tensor

    def shard(tensor):
        return distribute_tensor(tensor, second_of_two, [Shard(0)], src_data_rank=None)

    whole = normal(151, 90)
    sharded = nn.Parameter(shard(whole))
    empty = nn.Parameter(shard(normal(1, 7)))  # one row, held by the first process
    local = nn.Parameter(whole.chunk(2)[1].clone())
    assert sharded.to_local().shape == (75, 90) and empty.to_local().numel() == 0
    optimizer, theirs = ShardedAdamW8bit([sharded, empty], lr=1e-2), bnb.optim.AdamW8bit([local], lr=1e-2)
    theirs.param_groups[0]["weight_decay"] = 0.0
    for step in range(2):
        gradient = normal(151, 90, seed=5 + step)
        sharded.grad, local.grad = shard(gradient), gradient.chunk(2)[1].clone()
        empty.grad = shard(normal(1, 7))
        optimizer.step()
        theirs.step()
    assert set(optimizer.state_dict()["state"]) == {0}  # nothing was launched on the empty shard
    assert torch.equal(sharded.to_local(), local) and not torch.equal(local, whole.chunk(2)[1])
