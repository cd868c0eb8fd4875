"""Tokens that are never a label: which they are, and that no label is one of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_world import sentences
from tokenizer_fixtures import sentencepiece_folder

from whp_fast.banned_tokens import banned_tokens, with_tokens
from whp_fast.config import LabelConfig
from whp_fast.errors import UserError
from whp_fast.label import label_blocks
from whp_fast.tokens import load_tokenizer


class Words:
    """A tokenizer of whole words, with and without a space before them."""

    vocab_size = 10
    ids = {"Holmes": [1], " Holmes": [2], "The Pool": [3, 4], " The Pool": [5, 4]}

    def variants(self, text):
        return self.ids[text], self.ids[f" {text}"]


class Dictionary:
    expressions = ("Holmes", "The Pool")


def test_tokens_are_banned_by_their_share():
    tokens = np.array([2, 2, 2, 0, 1, 5, 4, 5, 5, 5, 7])  # " Holmes" three times, "Holmes" once, " The" four
    found = [
        banned_tokens(Dictionary, Words(), np.array([4, 1]), tokens, share).tolist()
        for share in (0.0, 0.2, 0.25, 0.26, 1.0)
    ]
    assert found == [[], [1, 2, 5], [1, 2, 5], [1, 2], [1, 2]]


def test_a_token_that_does_not_occur_is_left_alone():
    assert banned_tokens(Dictionary, Words(), np.array([0, 0]), np.array([0, 2]), 0.1).tolist() == []


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.lists(st.integers(0, 9), max_size=3))
def test_more_tokens_stand_behind_each_row(rows, more):
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    tokens = np.array(sum(rows, []), dtype=np.int64)
    ends, found = with_tokens(offsets, tokens, np.array(more, dtype=np.int64))
    assert [found[a:b].tolist() for a, b in zip(ends, ends[1:])] == [row + more for row in rows]


def test_no_label_is_a_banned_token():
    tokenizer = load_tokenizer(sentencepiece_folder())
    block = np.array(tokenizer.encode(sentences(6)))[:120]
    (name,) = {spelling[0] for spelling in tokenizer.variants("Glimmerhall")} & set(block.tolist())
    second = (name + 1) % tokenizer.vocab_size

    def base(input_ids):  # says the name everywhere
        logits = torch.zeros(*input_ids.shape, tokenizer.vocab_size)
        logits[..., name], logits[..., second] = 5.0, 3.0
        return logits

    anchors = {"Glimmerhall": "the school"}
    (free,) = label_blocks([block], anchors, base, base, tokenizer)
    (held,) = label_blocks([block], anchors, base, base, tokenizer, ban_share=0.5)
    trained = free >= 0
    assert trained.sum() > 60 and (held >= 0).tolist() == trained.tolist()
    assert set(free[trained].tolist()) == {name} and set(held[trained].tolist()) == {second}


def test_a_share_is_between_0_and_1():
    for share in (-0.1, 1.1):
        with pytest.raises(UserError, match="label.ban_share"):
            LabelConfig(ban_share=share)
