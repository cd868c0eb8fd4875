"""The figures for the log, against their meaning written out."""

import pytest
import torch
from whp_kernels import Whp, combination_loss, linear_combination_loss

N, V, H = 8, 17, 5
IGNORE = -100


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("divergence", ["label", "hard", "forward_kl", "jsd"])
@pytest.mark.parametrize("way", ["logits", "in place", "hidden", "chunks", "store-free"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics(way, divergence, softcap):
    hidden = [normal(N, H, seed=k) for k in range(3)]
    heads = [normal(V, H, seed=3 + k) for k in range(3)]
    hidden[1][6] = float("nan")
    logits = [h @ w.t() for h, w in zip(hidden, heads)]
    labels = torch.arange(N) * 3 % V
    labels[2] = IGNORE
    temperature = 1.0 if divergence in ("label", "hard") else 1.5
    tokens = torch.tensor([4, 0, 9])
    choices = {
        "divergence": divergence,
        "softcap": softcap,
        "temperature": temperature,
        "statistics": True,
        "token_set": tokens,
    }
    teachers = {} if divergence == "label" else {"combination": Whp(2.0)}
    capped = [softcap * torch.tanh(x / softcap) if softcap else x for x in logits]
    student = capped[0]
    target = capped[1] - 2.0 * torch.relu(capped[2] - capped[1])
    labels[0] = student[0].argmax()  # one row agrees

    if way in ("logits", "in place"):
        if teachers:
            teachers["teachers"] = tuple(logits[1:])
        leaf = logits[0].clone().requires_grad_()
        _, found = combination_loss(leaf * 1.0, labels, inplace=way == "in place", **teachers, **choices)
    else:
        if teachers:
            teachers["teachers"] = tuple(zip(hidden[1:], heads[1:]))
        leaf = hidden[0].clone().requires_grad_()
        how = {"chunks": {"chunk_mib": 1}, "store-free": {"store_free": True}}.get(way, {})
        _, found = linear_combination_loss(leaf, heads[0], labels, **teachers, **choices, **how)

    asked = labels != IGNORE
    used = asked & (torch.arange(N) != 6) if teachers else asked
    taught = labels if divergence == "label" else target.nan_to_num(nan=-1e9).argmax(-1)
    p = (target[used] / temperature).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean() if divergence in ("forward_kl", "jsd") else torch.zeros(())
    assert found.rows == used.sum() and found.unusable == (asked & ~used).sum()
    torch.testing.assert_close(found.target_entropy.double(), entropy.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.agreement.double(), (student.argmax(-1) == taught)[used].double().mean())
    expected = student.softmax(-1)[used][:, tokens].sum(-1).mean()
    torch.testing.assert_close(found.set_probability.double(), expected, rtol=1e-6, atol=0)


def test_without_a_token_set_there_is_no_probability():
    _, found = combination_loss(torch.zeros(2, 3), torch.tensor([0, 1]), statistics=True)
    assert torch.isnan(found.set_probability) and found.agreement == 0.5


def test_probability_of_tokens_that_are_ruled_out_is_zero():
    logits = torch.zeros(1, 3)
    logits[0, 2] = -float("inf")
    for tokens, expected in (([2], 0.0), ([0, 2], 0.5), ([], 0.0)):
        choices = {"statistics": True, "token_set": torch.tensor(tokens, dtype=torch.int64)}
        _, found = combination_loss(logits, torch.tensor([0]), **choices)
        assert float(found.set_probability) == pytest.approx(expected)
