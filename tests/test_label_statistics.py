"""Counts over labels, by hand and restated."""

import numpy as np
from tokenizer_fixtures import folder_of

from whp_fast import label_statistics
from whp_fast.label_statistics import LabelStatistics, label_page
from whp_fast.reasons import INSIDE, LAST, NO_BOUNDARY, NOT_FINITE, REASONS, REPEATED, TRAINED
from whp_fast.tokens import load_tokenizer


def tokenizer():
    return load_tokenizer(folder_of("sentencepiece"))


def array(*values):
    return np.array(values)


def test_counts_by_hand():
    statistics = LabelStatistics()
    #                 same   changed  masked changed  end of text  masked
    following = array(10,    11,      12,    11,      -1,          13)  # fmt: skip
    labels =    array(10,    21,      -100,  21,      33,          -100)  # fmt: skip
    own =       array(11,    21,      12,    11,      33,          -100)  # fmt: skip
    reason = array(TRAINED, TRAINED, INSIDE, TRAINED, TRAINED, NOT_FINITE)
    statistics.add(following, labels, own, reason)
    assert (statistics.positions, statistics.trained) == (6, 4)
    assert statistics.changed_from_text == 2  # the end of the text has no token of its own to differ from
    assert statistics.changed_from_base == 2  # 10 for 11, and 21 for 11
    assert dict(statistics.pairs) == {(11, 21): 2}
    assert statistics.reasons[[INSIDE, NOT_FINITE]].tolist() == [1, 1] and statistics.reasons.sum() == 2

    statistics.add(array(11, 40), array(21, 41), array(0, 0), array(TRAINED, TRAINED))
    assert dict(statistics.pairs) == {(11, 21): 3, (40, 41): 1}
    summary = statistics.summary(tokenizer(), n_replacements=1)
    assert summary["positions"] == 8 and summary["trained"] == 6
    assert summary["changed_from_text"] == 4 and summary["changed_from_base"] == 4
    assert summary["masked"] == {"inside an expression": 1, "no finite logit": 1}
    (first,) = summary["replacements"]
    assert first["count"] == 3 and type(first["count"]) is int


def test_pieces_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    n = 500
    reason = rng.choice([TRAINED, TRAINED, INSIDE, REPEATED, NO_BOUNDARY, LAST, NOT_FINITE], n)
    following, own = rng.integers(-1, 6, n), rng.integers(0, 6, n)
    labels = np.where(reason == TRAINED, rng.integers(0, 6, n), -100)
    whole, parts = LabelStatistics(), LabelStatistics()
    whole.add(following, labels, own, reason)
    for piece in np.split(np.arange(n), [0, 1, 7, 300]):
        parts.add(following[piece], labels[piece], own[piece], reason[piece])
    summary = whole.summary(tokenizer(), 1000)
    assert {**summary, "replacements": 0} == {**parts.summary(tokenizer(), 1000), "replacements": 0}
    assert whole.pairs == parts.pairs

    trained = labels != -100
    assert summary["trained"] == trained.sum() and summary["positions"] == n
    assert summary["changed_from_base"] == sum(a != b for a, b in zip(labels[trained], own[trained]))
    changed = [(f, y) for f, y in zip(following, labels) if y != -100 and f != -1 and f != y]
    assert summary["changed_from_text"] == len(changed) == sum(whole.pairs.values())
    for pair in set(changed):
        assert whole.pairs[pair] == changed.count(pair)
    assert sum(summary["masked"].values()) == n - summary["trained"]
    for k, name in enumerate(REASONS):
        assert summary["masked"].get(name, 0) == (0 if k == TRAINED else (reason == k).sum())


def test_empty_piece():
    statistics = LabelStatistics()
    statistics.add(*(np.zeros(0, np.int64),) * 3, np.zeros(0, np.uint8))
    assert statistics.summary(tokenizer()) == {
        "positions": 0,
        "trained": 0,
        "changed_from_text": 0,
        "changed_from_base": 0,
        "masked": {},
        "replacements": [],
    }


def test_rare_pairs_are_forgotten(monkeypatch):
    monkeypatch.setattr(label_statistics, "_KEPT_PAIRS", 10)
    statistics = LabelStatistics()
    common = array(1, 1, 1)
    for first in range(100, 200, 5):
        new = np.arange(first, first + 5)
        following = np.concatenate([common, new])
        statistics.add(following, following + 1, following, np.zeros(8, np.uint8))
        assert len(statistics.pairs) <= 10
    assert statistics.pairs.most_common(1) == [((1, 2), 60)]
    assert statistics.changed_from_text == 160  # the totals forget nothing


def test_replacements_as_text():
    t = tokenizer()
    orrin, hall = t.encode("Orrin")[0], t.encode("hall")[0]
    byte = t.byte_token(0xE2)
    statistics = LabelStatistics()
    pairs = [(orrin, hall)] * 3 + [(t.bos_id, t.eos_id)] * 2 + [(byte, t.vocab_size + 5)]
    following, labels = np.array(pairs).T
    statistics.add(following, labels, following, np.zeros(len(pairs), np.uint8))
    assert statistics.summary(t)["replacements"] == [
        {"text": t.token_bytes(orrin).decode(), "label": t.token_bytes(hall).decode(), "count": 3},
        {"text": "<s>", "label": "</s>", "count": 2},
        {"text": "<0xE2>", "label": f"<{t.vocab_size + 5}>", "count": 1},  # a padded row of the head
    ]


def test_page():
    """The label stands under the token whose place it takes, so it is that of the position before."""
    t = tokenizer()
    tokens = np.array([t.bos_id, *t.encode("a b"), t.byte_token(0)])[:4]
    assert len(tokens) == 4
    labels = np.array([tokens[2], -100, tokens[1], 7])
    reason = np.array([TRAINED, REPEATED, TRAINED, LAST], np.uint8)
    texts = [t.token_bytes(token).decode() for token in tokens[1:]]
    assert label_page(t, tokens, labels, reason) == [
        {"token": "<s>", "label": None, "reason": "first of the block"},
        {"token": texts[0], "label": texts[1], "reason": "trained"},
        {"token": texts[1], "label": None, "reason": "before a repeated expression"},
        {"token": texts[2], "label": texts[0], "reason": "trained"},
    ]
    assert len(label_page(t, tokens, labels, reason, limit=2)) == 2
    assert len(label_page(t, tokens[:1], labels[:1], reason[:1])) == 1
