"""Labels as targets: how many a block has, what they cost, and blocks padded to one length."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_training import CONTEXT, VOCAB, corpus, tiny_model

from whp_fast.corpus import padded
from whp_fast.objectives import LabelTargets, Objective

MASKED = -100


def summed(hidden, head, rows):
    """Cross-entropy of whole logits in float64, added up; ``rows`` are one target a position, or -100."""
    logits = (hidden.double() @ head.double().T).flatten(0, 1)
    return F.cross_entropy(logits, torch.tensor(rows).flatten(), ignore_index=MASKED, reduction="sum").item()


def test_blocks_are_padded_on_the_right():
    blocks, _ = corpus(n_blocks=3, short=4)
    rows = torch.from_numpy(padded([blocks[2], blocks[0]]))
    assert rows.dtype == torch.int64 and rows.shape == (2, CONTEXT)
    assert rows[0, :4].tolist() == blocks[2].tolist() and rows[0, 4:].tolist() == [0] * 6
    assert rows[1].tolist() == blocks[0].tolist()
    assert padded([blocks[2]]).shape == (1, 4)


@pytest.mark.parametrize("numbers", [[0], [8], [3, 8, 1]])
def test_labels_of_blocks(numbers):
    blocks, labels = corpus()
    targets = LabelTargets(blocks, labels)
    rows = []
    for n in numbers:
        here = labels[n * CONTEXT : (n + 1) * CONTEXT].tolist()
        rows.append(here + [MASKED] * (CONTEXT - len(here)))
    length = max(len(blocks[n]) for n in numbers)
    rows = [row[:length] for row in rows]
    assert targets.count(np.array(numbers)) == sum(label != MASKED for row in rows for label in row) > 0
    check_loss(targets, numbers, rows, length)


@pytest.mark.parametrize("numbers", [[0], [8], [3, 8, 1]])
def test_next_tokens_of_blocks(numbers):
    """The last position of a block has none: what follows is in another block."""
    blocks, _ = corpus()
    targets = LabelTargets(blocks, None)
    assert targets.count(np.array(numbers)) == sum(len(blocks[n]) - 1 for n in numbers)
    length = max(len(blocks[n]) for n in numbers)
    rows = [blocks[n].tolist()[1:] + [MASKED] * (length - len(blocks[n]) + 1) for n in numbers]
    check_loss(targets, numbers, rows, length)


def check_loss(targets, numbers, rows, length):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(numbers), length, 16, generator=generator)
    head = tiny_model().lm_head_weight.detach()
    options = dict(compute_dtype=torch.float32, chunk_mib=1)
    loss = targets.loss(hidden, head, np.array(numbers), num_items_in_batch=50, **options)
    assert loss.item() == pytest.approx(summed(hidden, head, rows) / 50, rel=1e-6)


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
    hidden, head = torch.ones(1, CONTEXT, 16), tiny_model().lm_head_weight.detach()
    options = dict(num_items_in_batch=3, compute_dtype=torch.float32, chunk_mib=1)
    losses = [
        LabelTargets(blocks, kind).loss(hidden, head, np.array([1]), **options) for kind in (labels, narrow)
    ]
    assert torch.equal(*losses) and labels.max() < VOCAB


def test_an_objective_counts_once_unless_told():
    assert Objective(*[None] * 2).weight == 1.0
