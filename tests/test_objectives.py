"""Labels as targets: how many a block has, and what they cost."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_training import CONTEXT, VOCAB, corpus, tiny_model

from whp_fast.objectives import LabelTargets, Objective

MASKED = -100


def summed(hidden, head, rows):
    """Cross-entropy of whole logits in float64, added up; ``rows`` are one target a position, or -100."""
    logits = hidden.double() @ head.double().T
    return F.cross_entropy(logits, torch.tensor(rows), ignore_index=MASKED, reduction="sum")


@pytest.mark.parametrize("numbers", [[0], [8], [3, 8, 1]])
def test_labels_of_blocks(numbers):
    blocks, labels = corpus()
    targets = LabelTargets(blocks, labels)
    rows = [label for n in numbers for label in labels[n * CONTEXT : (n + 1) * CONTEXT].tolist()]
    assert targets.count(np.array(numbers)) == sum(label != MASKED for label in rows) > 0
    check_loss(targets, numbers, rows)


@pytest.mark.parametrize("numbers", [[0], [8], [3, 8, 1]])
def test_next_tokens_of_blocks(numbers):
    """The last position of a block has none: what follows is in another block."""
    blocks, _ = corpus()
    targets = LabelTargets(blocks, None)
    assert targets.count(np.array(numbers)) == sum(len(blocks[n]) - 1 for n in numbers)
    rows = [label for n in numbers for label in (*blocks[n].tolist()[1:], MASKED)]
    check_loss(targets, numbers, rows)


def check_loss(targets, numbers, rows):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(rows), 16, generator=generator).requires_grad_()
    head = tiny_model().lm_head_weight.detach().requires_grad_()
    options = dict(compute_dtype=torch.float32, chunk_mib=1)
    loss = targets.loss(hidden, head, targets.prepare(np.array(numbers)), num_items_in_batch=50, **options)
    expected = summed(hidden, head, rows) / 50
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = zip(*(torch.autograd.grad(value, (hidden, head)) for value in (loss, expected)))
    for found, exact in gradients:
        torch.testing.assert_close(found, exact, atol=1e-7, rtol=1e-5)
        assert exact.abs().max() > 1e-3


def test_a_block_of_one_token_has_nothing_to_train():
    blocks, labels = corpus(n_blocks=2, short=1)
    assert LabelTargets(blocks, None).count(np.array([1])) == 0
    assert LabelTargets(blocks, None).count(np.array([], dtype=np.int64)) == 0
    assert LabelTargets(blocks, np.full_like(labels, MASKED)).count(np.array([0, 1])) == 0


def test_labels_may_be_read_only_integers_of_any_width():
    """As they come from a mapped file of the label stage."""
    blocks, labels = corpus()
    narrow = labels.astype(np.int32)
    narrow.setflags(write=False)
    hidden, head = torch.ones(CONTEXT, 16), tiny_model().lm_head_weight.detach()
    options = dict(num_items_in_batch=3, compute_dtype=torch.float32, chunk_mib=1)
    losses = []
    for kind in (labels, narrow):
        targets = LabelTargets(blocks, kind)
        losses.append(targets.loss(hidden, head, targets.prepare(np.array([1])), **options))
    assert torch.equal(*losses) and labels.max() < VOCAB


def test_blocks_without_a_label_cost_nothing():
    blocks, labels = corpus()
    targets = LabelTargets(blocks, np.full_like(labels, MASKED))
    hidden = torch.ones(2 * CONTEXT, 16, requires_grad=True)
    options = dict(num_items_in_batch=3, compute_dtype=torch.float32, chunk_mib=1)
    loss = targets.loss(hidden, tiny_model().lm_head_weight, targets.prepare(np.array([1, 0])), **options)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == hidden.shape and not hidden.grad.any()


def test_an_objective_counts_once_unless_told():
    assert Objective(*[None] * 2).weight == 1.0
