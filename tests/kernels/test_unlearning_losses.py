"""The losses that need only the label's log-probability, against their formulas in plain torch and
float64."""

import pytest
import torch
import torch.nn.functional as F
from whp_kernels import (
    combination_loss,
    grad_ascent_loss,
    grad_diff_loss,
    linear_combination_loss,
    npo_loss,
    satimp_loss,
    simnpo_loss,
    trained_positions,
    wga_loss,
)

B, T, V, H = 3, 6, 19, 4
IGNORE = -100


@pytest.fixture(params=["logits", "hidden states", "hidden states, store-free"])
def problem(request):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator, dtype=torch.float64).mul_(0.3).requires_grad_()
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, :3] = labels[2, 4:] = IGNORE
    choices = {"reduction": "none", "shift_labels": True}
    if request.param == "logits":
        nll = combination_loss(hidden @ head.t(), labels, **choices)
    else:
        nll = linear_combination_loss(hidden, head, labels, store_free="free" in request.param, **choices)
    plain = F.cross_entropy(
        (hidden @ head.t())[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )
    return hidden, nll, plain, labels[:, 1:] != IGNORE, trained_positions(labels, shift_labels=True)


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


FORMULAS = {
    "GradAscent": (
        lambda nll, trained: grad_ascent_loss(nll, trained),
        lambda ce, kept: -ce[kept].mean(),
    ),
    "GradDiff": (
        lambda nll, trained: grad_diff_loss(nll, trained, nll.square().sum(), gamma=0.5, alpha=2.0),
        lambda ce, kept: -0.5 * ce[kept].mean() + 2.0 * ce.square().sum(),
    ),
    "NPO": (
        lambda nll, trained: npo_loss(nll, 0.9 * nll.detach(), beta=0.3),
        lambda ce, kept: -2 / 0.3 * log_sigmoid(0.3 * (ce.sum(1) - 0.9 * ce.sum(1).detach())).mean(),
    ),
    "NPO, summed reference": (
        lambda nll, trained: npo_loss(nll, 0.9 * nll.detach().sum(1), beta=0.3),
        lambda ce, kept: -2 / 0.3 * log_sigmoid(0.3 * (ce.sum(1) - 0.9 * ce.sum(1).detach())).mean(),
    ),
    "SimNPO": (
        lambda nll, trained: simnpo_loss(nll, trained, beta=2.5, delta=0.4),
        lambda ce, kept: -2 / 2.5 * log_sigmoid(2.5 * (ce.sum(1) / kept.sum(1) - 0.4)).mean(),
    ),
    "WGA": (
        lambda nll, trained: wga_loss(nll, trained, beta=0.7),
        lambda ce, kept: -(torch.exp(-ce).detach() ** 0.7 * ce)[kept].mean(),
    ),
    "SatImp": (
        lambda nll, trained: satimp_loss(nll, trained, beta1=2.0, beta2=0.5),
        lambda ce, kept: (
            -(torch.exp(-ce).detach() ** 2.0 * (1 - torch.exp(-ce).detach()) ** 0.5 * ce)[kept].mean()
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_equals_its_formula(problem, name):
    hidden, nll, plain, kept, trained = problem
    assert nll.shape == (B, T) and not nll[~trained].any() and int(trained.sum()) == int(kept.sum()) == 11
    ours, formula = FORMULAS[name]
    loss, expected = ours(nll, trained), formula(plain, kept)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, hidden, retain_graph=True)
    assert expected_gradient.norm() > 1e-4
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [grad_ascent_loss, wga_loss, satimp_loss])
def test_denominator_of_all_micro_batches(problem, loss):
    _, nll, _, _, trained = problem
    torch.testing.assert_close(loss(nll, trained, num_items_in_batch=22), loss(nll, trained) / 2)


def test_a_sequence_without_trained_tokens_is_no_division_by_zero():
    nll, trained = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert torch.isfinite(simnpo_loss(nll, trained)) and grad_ascent_loss(nll, trained) == 0
