"""Folders in and out: what transformers loads from ours, and every way a folder can be wrong."""

import json
import struct
import weakref

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from whp_kernels.optim import join, split

from whp_fast.adapters import add_adapter, merged
from whp_fast.checkpoint import load_config, load_model, read_tensors, save_model
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.quantised import QuantisedLinear, quantise_

TINY = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama2": LlamaConfig(**TINY, rms_norm_eps=1e-3),
    "llama3": LlamaConfig(**TINY, rope_theta=900.0, rope_scaling=LLAMA3, eos_token_id=(5, 7), bos_token_id=1),
    "llama-linear": LlamaConfig(
        **TINY, rope_scaling={"rope_type": "linear", "factor": 3.0}, attention_bias=True
    ),
    "mistral": LlamaConfig(**TINY, model_type="mistral", sliding_window=6, head_dim=12),
    "qwen2": LlamaConfig(**TINY, model_type="qwen2", tie_word_embeddings=True, pad_token_id=3),
    "qwen2-window": LlamaConfig(
        **TINY,
        model_type="qwen2",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=("sliding_attention", "full_attention"),
    ),
    "qwen3": LlamaConfig(**TINY, model_type="qwen3", head_dim=16, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(config, seed=0):
    """A model with random biases and norms too."""
    model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model


def ids():
    return torch.randint(0, 53, (2, 30), generator=torch.Generator().manual_seed(1))


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [6000, 2**30])
def test_transformers_loads_what_we_save(name, max_shard_bytes, tmp_path):
    model = make(CONFIGS[name])
    save_model(model, tmp_path, max_shard_bytes=max_shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    assert theirs.config.architectures == [type(theirs).__name__]
    with torch.no_grad():
        expected, found = model(ids()), theirs(ids()).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(load_model(tmp_path)(ids()), expected)

    written = sorted(path.name for path in tmp_path.iterdir())
    if max_shard_bytes == 2**30:
        assert written == ["config.json", "generation_config.json", "model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
        assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert set(written) == {
            *shards,
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
        }
        assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
        for shard in shards:
            tensors = load_file(tmp_path / shard)
            assert len(tensors) == 1 or sum(4 * t.numel() for t in tensors.values()) <= 6000
            assert all(index["weight_map"][tensor] == shard for tensor in tensors)


def test_special_ids_reach_transformers(tmp_path):
    save_model(make(CONFIGS["llama3"]), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == [5, 7] and theirs.generation_config.bos_token_id == 1
    assert load_config(tmp_path).eos_token_id == (5, 7)


def test_metadata_says_pt(tmp_path):
    """transformers 4 refuses a file without it."""
    save_model(make(CONFIGS["llama2"]), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_tied_head_is_written_once(tmp_path):
    save_model(make(CONFIGS["qwen2"]), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_written_in_another_dtype(tmp_path):
    model = make(CONFIGS["llama2"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    save_model(model, tmp_path, dtype=torch.bfloat16)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.dtype == torch.float32
        assert torch.equal(tensors[name], parameter.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path).lm_head_weight.dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.bfloat16).lm_head_weight.dtype == torch.bfloat16


def test_same_model_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_model(make(CONFIGS["qwen3"]), tmp_path / name, max_shard_bytes=9000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_saving_over_an_earlier_save_leaves_no_stale_shard(tmp_path):
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"kept")
    save_model(make(CONFIGS["llama2"], seed=1), tmp_path, max_shard_bytes=9000)
    save_model(make(CONFIGS["llama2"], seed=2), tmp_path)
    kept = ["config.json", "generation_config.json", "model-of-mine.safetensors", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    save_model(make(CONFIGS["llama2"], seed=3), tmp_path, max_shard_bytes=9000)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids()), make(CONFIGS["llama2"], seed=3)(ids()))


def test_saving_over_the_folder_it_came_from(tmp_path):
    """A loaded model must not be a view of the file that is being replaced."""
    save_model(make(CONFIGS["llama2"]), tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        expected = model(ids())
        save_model(model, tmp_path)
        assert torch.equal(model(ids()), expected) and torch.equal(load_model(tmp_path)(ids()), expected)


def test_parameters_do_not_follow_the_file(tmp_path):
    save_model(make(CONFIGS["llama2"]), tmp_path)
    model = load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    before = [parameter.clone() for parameter in model.parameters()]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_config_json_is_there_only_when_the_rest_is(tmp_path, monkeypatch):
    save_model(make(CONFIGS["llama2"]), tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("whp_fast.checkpoint.save_file", full)
    with pytest.raises(OSError):
        save_model(make(CONFIGS["llama2"]), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_unknown_keys_survive_load_and_save(tmp_path):
    save_model(make(CONFIGS["llama2"]), tmp_path / "a")
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**raw, "my_key": [1, {"b": None}]}))
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["my_key"] == [1, {"b": None}]


def test_loaded_parameters_are_trainable_and_own_their_memory(tmp_path):
    save_model(make(CONFIGS["qwen2"]), tmp_path)
    model = load_model(tmp_path)
    assert model.training and all(p.requires_grad and p.is_leaf and not p.is_meta for p in model.parameters())
    model(ids()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_shards_of_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY))
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        found, expected = load_model(tmp_path)(ids()), theirs.eval()(ids()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_buffers_of_old_exports_are_passed_over(tmp_path):
    for name in ("llama2", "qwen2"):
        model = make(CONFIGS[name])
        save_model(model, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = model.lm_head_weight.detach().clone()  # redundant where tied
        save_file(tensors, tmp_path / "model.safetensors")
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path)(ids()), model(ids()))


def alter_tensors(**changes):
    def alter(folder):
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors")

    return alter


def alter_config(**changes):
    def alter(folder):
        raw = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "REMOVE"}))

    return alter


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def cut_in_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:100])


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_shard(folder):
    save_model(load_model(folder), folder, max_shard_bytes=9000)
    next(folder.glob("model-00002-*")).unlink()


def drop_index(folder):
    save_model(load_model(folder), folder, max_shard_bytes=9000)
    (folder / "model.safetensors.index.json").unlink()


def spoil_index(folder):
    save_model(load_model(folder), folder, max_shard_bytes=9000)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')


def twice(folder):
    save_model(load_model(folder), folder, max_shard_bytes=9000)
    first, second = sorted(folder.glob("model-0000[12]-*"))
    save_file({**load_file(first), **load_file(second)}, second)


NORM = "model.layers.1.input_layernorm.weight"
BROKEN = [
    (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: the file is not JSON"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: the file is not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: the file holds no JSON object"),
    (alter_config(hidden_size="REMOVE"), "config.json: the field hidden_size is missing"),
    (alter_config(num_hidden_layers=2.5), "config.json: the field num_hidden_layers is 2.5"),
    (alter_config(model_type="gpt2"), 'config.json: model_type is "gpt2"'),
    (alter_config(num_hidden_layers=1), "the tensor model.layers.1."),
    (
        alter_config(num_hidden_layers=3),
        "the tensor model.layers.2.self_attn.q_proj.weight (and 8 more) is in none",
    ),
    (alter_config(intermediate_size=41), "has shape [32, 40], and config.json beside it asks for [32, 41]"),
    (lambda f: (f / "model.safetensors").unlink(), "there are no weights"),
    (pickles_only, "only there as a pickle (pytorch_model.bin), which can run code"),
    (drop_shard, "the shard is named by model.safetensors.index.json but missing"),
    (drop_index, "neither model.safetensors nor model.safetensors.index.json beside model-00001"),
    (spoil_index, "the field weight_map is missing or no table of names"),
    (twice, "is also in another shard"),
    (cut, "model.safetensors: the file is damaged or cut short ("),
    (cut_in_header, "model.safetensors: the file is damaged or cut short (100 bytes"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or cut short (0 bytes"),
    (alter_tensors(**{NORM: None}), f"the tensor {NORM} is in none of the weight files"),
    (alter_tensors(**{"lm_head.weight": None}), '"tie_word_embeddings": true'),
    (alter_tensors(**{NORM: torch.ones(31)}), f"{NORM} has shape [31]"),
    (alter_tensors(**{NORM: torch.ones(32, dtype=torch.int8)}), f"{NORM} is of torch.int8, and quantized"),
    (alter_tensors(extra=torch.ones(2)), "the tensor extra is no part of the llama model"),
]


@pytest.mark.parametrize("spoil, said", BROKEN, ids=[said[:40] for _, said in BROKEN])
def test_broken_folders(spoil, said, tmp_path):
    save_model(make(CONFIGS["llama2"]), tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert said in message and message.startswith(str(tmp_path)) and "\n" not in message
    assert message.endswith(".")


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nowhere")


def test_cut_file_names_the_size_it_should_have(tmp_path):
    save_model(make(CONFIGS["llama2"]), tmp_path)
    whole = size(tmp_path)
    cut(tmp_path)
    with pytest.raises(UserError, match=rf"\({whole // 2} bytes, {whole} expected"):
        load_model(tmp_path)


def test_swollen_header_length(tmp_path):
    save_model(make(CONFIGS["llama2"]), tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + data[8:])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_model(tmp_path)


def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Nothing that was read from a file is still alive when the tensor after the next is read."""
    model = make(CONFIGS["llama2"])
    save_model(model, tmp_path, max_shard_bytes=20_000)
    read = []

    class Watched:
        def __init__(self, *args, **kwargs):
            self._context = safe_open(*args, **kwargs)

        def __enter__(self):
            self._shard = self._context.__enter__()
            return self

        def __exit__(self, *error):
            return self._context.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self._shard, name)

        def get_tensor(self, name):
            assert sum(reference() is not None for reference in read) <= 1
            tensor = self._shard.get_tensor(name)
            read.append(weakref.ref(tensor))
            return tensor

    monkeypatch.setattr("whp_fast.checkpoint.safe_open", Watched)
    loaded = load_model(tmp_path)
    assert len(read) == len(list(loaded.parameters()))


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_while_reading(kind, dtype, tmp_path):
    """From the float32 of the file, whatever the dtype of the rest."""
    model = make(CONFIGS["qwen2"])
    save_model(model, tmp_path, max_shard_bytes=9000)
    loaded = load_model(tmp_path, dtype=dtype, quantise=kind)
    quantise_(model, kind)
    assert loaded.training and sum(isinstance(m, QuantisedLinear) for m in loaded.modules()) == 14
    buffers = dict(loaded.named_buffers())
    assert set(buffers) == {name for name, _ in model.named_buffers()}
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    for name, parameter in model.named_parameters():
        found = loaded.get_parameter(name)
        assert torch.equal(found, parameter.to(dtype)) and not found.requires_grad
    assert load_model(tmp_path, device="meta", quantise=kind).lm_head_weight.is_meta


def test_quantising_never_holds_two_unquantised_weights(tmp_path, monkeypatch):
    save_model(make(CONFIGS["llama2"]), tmp_path)
    alive, original = [], QuantisedLinear.quantise_from

    def watched(layer, weight):
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(weight))
        original(layer, weight)

    monkeypatch.setattr(QuantisedLinear, "quantise_from", watched)
    load_model(tmp_path, quantise="int8")
    assert len(alive) == 14


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_master_is_the_value_of_the_file(file_dtype, tmp_path):
    model = make(CONFIGS["llama2"])
    with torch.no_grad():
        model.model.norm.weight[:2] = torch.tensor([1 + 2**-8, -1 - 2**-8])  # ties: away from zero
    save_model(model, tmp_path, max_shard_bytes=9000, dtype=file_dtype)
    remainders, alive = {}, []

    def keep(name, exact):
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(exact))
        assert exact.dtype == torch.float32 and torch.equal(exact, exact_values[name])
        remainders[name] = split(exact)[1]

    exact_values = {name: p.detach().to(file_dtype).float() for name, p in model.named_parameters()}
    loaded = load_model(tmp_path, dtype=torch.bfloat16, master=keep)
    assert len(remainders) == len(exact_values)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.requires_grad
        assert torch.equal(join(parameter.detach(), remainders[name]), exact_values[name])
    if file_dtype != torch.bfloat16:
        assert loaded.model.norm.weight[:2].tolist() == [1 + 2**-7, -1 - 2**-7]


def test_a_master_is_for_bfloat16_alone(tmp_path):
    save_model(make(CONFIGS["llama2"]), tmp_path)
    for settings in (dict(dtype=torch.float32), dict(dtype=torch.bfloat16, quantise="nf4")):
        with pytest.raises(ValueError, match="master is for"):
            load_model(tmp_path, master=print, **settings)


@pytest.mark.parametrize("processes", [1, 3, 40])
def test_rows_are_read_without_the_rest(processes, tmp_path, monkeypatch):
    """Shards as FSDP2 cuts them; some processes hold no row of a tensor."""
    model = make(CONFIGS["llama2"])
    save_model(model, tmp_path, max_shard_bytes=9000, dtype=torch.float16)
    monkeypatch.setattr("whp_fast.checkpoint.SliceReader.whole", None)
    seen = set()
    for name, reader in read_tensors(tmp_path, model.config, shapes(model)):
        expected = model.get_parameter(name).detach().half()
        each = -(-reader.shape[0] // processes)
        parts = [reader.rows(i * each, (i + 1) * each) for i in range(processes)]
        assert reader.dtype == parts[0].dtype == torch.float16
        assert all(part.shape[1:] == expected.shape[1:] for part in parts)
        assert torch.equal(torch.cat(parts), expected)
        wide = reader.rows(1, 3, torch.float32)
        assert wide.dtype == torch.float32 and torch.equal(wide, expected[1:3].float())
        assert reader.rows(1, 1, torch.float32).dtype == torch.float32
        assert wide.untyped_storage().nbytes() == wide.numel() * 4
        seen.add(name)
    assert seen == set(shapes(model))


def test_all_is_checked_before_a_tensor_is_handed_out(tmp_path):
    """An error of the reader's caller is its own, and not a damaged file."""
    model = make(CONFIGS["llama2"])
    save_model(model, tmp_path)
    with pytest.raises(UserError, match="no part of the llama model"):
        list(read_tensors(tmp_path, model.config, {}))
    wrong = {**shapes(model), NORM: (31,)}
    handed_out = []
    with pytest.raises(UserError, match=r"has shape \[32\], .* asks for \[31\]"):
        handed_out += [name for name, _ in read_tensors(tmp_path, model.config, wrong)]
    assert NORM not in handed_out
    with pytest.raises(OSError, match="mine"):
        for _ in read_tensors(tmp_path, model.config, shapes(model)):
            raise OSError("mine")


def as_tensors(form, model):
    if form == "mapping":
        return dict(reversed(list(model.named_parameters())))
    if form == "calls":
        return {name: lambda p=p: p.detach().clone() for name, p in model.named_parameters()}
    return ((name, p.detach().clone()) for name, p in model.named_parameters())


@pytest.mark.parametrize("form", ["mapping", "calls", "iterator"])
@pytest.mark.parametrize("max_shard_bytes", [6000, 2**30])
def test_tensors_are_written_as_a_model_is(form, max_shard_bytes, tmp_path):
    model = make(CONFIGS["qwen3"])
    for dtype in (torch.float32, torch.bfloat16):
        save_model(model, tmp_path / "a", max_shard_bytes, dtype)
        save_model(as_tensors(form, model), tmp_path / "b", max_shard_bytes, dtype, config=model.config)
        files = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("form", ["calls", "iterator"])
def test_only_the_shard_being_written_is_held(form, tmp_path):
    model = make(CONFIGS["llama2"])
    limit, alive = 6000, []

    def made(parameter):
        held = [array for reference in alive if (array := reference()) is not None]
        assert sum(array.nbytes for array in held) <= limit
        array = parameter.detach().numpy().copy()  # lives as long as any tensor over it
        alive.append(weakref.ref(array))
        return torch.from_numpy(array)

    if form == "calls":
        tensors = {name: lambda p=p: made(p) for name, p in model.named_parameters()}
    else:
        tensors = ((name, made(p)) for name, p in model.named_parameters())
    save_model(tensors, tmp_path, limit, torch.float32, config=model.config)
    assert len(alive) == len(shapes(model)) > 10


def test_tensors_of_another_model_are_refused_and_the_folder_is_kept(tmp_path):
    model = make(CONFIGS["llama2"])
    save_model(model, tmp_path)
    tensors = dict(model.named_parameters())
    fewer = {name: tensor for name, tensor in tensors.items() if name != NORM}
    with_adapter, quantised = make(CONFIGS["llama2"]), quantise_(make(CONFIGS["llama2"]), "nf4")
    add_adapter(with_adapter, "one", rank=1, alpha=1, targets=["q_proj"])
    config = dict(config=model.config)
    for wrong, dtype, settings, said in [
        (tensors, None, config, "tensors need dtype and config"),
        (tensors, torch.float32, {}, "tensors need dtype and config"),
        (fewer, torch.float32, config, f"not those of a llama model of this config: {NORM}"),
        ({**tensors, "extra": tensors[NORM]}, torch.float32, config, "of this config: extra"),
        (with_adapter, None, {}, "adapters.one.a"),
        (quantised, None, {}, "model.layers.0.mlp.down_proj.weight"),
    ]:
        with pytest.raises(ValueError, match=said):
            save_model(wrong, tmp_path, dtype=dtype, **settings)
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path)(ids()), model(ids()))
    save_model(merged(with_adapter, "one"), tmp_path / "merged", dtype=torch.float32, **config)
    save_model(merged(quantised, None), tmp_path / "quantised", dtype=torch.float32, **config)


def test_an_iterator_that_goes_astray_leaves_no_complete_folder(tmp_path):
    model = make(CONFIGS["llama2"])
    pairs = list(model.named_parameters())
    for wrong, said in [
        (pairs[::-1], "expected the tensor model.embed_tokens.weight, got lm_head.weight"),
        (pairs[:-1], "expected the tensor lm_head.weight, got the end"),
        ([*pairs, pairs[0]], "expected the end of the tensors, got model.embed_tokens.weight"),
        ([(pairs[0][0], torch.ones(3, 32))], r"has shape \[3, 32\], expected \[53, 32\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            save_model(iter(wrong), tmp_path, dtype=torch.float32, config=model.config)
        assert not (tmp_path / "config.json").exists()
