"""Adapters: what they add, what is trained, what the merged model is, and PEFT's files."""

import copy
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from whp_fast.adapters import (
    active_adapter,
    adapter_names,
    adapter_parameters,
    add_adapter,
    init_adapter,
    load_adapter,
    merged,
    remove_adapter,
    save_adapter,
    use_adapter,
)
from whp_fast.checkpoint import load_model, save_model
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.quantised import PROJECTIONS, quantise_

TINY = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CONFIGS = {
    "llama": LlamaConfig(**TINY, attention_bias=True),
    "qwen3": LlamaConfig(**TINY, model_type="qwen3", head_dim=16, tie_word_embeddings=True),
}


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def make(config="llama", seed=0):
    model = Llama(CONFIGS[config])
    generator = draw(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model


def add(model, name="one", rank=3, alpha=6.0, targets=PROJECTIONS, seed=1):
    """An adapter whose B is not zero any more."""
    add_adapter(model, name, rank=rank, alpha=alpha, targets=targets, generator=draw(seed))
    generator = draw(seed + 100)
    with torch.no_grad():
        for path, parameter in adapter_parameters(model, name).items():
            if path.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def ids():
    return torch.randint(0, 53, (2, 20), generator=draw(1))


def logits(model, name=None):
    with torch.no_grad(), use_adapter(model, name):
        return model(ids())


def ordinary(model, name):
    """The merged model as a Llama."""
    result = Llama(model.config)
    result.load_state_dict({path: tensor() for path, tensor in merged(model, name).items()})
    return result


def test_a_new_adapter_changes_nothing():
    model = make()
    expected = logits(model)
    add_adapter(model, "one", rank=3, alpha=6, targets=PROJECTIONS, generator=draw())
    assert torch.equal(logits(model, "one"), expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "down_proj")])
def test_an_active_adapter_is_the_merged_model(config, targets):
    model = make(config)
    base = logits(model)
    add(add(model, "one", targets=targets), "two", rank=2, alpha=1.0, seed=5)
    assert adapter_names(model) == ["one", "two"]
    for name in ("one", "two"):
        found = logits(model, name)
        assert (found - base).abs().max() > 0.05
        with torch.no_grad():
            torch.testing.assert_close(found, ordinary(model, name)(ids()), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        assert torch.equal(ordinary(model, None)(ids()), base)


def test_gradients_are_those_of_the_weight_that_the_adapter_makes():
    """dA = scale B^T dW, dB = scale dW A^T, with dW of the merged model."""
    model = add(make(), rank=3, alpha=6.0)
    plain = ordinary(model, "one")
    with use_adapter(model, "one"):
        model(ids()).square().mean().backward()
    plain(ids()).square().mean().backward()
    for path, module in plain.named_modules():
        if path.rpartition(".")[2] in PROJECTIONS:
            adapter = model.get_submodule(path).adapters["one"]
            a, b, dw = adapter.a.detach(), adapter.b.detach(), module.weight.grad
            assert dw.abs().max() > 0
            torch.testing.assert_close(adapter.a.grad, 2.0 * b.T @ dw, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(adapter.b.grad, 2.0 * dw @ a.T, atol=1e-6, rtol=1e-4)


def test_only_the_newest_adapter_is_trained():
    model = add(add(make(), "one"), "two")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model, "two")) and len(trained) == 2 * 2 * 7
    with use_adapter(model, "two"):
        model(ids()).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_names_and_tensors_of_the_base_stay():
    model = make()
    before = dict(model.named_parameters())
    add(model)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == set(adapter_parameters(model, "one"))
    assert "model.layers.1.mlp.up_proj.adapters.one.a" in after


@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4", "int8"])
def test_recomputed_blocks_give_the_same_gradients(base):
    grads = []
    for recompute in (False, True):
        model = make()
        if base in ("nf4", "int8"):
            quantise_(model, base)
        elif base == "bfloat16":
            model.to(torch.bfloat16)
        add(model)
        model.activation_checkpointing = recompute
        use_adapter(model, "one")
        model(ids()).float().square().mean().backward()
        grads.append({name: p.grad for name, p in adapter_parameters(model, "one").items()})
    for name, grad in grads[0].items():
        assert grad.dtype == torch.float32 and grad.abs().max() > 0
        assert torch.equal(grad, grads[1][name])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_products_run_in_the_compute_dtype_and_masters_stay_float32(weights):
    """Autocast over float32 weights, or bfloat16 weights: the output moves by the rounding of bfloat16."""
    exact = logits(add(make()), "one")
    model = add(make().to(weights))
    seen = set()
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in PROJECTIONS:
            module.register_forward_hook(lambda m, args, y: seen.add(y.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        with use_adapter(model, "one"):
            found = model(ids())
            found.float().square().mean().backward()
    assert seen == {torch.bfloat16}
    assert 0 < (found.float() - exact).norm() < 0.02 * exact.norm()
    for parameter in adapter_parameters(model, "one").values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_adapters_sit_on_quantised_layers():
    model = quantise_(make(), "nf4")
    base = logits(model)
    add(model)
    found = logits(model, "one")
    assert (found - base).abs().max() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(found, ordinary(model, "one")(ids()), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="quantise the model before adapters are added"):
        quantise_(add(make()), "nf4")


def test_use_is_a_call_and_a_context():
    model = add(add(make(), "one"), "two", targets=("q_proj",))
    assert active_adapter(model) is None
    use_adapter(model, "one")
    assert active_adapter(model) == "one"
    with pytest.raises(KeyError), use_adapter(model, "two"):
        with use_adapter(model, None):
            assert active_adapter(model) is None
        assert active_adapter(model) == "two"
        raise KeyError
    assert active_adapter(model) == "one"
    with pytest.raises(ValueError, match="no adapter 'three'"):
        use_adapter(model, "three")
    assert active_adapter(model) == "one"


def test_the_draw_is_that_of_peft_and_of_the_generator():
    """Uniform in +-1 / sqrt(in), other numbers for every projection."""
    one, two, other = (make() for _ in range(3))
    for model, seed in ((one, 4), (two, 4), (other, 5)):
        add_adapter(model, "x", rank=8, alpha=8, targets=PROJECTIONS, generator=draw(seed))
    parameters = adapter_parameters(one, "x")
    for name, parameter in parameters.items():
        if name.endswith(".b"):
            assert parameter.abs().max() == 0
            continue
        bound = parameter.shape[1] ** -0.5
        assert 0.9 * bound < parameter.abs().max() <= bound
        assert abs(parameter.std() - bound / 3**0.5) < 0.1 * bound
        assert torch.equal(parameter, adapter_parameters(two, "x")[name])
        assert not torch.equal(parameter, adapter_parameters(other, "x")[name])
    values = [p for name, p in parameters.items() if name.endswith("q_proj.adapters.x.a")]
    assert not torch.equal(*values)


def test_a_meta_model_gets_its_numbers_later():
    with torch.device("meta"):
        model = Llama(CONFIGS["llama"])
    add_adapter(model, "one", rank=3, alpha=6, targets=PROJECTIONS)
    assert all(p.is_meta for p in adapter_parameters(model, "one").values())
    model.to_empty(device="cpu")
    init_adapter(model, "one", draw(1))
    expected = make()
    add_adapter(expected, "one", rank=3, alpha=6, targets=PROJECTIONS, generator=draw(1))
    for name, parameter in adapter_parameters(expected, "one").items():
        assert torch.equal(adapter_parameters(model, "one")[name], parameter)


def test_a_sharded_adapter_holds_its_part_of_the_same_numbers():
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = add(make())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if name in ("a", "b"):
                    shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                    setattr(module, name, nn.Parameter(shard))
        init_adapter(model, "one", draw(7))
        whole = make()
        add_adapter(whole, "one", rank=3, alpha=6, targets=PROJECTIONS, generator=draw(7))
        for name, parameter in adapter_parameters(model, "one").items():
            expected = adapter_parameters(whole, "one")[name].chunk(2)[1]
            assert torch.equal(parameter.to_local(), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_fully_sharded_blocks_train_and_merge():
    from torch.distributed.fsdp import fully_shard

    expected = add(make())
    model = add(make())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model.activation_checkpointing = True
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for each in (expected, model):
            use_adapter(each, "one")
            each(ids()).square().mean().backward()
        for name, parameter in adapter_parameters(model, "one").items():
            found = parameter.grad.full_tensor()
            torch.testing.assert_close(found, adapter_parameters(expected, "one")[name].grad)
        for name, tensor in merged(model, "one").items():
            assert torch.equal(tensor(), merged(expected, "one")[name]())
    finally:
        torch.distributed.destroy_process_group()


def test_a_removed_adapter_leaves_no_trace():
    model = make()
    state, base = list(model.state_dict()), logits(model)
    add(add(model, "one"), "two", targets=("v_proj",))
    use_adapter(model, "one")
    remove_adapter(model, "one")
    assert adapter_names(model) == ["two"] and active_adapter(model) is None
    with pytest.raises(ValueError, match="no adapter 'one'"):
        remove_adapter(model, "one")
    remove_adapter(model, "two")
    assert list(model.state_dict()) == state and torch.equal(logits(model), base)
    assert not any(m._forward_hooks or "active_adapter" in vars(m) for m in model.modules())


def test_a_copy_has_adapters_of_its_own():
    model = add(make())
    twin = copy.deepcopy(model)
    expected = logits(model, "one")
    use_adapter(twin, "one")
    assert active_adapter(model) is None
    remove_adapter(model, "one")
    assert torch.equal(logits(twin, "one"), expected)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_the_merged_model_is_written_like_any_other(kind, tmp_path):
    model = make("qwen3")
    if kind:
        quantise_(model, kind)
    add(model)
    tensors = merged(model, "one")
    save_model(tensors, tmp_path / "a", 9000, torch.float32, config=model.config)
    save_model(ordinary(model, "one"), tmp_path / "b", 9000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 5 and files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    found = load_model(tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(found(ids()), logits(model, "one"), atol=1e-5, rtol=1e-5)


def test_merging_is_float32_and_holds_one_tensor():
    model = add(make().to(torch.bfloat16))
    tensors = merged(model, "one")
    name = "model.layers.0.mlp.up_proj"
    adapter, weight = model.get_submodule(name).adapters["one"], model.get_parameter(f"{name}.weight")
    expected = weight.float() + 6.0 / 3 * (adapter.b @ adapter.a)
    found = tensors[f"{name}.weight"]()
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), atol=1e-7, rtol=1e-6)
    assert weight.dtype == torch.bfloat16 and not torch.equal(found, weight.float())
    seen = weakref.ref(found)
    del found
    assert seen() is None


@pytest.mark.parametrize("name", ["", "a b", "a.b", "pop", "one"])
def test_wrong_names_are_refused(name):
    with pytest.raises(ValueError, match="name of an adapter|already"):
        add(add(make(), "one"), name)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rank": 0}, "memory.lora_rank: an adapter of rank 0"),
        ({"alpha": 0.0}, "memory.lora_alpha: it is 0.0"),
        ({"alpha": float("inf")}, "memory.lora_alpha: it is inf"),
        ({"targets": ()}, "memory.lora_targets: the list is empty"),
        ({"targets": ("q_proj", "lm_head")}, 'memory.lora_targets: "lm_head" is no projection'),
    ],
)
def test_wrong_settings_are_told(change, said):
    model = make()
    with pytest.raises(UserError) as caught:
        add(model, **change)
    assert str(caught.value).startswith(said) and str(caught.value).endswith(".")
    assert adapter_names(model) == [] and all(p.requires_grad for p in model.parameters())


def test_files_are_those_of_peft(tmp_path):
    model = add(make("qwen3"), rank=3, alpha=6.0, targets=("v_proj", "q_proj", "down_proj"))
    save_adapter(model, "one", tmp_path, "models/base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "models/base",
        "r": 3,
        "lora_alpha": 6.0,
        "lora_dropout": 0.0,
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2
    a = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    adapter = model.model.layers[1].self_attn.q_proj.adapters["one"]
    assert torch.equal(a, adapter.a) and torch.equal(b, adapter.b)
    assert a.shape == (3, 32) and b.shape == (64, 3)


def test_a_saved_adapter_is_the_same_in_another_model(tmp_path):
    model = add(make())
    save_adapter(model, "one", tmp_path, "base")
    other = add(make(), "two", seed=8)
    state = torch.get_rng_state()
    load_adapter(other, "read", tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(other, "read"), logits(model, "one"))
    trained = {name for name, p in other.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(other, "read"))
    save_adapter(other, "read", tmp_path / "again", "base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_half_precision_files_become_float32(tmp_path):
    save_adapter(add(make()), "one", tmp_path, "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    model = make()
    load_adapter(model, "one", tmp_path)
    parameter = model.model.layers[0].mlp.up_proj.adapters["one"].a
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert parameter.dtype == torch.float32 and torch.equal(parameter, tensors[name].float())


def alter_config(**changes):
    def alter(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return alter


def alter_tensors(change):
    def alter(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return alter


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
BROKEN = [
    (lambda f: (f / "adapter_config.json").unlink(), "there is no adapter_config.json"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "there is no adapter_model.safetensors"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "the file is not JSON"),
    (alter_config(peft_type="LOHA"), "peft_type is 'LOHA', and only plain LoRA"),
    (alter_config(use_dora=True), "use_dora is True"),
    (alter_config(use_rslora=True), "use_rslora is True"),
    (alter_config(bias="all"), "bias is 'all'"),
    (alter_config(alora_invocation_tokens=[5]), "alora_invocation_tokens is [5]"),
    (alter_config(alpha_pattern={"q_proj": 3}), "alpha_pattern is {'q_proj': 3}"),
    (alter_config(r=0), "r is 0 and lora_alpha 6.0"),
    (alter_config(lora_alpha="6"), "r is 3 and lora_alpha '6'"),
    (alter_config(target_modules="all-linear"), "target_modules is 'all-linear'"),
    (alter_config(target_modules=["q_proj"]), "has no place in this model"),
    (alter_config(r=4), "and the model and adapter_config.json ask for [4, "),
    (alter_tensors(lambda t: t.pop(KEY)), f"the tensor {KEY} is missing"),
    (alter_tensors(lambda t: t.update(extra=t[KEY].clone())), "the tensor extra has no place"),
    (cut, "the file is damaged or cut short"),
]


@pytest.mark.parametrize("spoil, said", BROKEN, ids=[said[:30] for _, said in BROKEN])
def test_broken_folders_leave_the_model_as_it_was(spoil, said, tmp_path):
    save_adapter(add(make()), "one", tmp_path, "base")
    spoil(tmp_path)
    model = make()
    with pytest.raises(UserError) as caught:
        load_adapter(model, "one", tmp_path)
    message = str(caught.value)
    assert said in message and message.startswith(str(tmp_path)) and message.endswith(".")
    assert adapter_names(model) == [] and all(p.requires_grad for p in model.parameters())
