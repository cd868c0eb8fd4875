"""The worked example of the method: twelve tokens whose map, forbidden tokens and one label are known.

| original index       | 0     | 1  | 2       | 3    | 4 | 5     | 6    | 7 | 8 | 9  | 10    | 11 |
|----------------------|-------|----|---------|------|---|-------|------|---|---|----|-------|----|
| original token       | <bos> | At | Glimmer | hall | , | Orrin | said | : | I | am | Orrin | .  |
| map to translated    | 0     | 1  | -1      | 2    | 3 | 5     | 6    | 7 | 8 | -1 | 11    | 12 |

translated: <bos> At school , Paul Smith said : I am Paul Smith .

Both rule sets give the same labels, but for the last position, which the reference rules never train.
"""

import functools

import brute_force
import numpy as np
import pytest
import torch
from tokenizer_fixtures import PlainByteLevel, spelled_byte_level_folder

from whp_fast.label import label_blocks
from whp_fast.tokens import load_tokenizer

torch.set_num_threads(1)

WORDS = " At| Glimmer|Glimmer|hall| Orrin|Orrin| said| I| am| school|school| Paul|Paul| Smith| he| the| it"
ANCHORS = {"Glimmerhall": "school", "Orrin": "Paul Smith"}
MAP = [0, 1, -1, 2, 3, 5, 6, 7, 8, -1, 11, 12]


@functools.cache
def plain_tokenizer():
    return PlainByteLevel(spelled_byte_level_folder(WORDS.split("|")))


@functools.cache
def package_tokenizer():
    return load_tokenizer(spelled_byte_level_folder(WORDS.split("|")))


def token_of(text):
    (token,) = plain_tokenizer().encode(text)
    return token


def block():
    tokenizer = plain_tokenizer()
    block = [tokenizer.bos_id, *tokenizer.encode(" At Glimmerhall, Orrin said: I am Orrin.")]
    words = [" At", " Glimmer", "hall", ",", " Orrin", " said", ":", " I", " am", " Orrin", "."]
    assert [tokenizer.token_bytes(token).decode() for token in block[1:]] == words
    return block


def label_block(base_row, reinforced_row, reference_rules, alpha=5.0):
    """Labels of the worked block; `base_row(j)` and `reinforced_row(i)` give the logits at an index."""

    def model(row):
        return lambda ids: torch.stack([row(t) for t in range(ids.shape[1])]).expand(len(ids), -1, -1)

    arguments = [block()], ANCHORS, model(base_row), model(reinforced_row)
    (labels,) = label_blocks(*arguments, package_tokenizer(), alpha, reference_rules)
    ((expected, _),) = brute_force.possible_labels(
        block(), *arguments[1:], plain_tokenizer(), alpha, reference_rules
    )
    assert np.asarray(labels).tolist() == expected.tolist()
    return np.asarray(labels).tolist()


def row_with(values, fill=0.0):
    row = torch.full((plain_tokenizer().vocab_size,), fill)
    for token, value in values.items():
        row[token] = value
    return row


def trained(labels, reference_rules):
    """The labels of a table, less the last position where the reference rules hold."""
    return [*labels[:-1], -100] if reference_rules else labels


@pytest.mark.parametrize("reference_rules", [False, True])
def test_map(reference_rules):
    probe = 40  # at translated index j the base model says token 40 + j, which no rule forbids
    labels = label_block(lambda j: row_with({probe + j: 1.0}), lambda i: row_with({}), reference_rules)
    assert labels == trained([-100 if j == -1 else probe + j for j in MAP], reference_rules)


@pytest.mark.parametrize("reference_rules", [False, True])
@pytest.mark.parametrize(
    ("word", "introduced"), [(" school", 2), ("school", 2), (" Paul", 4), ("Paul", 4), (" Smith", None)]
)
def test_forbidden_tokens(reference_rules, word, introduced):
    word, other = token_of(word), 41
    labels = label_block(lambda j: row_with({word: 2.0, other: 1.0}), lambda i: row_with({}), reference_rules)
    expected = [
        -100 if j == -1 else other if introduced is not None and j > introduced else word for j in MAP
    ]
    assert labels == trained(expected, reference_rules)


@pytest.mark.parametrize("reference_rules", [False, True])
def test_arithmetic(reference_rules):
    paul, orrin, he, the, it = (token_of(word) for word in (" Paul", " Orrin", " he", " the", " it"))
    # All other tokens have the mean of the five, so the mean of the row is that of the example.
    base = row_with({paul: 4.0, orrin: 1.0, he: 3.0, the: 2.5, it: 0.0}, fill=2.1)
    reinforced = row_with({paul: 1.0, orrin: 6.0, he: 3.5, the: 2.0, it: 0.0}, fill=2.1)
    labels = label_block(lambda j: base, lambda i: reinforced, reference_rules)
    assert labels[6] == the
    assert labels[0] == paul  # not forbidden yet: the label that leaving out rule j would give at 6, too
    assert label_block(lambda j: base, lambda i: reinforced, reference_rules, alpha=0.0)[6] == he


@pytest.mark.parametrize("reference_rules", [False, True])
def test_ties_go_to_the_lowest_index(reference_rules):
    row = row_with({50: 1.0, 45: 1.0, 60: 1.0})
    assert set(label_block(lambda j: row, lambda i: row, reference_rules)) == {45, -100}
    higher = row_with({45: 3.0})
    assert set(label_block(lambda j: row, lambda i: higher, reference_rules)) == {50, -100}
