"""Sequences after each other: where they are, and what a model makes of them."""

import numpy as np
import pytest
import torch
from tiny_training import VOCAB, tiny_model

from whp_fast import attention
from whp_fast.packing import Packing, pack


def test_where_the_sequences_are():
    rows = [np.array(ids, dtype=np.uint16) for ids in ([5, 6, 7], [], [65535], [8, 9])]
    ids, packing = pack(rows)
    assert ids.dtype == torch.int64 and ids.tolist() == [5, 6, 7, 65535, 8, 9]
    assert packing.cu_seqlens.dtype == torch.int32 and packing.cu_seqlens.tolist() == [0, 3, 3, 4, 6]
    assert packing.position_ids.dtype == torch.int64 and packing.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert packing.lengths == (3, 0, 1, 2) and packing.max_length == 3 and packing.tokens == 6
    assert packing.starts == (0, 3, 3, 4, 6)
    ids[0] = 1  # a copy: blocks are read-only files
    assert rows[0][0] == 5


def test_runs_of_one_length():
    assert Packing.of([4, 4, 2, 0, 0, 2, 2]).runs == ((0, 2, 4), (8, 1, 2), (10, 2, 2))
    assert Packing.of([]).runs == () and Packing.of([]).tokens == 0 and Packing.of([]).max_length == 0
    assert Packing.of([0]).cu_seqlens.tolist() == [0, 0]


@pytest.mark.parametrize("count, length", [(3, 4), (1, 1), (2, 0)])
def test_one_length(count, length):
    made, same = Packing.uniform(count, length), Packing.of([length] * count)
    assert made.lengths == same.lengths and made.cu_seqlens.dtype == same.cu_seqlens.dtype
    assert torch.equal(made.cu_seqlens, same.cu_seqlens)
    assert torch.equal(made.position_ids, same.position_ids)


def test_lengths_that_cannot_be():
    for lengths in ([3, -1], [2**30, 2**30]):
        with pytest.raises(ValueError, match="none may be below 0"):
            Packing.of(lengths)


SHAPES = {"plain": {}, "window": dict(sliding_window=4), "grouped": dict(num_key_value_heads=1)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_computes_what_it_computes_of_each_sequence(shape, dtype):
    """States and gradients, whatever stands beside a sequence."""
    model = tiny_model(**SHAPES[shape]).to(dtype)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, n) for n in (7, 1, 12, 12, 3)]
    ids, packing = pack(rows)
    weights = torch.randn(packing.tokens, 16, generator=torch.Generator().manual_seed(1))

    def with_gradients(states):
        (states.float() * weights).sum().backward()
        gradients = [p.grad.clone() for p in model.model.parameters()]
        model.zero_grad()
        return states.detach(), gradients

    packed, gradients = with_gradients(model.hidden_states(ids, packing=packing))
    alone = [model.hidden_states(torch.from_numpy(row)[None])[0] for row in rows]
    expected, expected_gradients = with_gradients(torch.cat(alone))
    assert packed.shape == (packing.tokens, 16)
    atol = 2e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(packed, expected, atol=atol, rtol=0)
    for found, exact in zip(gradients, expected_gradients):
        assert (found - exact).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * exact.norm()
    assert not torch.allclose(packed[7:8], packed[8:9], atol=0.1)  # another first token, another state


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_a_broken_sequence_stays_alone(backend, monkeypatch):
    """NaN in one sequence reaches no other, whatever computes attention."""
    monkeypatch.setattr(attention, "_wanted", backend)
    monkeypatch.setattr(attention, "_resolved", {})
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = torch.nan
    ids, packing = pack([np.array([1, 2, 4]), np.array([5, 3, 6, 7]), np.array([8, 9, 1])])
    broken = model.hidden_states(ids, packing=packing).isnan().any(1).tolist()
    assert broken[:3] == broken[7:] == [False] * 3 and broken[4:7] == [True] * 3


def test_a_packing_of_other_tokens_is_refused():
    model, packing = tiny_model(), Packing.of([2, 3])
    for ids, places in ((torch.zeros(4), None), (torch.zeros(1, 5), None), (torch.zeros(5), torch.arange(5))):
        with pytest.raises(ValueError, match="a packed batch has 5 tokens"):
            model.hidden_states(ids.long(), packing=packing, position_ids=places)
