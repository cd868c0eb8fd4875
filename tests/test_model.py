"""The model against transformers: every family, logits and gradients, and the configurations it refuses."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from whp_fast.checkpoint import load_model
from whp_fast.errors import UserError
from whp_fast.model import Llama, RMSNorm, inverse_frequencies
from whp_fast.model_config import LlamaConfig

VOCAB = 61
TINY = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
FAMILIES = {
    "llama2": transformers.LlamaConfig(**TINY, rms_norm_eps=1e-5),
    "llama2-gqa-bias-tied": transformers.LlamaConfig(
        **TINY, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-2
    ),
    "llama3": transformers.LlamaConfig(**TINY, num_key_value_heads=1, rope_parameters=LLAMA3_ROPE),
    "llama-linear": transformers.LlamaConfig(
        **TINY, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    ),
    "mistral": transformers.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=7, head_dim=12),
    "mistral-full": transformers.MistralConfig(**TINY, num_key_value_heads=4, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**TINY, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(
        **TINY, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3),
    "qwen3-bias-tied": transformers.Qwen3Config(
        **TINY, num_key_value_heads=4, head_dim=8, attention_bias=True, tie_word_embeddings=True
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomised(config, seed=0):
    """A transformers model whose biases and norms are not the 0 and 1 that hide a missing one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(transformers model, our model with the same weights, folder)"""
    theirs = randomised(FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def tokens(*shape, seed=1):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_logits(pair):
    theirs, ours, _ = pair
    ids = tokens(2, 45)
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    assert found.shape == (2, 45, VOCAB) and found.dtype == torch.float32
    assert expected.std() > 0.3  # or the tolerance would mean nothing
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_logits_float64(pair):
    theirs, ours, _ = pair
    # Their norm works in float32 whatever the parameters; ours follows them, hence the 2e-6.
    theirs, ours = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    ids = tokens(2, 45, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-6, rtol=0)


def test_gradients(pair):
    theirs, ours, _ = pair
    ids, weights = (
        tokens(2, 33, seed=3),
        torch.randn(2, 33, VOCAB, generator=torch.Generator().manual_seed(4)),
    )
    grads = []
    for model in (theirs, ours):
        model.zero_grad()
        logits = model(ids)
        ((logits if torch.is_tensor(logits) else logits.logits) * weights).mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        # A bias of the keys shifts all scores of a query alike: its gradient is nothing but rounding.
        scale = 1e-5 if name.endswith("k_proj.bias") else expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(grads[1][name], expected, atol=1e-4 * scale, rtol=1e-3, msg=name)


def test_right_padding_changes_nothing(pair):
    _, ours, _ = pair
    ids = tokens(1, 20)
    padded = torch.cat((ids, tokens(1, 13, seed=9)), 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(padded)[:, :20], ours(ids), atol=2e-6, rtol=1e-5)


def test_position_ids(pair):
    _, ours, _ = pair
    ids = tokens(2, 9)
    places = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        plain = ours.hidden_states(ids)
        assert torch.equal(ours.hidden_states(ids, position_ids=places), plain)
        # RoPE knows distances only, so a common shift changes nothing, and a stretch does.
        shifted = ours.hidden_states(ids, position_ids=places[0] + 11)
        torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=0)
        assert not torch.allclose(ours.hidden_states(ids, position_ids=places * 2), plain, atol=1e-2)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
def test_autocast_is_as_good_as_theirs(family, tmp_path):
    theirs = randomised(FAMILIES[family])
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    ids = tokens(4, 150)
    with torch.no_grad():
        exact = theirs(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            their_error = (theirs(ids).logits - exact).square().mean().sqrt()
            our_error = (ours(ids) - exact).square().mean().sqrt()
            assert ours.hidden_states(ids).dtype == torch.float32
    assert our_error < 1.25 * their_error


def test_autocast_gradients_are_float32_and_close():
    model = fresh(LlamaConfig(**TINY, num_key_value_heads=2, initializer_range=0.15))
    ids = tokens(2, 100)

    def grads():
        model.zero_grad()
        torch.nn.functional.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten()
        ).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    exact = grads()
    with torch.autocast("cpu", torch.bfloat16):
        rough = grads()
    for name, expected in exact.items():
        assert rough[name].dtype == torch.float32
        error = (rough[name] - expected).norm() / expected.norm()
        assert error < 0.05, f"{name}: {error}"


def fresh(config, seed=0):
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def training_step(model, ids):
    """The gradients of a step, and how many numbers a backward pass is left with."""
    kept = []
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden = model.hidden_states(ids).float()
        loss = (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))).mean()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    loss.backward()
    return [p.grad.clone() for p in model.model.parameters()], sum(storages.values())


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_checkpointing_changes_no_gradient(family, mode):
    model = fresh(LlamaConfig.from_hf(json.loads(FAMILIES[family].to_json_string())))
    if mode == "bfloat16":
        model.bfloat16().residual_dtype = torch.float32
    ids, found = tokens(2, 70), {}
    for checkpointing in ("none", "selective", "full"):
        model.checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            found[checkpointing] = training_step(model, ids)[0]
    for checkpointing in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(found["none"], found[checkpointing], strict=True))


def test_checkpointing_computes_again_what_it_says():
    """full: all products twice but the last of each block, whose result nothing needs; selective: none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            name = operator._schema.name
            products = ("aten::mm", "aten::addmm", "aten::bmm", "whp_kernels_C::causal_attention_packed")
            counts["products"] += name in products
            counts["norms"] += name in ("whp_kernels_C::rms_norm", "aten::linalg_vector_norm")
            return operator(*arguments, **(options or {}))

    model, ids, found = fresh(LlamaConfig(**TINY)), tokens(2, 30), {}
    for checkpointing in ("none", "selective", "full"):
        counts = {"products": 0, "norms": 0}
        model.checkpointing = checkpointing
        with Count():
            training_step(model, ids)
        found[checkpointing] = counts
    layers = model.config.num_hidden_layers
    assert found["selective"]["products"] == found["none"]["products"]
    assert found["full"]["products"] >= found["none"]["products"] + 7 * layers
    assert found["selective"]["norms"] == found["full"]["norms"] == found["none"]["norms"] + 2 * layers


def test_checkpointing_of_an_unknown_kind():
    model = fresh(LlamaConfig(**TINY))
    model.checkpointing = "some"
    with pytest.raises(ValueError, match='checkpointing is "some"'):
        model.hidden_states(tokens(1, 4))


@pytest.mark.parametrize("family", ["llama2-gqa-bias-tied", "qwen3", "mistral"])
def test_bfloat16_parameters_round_as_autocast_does(family):
    """The same weights, once in float32 under autocast and once in bfloat16 beside a float32 stream: what
    differs is rounding, and both are as far from float32 as the other."""
    model = fresh(LlamaConfig.from_hf(json.loads(FAMILIES[family].to_json_string())))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # or everything is the residual stream
            parameter.copy_(parameter.bfloat16())
    narrow = copy.deepcopy(model).bfloat16()
    narrow.residual_dtype = torch.float32
    ids, streams = tokens(3, 100), []
    narrow.model.layers[-1].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    exact, _ = training_step(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, _ = training_step(model, ids)
    found, _ = training_step(narrow, ids)
    assert streams == [torch.float32]
    for (name, _), a, b, c in zip(model.model.named_parameters(), found, autocast, exact, strict=True):
        if name.endswith("k_proj.bias"):
            continue  # nothing but rounding
        assert a.dtype == torch.bfloat16
        ours, theirs = ((x.float() - c).norm() / c.norm() for x in (a, b))
        assert ours < 1.5 * theirs + 0.004, f"{name}: {ours} against {theirs}"
        assert theirs < 0.1, name


def test_meta_init_then_to_empty():
    """The RoPE table must not depend on where the model was made."""
    config = LlamaConfig(**TINY)
    model = fresh(config)
    with torch.device("meta"):
        other = Llama(config)
    other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    ids = tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(other(ids), model(ids))


def test_bf16_model_keeps_its_angles_in_float32():
    config = LlamaConfig(**TINY)
    model = fresh(config).bfloat16()
    cos, sin = model._rope(4000, torch.device("cpu"), torch.bfloat16)
    angle = torch.arange(4000, dtype=torch.float64)[:, None] * inverse_frequencies(config).double()
    half = config.head_dim // 2
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[:, 0, half:].double(), angle.cos(), atol=5e-4, rtol=0)
    torch.testing.assert_close(sin[:, 0, half:].double(), angle.sin(), atol=5e-4, rtol=0)
    assert model(tokens(1, 8)).dtype == torch.bfloat16


def test_table_of_inference_mode_serves_training():
    model, ids = fresh(LlamaConfig(**TINY)), tokens(1, 8)
    with torch.inference_mode():
        model(ids)
    model(ids).sum().backward()


def test_init_weights_is_deterministic_and_scaled():
    config = LlamaConfig(
        **{**TINY, "hidden_size": 64, "vocab_size": 3000}, initializer_range=0.05, model_type="qwen2"
    )
    a, b, c = fresh(config), fresh(config), fresh(config, seed=1)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        if x.dim() == 1:
            assert torch.all(x == (0.0 if name.endswith("bias") else 1.0))
        else:
            assert not torch.equal(x, z)
    assert a.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.02)


def test_tied_head_is_the_embedding():
    tied = fresh(LlamaConfig(**TINY, tie_word_embeddings=True))
    assert tied.lm_head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    untied = fresh(LlamaConfig(**TINY))
    assert untied.lm_head_weight is untied.lm_head.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_gradient(dtype):
    norm = RMSNorm(7, eps=1e-2).double()
    x = torch.randn(
        3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    norm.weight.data = torch.linspace(-1, 2, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, (x,))
    g = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(
        torch.nn.functional.rms_norm(x, (7,), norm.weight, 1e-2), (x, norm.weight), g
    )
    small, y = copy.deepcopy(norm).to(dtype), x.detach().to(dtype).requires_grad_()
    found = torch.autograd.grad(small(y), (y, small.weight), g.to(dtype))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-5)


def test_config_of_transformers_4():
    """The old form of config.json says the same as the new one."""
    new = json.loads(FAMILIES["llama3"].to_json_string())
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = dict(LLAMA3_ROPE)
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = scaling
    a, b = LlamaConfig.from_hf(new), LlamaConfig.from_hf(old)
    assert dataclasses.replace(a, source={}) == dataclasses.replace(b, source={})
    assert a.rope_theta == 5000.0 and a.rope_scaling["factor"] == 8.0
    old["rope_scaling"] = {"type": "linear", "factor": 2}
    assert LlamaConfig.from_hf(old).rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_round_trip(family):
    config = LlamaConfig.from_hf(json.loads(FAMILIES[family].to_json_string()))
    again = LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert dataclasses.replace(again, source={}) == dataclasses.replace(config, source={})


def test_window_layers_without_layer_types():
    """transformers 4 writes only max_window_layers."""
    raw = json.loads(FAMILIES["qwen2-window"].to_json_string())
    del raw["layer_types"]
    config = LlamaConfig.from_hf(raw)
    assert [config.window_of_layer(i) for i in range(3)] == [None, 5, 5]


def test_unknown_keys_are_kept_and_known_ones_follow_the_object():
    raw = {**json.loads(FAMILIES["llama2"].to_json_string()), "my_own_key": {"a": [1]}, "use_cache": False}
    config = dataclasses.replace(LlamaConfig.from_hf(raw), rms_norm_eps=0.5)
    out = config.to_hf()
    assert out["my_own_key"] == {"a": [1]} and out["use_cache"] is False and out["rms_norm_eps"] == 0.5


def test_linear_scaling_is_written_as_old_readers_want_it():
    out = LlamaConfig.from_hf(json.loads(FAMILIES["llama-linear"].to_json_string())).to_hf()
    assert out["rope_scaling"] == {"type": "linear", "factor": 4.0} and out["rope_theta"] == 500.0
    assert out["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}


def test_defaults_are_those_of_transformers():
    """A field left out means to us what it means to transformers."""
    for kind in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        theirs = getattr(transformers, f"{kind}Config")(
            **{**TINY, "num_attention_heads": 32, "hidden_size": 64}
        )
        ours = LlamaConfig.from_hf(
            {"model_type": kind.lower(), **TINY, "num_attention_heads": 32, "hidden_size": 64}
        )
        assert ours.head_dim == getattr(theirs, "head_dim", 2)
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.window_of_layer(2) == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "gpt2"}, 'model_type is "gpt2"'),
        ({"model_type": None}, "the field model_type is missing"),
        ({"hidden_size": None}, "the field hidden_size is missing"),
        ({"hidden_size": "32"}, "the field hidden_size is '32'"),
        ({"hidden_size": True}, "the field hidden_size is True"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            'rope_scaling asks for RoPE of type "dynamic"',
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters asks for RoPE of type "yarn"'),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the field factor is missing"),
        ({"rope_scaling": "linear"}, "the field rope_scaling is 'linear'"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs from layer to layer"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types is"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types is"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 2}, "layer_types names 2 layers"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3}, '"chunked_attention"'),
    ],
)
def test_refused(changes, said):
    raw = {"model_type": "llama", **TINY, "num_key_value_heads": 4, **changes}
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_hf(raw, where="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ") and said in message and "\n" not in message
    assert message.endswith(".")
