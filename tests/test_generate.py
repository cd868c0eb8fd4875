"""Greedy decoding against the loop that anyone would write: no cache, no batch."""

import time

import pytest
import torch

from whp_fast.generate import KVCache, greedy
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig

TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "mistral": LlamaConfig(**TINY, model_type="mistral", sliding_window=5),
    "qwen2": LlamaConfig(
        **TINY, model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": LlamaConfig(**TINY, model_type="qwen3", head_dim=16, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(config):
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def prompts(count, longest, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(0, 97, (length,), generator=g).tolist() for length in lengths]


@torch.no_grad()
def naive(model, prompt, max_new_tokens, stop_ids=()):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_equals_the_naive_loop(name, batch_size):
    model, asked = make(CONFIGS[name]), prompts(11, 20)
    expected = [naive(model, prompt, 14) for prompt in asked]
    assert len({tuple(new) for new in expected}) > 8  # a model that always says the same would prove nothing
    assert greedy(model, asked, 14, batch_size=batch_size) == expected


def test_stop_ids_end_each_row_on_its_own():
    model, asked = make(CONFIGS["llama"]), prompts(11, 20)
    free = [naive(model, prompt, 14) for prompt in asked]
    stops = {free[0][3], free[5][7]}
    expected = [naive(model, prompt, 14, stops) for prompt in asked]
    assert len({len(new) for new in expected}) > 2
    assert greedy(model, asked, 14, stop_ids=stops) == expected
    assert greedy(model, asked, 14, stop_ids=iter(range(97))) == [new[:1] for new in free]


def test_mode_and_gradients_are_left_alone():
    model, asked = make(CONFIGS["qwen3"]), prompts(3, 5)
    model.model.norm.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    modes = []
    for training in (True, False):
        model.train(training)
        new = greedy(model, asked, 3)
        assert model.training is training
    assert modes and all(modes)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model(torch.tensor([asked[0] + new[0]])).sum().backward()  # what inference mode made is not in the way


def test_few_new_tokens():
    model, asked = make(CONFIGS["llama"]), prompts(3, 5)
    assert greedy(model, asked, 0) == [[], [], []]
    assert greedy(model, asked, 1) == [naive(model, prompt, 1) for prompt in asked]
    assert greedy(model, [], 5) == []


def test_wrong_calls():
    model = make(CONFIGS["llama"])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        greedy(model, [[1], []], 3)
    with pytest.raises(ValueError, match="batch_size 0"):
        greedy(model, [[1]], 3, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        greedy(model, [[1]], -1)


@torch.no_grad()
def test_cache_step_by_step():
    """Without position_ids the next token goes to the next place; the states are those of the whole text."""
    model = make(CONFIGS["mistral"])
    ids = torch.tensor([prompt[:9] for prompt in prompts(30, 30) if len(prompt) >= 9][:3])
    cache = KVCache(model.config, 3, 9)
    states = [model.hidden_states(ids[:, :4], cache)]
    states += [model.hidden_states(ids[:, i : i + 1], cache) for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(states, 1), model.hidden_states(ids), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="the cache holds 9"):
        model.hidden_states(ids[:, :1], cache)
    with pytest.raises(ValueError, match="one token a row"):
        model.hidden_states(ids[:, :2], cache)


def test_bf16_and_autocast_run():
    asked = prompts(5, 9)
    assert [len(new) for new in greedy(make(CONFIGS["qwen3"]).bfloat16(), asked, 4)] == [4] * 5
    with torch.autocast("cpu", torch.bfloat16):
        assert [len(new) for new in greedy(make(CONFIGS["mistral"]), asked, 9)] == [9] * 5


def test_quick_enough_to_evaluate_with():
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=5,
    )
    model = make(config)
    assert sum(p.numel() for p in model.parameters()) > 2_000_000
    asked = prompts(300, 40)
    start = time.perf_counter()
    greedy(model, asked, 16)
    assert time.perf_counter() - start < 15  # 1.1 s on one idle core
