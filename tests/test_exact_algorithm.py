"""`whp_fast.label.label_blocks` against the plain restatement of the algorithm in `brute_force.py`.

The models are tables: the logits at a position are a row chosen by a hash of the last three tokens, so that a
label that is read one position off is almost surely another label. In the exact tables all logits and their
row means are multiples of 1/2: float32 computes them without rounding, exact ties are frequent, and the
lowest index must win.
"""

import functools
import json
from types import SimpleNamespace

import brute_force
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from tokenizer_fixtures import TRAINING_TEXT, folder_of, plain_tokenizer

from whp_fast.errors import UserError
from whp_fast.label import label_blocks
from whp_fast.tokens import load_tokenizer

torch.set_num_threads(1)

KINDS = ("sentencepiece", "bpe-json")
SETTINGS = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}

# Expressions that begin with, end with or contain one another; some end in punctuation, accents or an emoji.
FAMILIES = [
    ["Orrin", "Orrin Vale", "Vale", "Orrin's", "Orrin Vale's"],
    ["Orrin", "Orrin Vale", "Orrin\nVale", "Orrin  Vale"],
    ["No. 7", "7", "No.", "77"],
    ["Glimmerhall", "Glimmer", "hall", "Glimmer-cup", "cup"],
    ["Mr. Quill", "Mr.", "Quill", "“Quill", "Quill."],
    ["wand of ash", "wand", "wand of", "of", "ash"],
    ["tall-", "tall-ash", "tall", "ash"],
    ["tall-", "ash", "(", ")", "Vale", "Orrin"],
    ["Élise", "é", "Zoë", "Élise Zoë"],
    ["🦉", "🦉 post", "—", "🦉—"],
    ["the old", "old", "a", "a cup", "the"],
]
KEYS = sorted({key for family in FAMILIES for key in family})
VALUES = ["Paul", "Paul Smith", "school", "a", "the old school", "hall", "—", "é", "Mr. X", "🦉"]
FILLERS = "and said the orrin xOrrin Orriny Orrin² halls _cup cup_ is 777 Mr ÉliseÉ \ufeff \x00".split(" ")
FILLERS += ["Orrin\u0301", "数Orrin"]
PHRASES = "tall-ash|Mr.Quill|Orrin Vale's hall.|(Vale)|(Orrin)|Glimmer-cup|wand of ash|🦉—Zoë|No. 77".split(
    "|"
)
SEPARATORS = [" "] * 10 + "||\n|  |\n\n|, |. |—|'s |’s | “|” | (|) |-|_|é".split("|")


# ----------------------------------------------------------------------------------------------------- models


class TableModel:
    """A causal model: logits float32 [B, T, V], at i a row of a table that the last three tokens choose."""

    def __init__(self, table: torch.Tensor, salt: int):
        self.table, self.salt = table, salt

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert input_ids.dtype == torch.int64 and input_ids.ndim == 2
        padded = torch.nn.functional.pad(input_ids, (2, 0), value=-1)
        code = padded[:, 2:] * 7919 + padded[:, 1:-1] * 104_729 + padded[:, :-2] * 1_299_709 + self.salt
        return self.table[code % len(self.table)]


@functools.cache
def models(kind: str, seed: int) -> tuple[TableModel, TableModel]:
    """(base, reinforced); even seeds give exact tables, odd seeds smooth ones."""
    generator = np.random.default_rng(seed)
    make = _smooth_table if seed % 2 else _exact_table
    tokenizer = plain_tokenizer(kind)
    # The tokens that the rules speak of are made likely, so that leaving out a rule changes labels.
    likely = sorted({token for word in VALUES for token in brute_force.first_tokens(tokenizer, word)})
    return tuple(TableModel(make(tokenizer.vocab_size, likely, generator), seed * 31 + i) for i in range(2))


def _exact_table(vocab_size, likely, generator, rows=307):
    """Multiples of 1/2 whose row mean is itself one."""
    table = np.zeros((rows, vocab_size))
    others = np.setdiff1d(np.arange(vocab_size), likely)
    assert vocab_size % 2 == 0 and len(likely) < len(others)
    for row in table:
        if generator.random() < 0.5:
            # One token far above the mean, all others just below it: at the mean it still wins, unless its
            # offset is wrong.
            row[:] = -0.5
            row[generator.choice(likely)] = 0.5 * (vocab_size - 1)
        else:
            # Each token has a partner as far below the mean as it is above.
            others = generator.permutation(others)
            partners, rest = others[: len(likely)], others[len(likely) :].reshape(2, -1)
            row[likely] = generator.integers(-2, 7, len(likely)) / 2 * (generator.random(len(likely)) < 0.3)
            row[partners] = -row[likely]
            row[rest[0]] = (generator.random(rest.shape[1]) < 0.1) / 2
            row[rest[1]] = -row[rest[0]]
        row += generator.integers(-2, 3) / 2
    return torch.tensor(table, dtype=torch.float32)


def _smooth_table(vocab_size, likely, generator, rows=307):
    table = generator.normal(size=(rows, vocab_size))
    table[:, likely] += 1.5
    table[np.arange(rows), generator.choice(likely, rows)] += 1000.0 * (generator.random(rows) < 0.5)
    return torch.tensor(table, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------- strategies


def cases(kind, most_values=1):
    """Strategy of (anchors, blocks, seed of the models, alpha).

    Half of the cases make each choice through Hypothesis, which seeks corners and shrinks what fails; the
    other half draw from an ordinary generator, which spreads them more evenly.
    """
    generators = st.one_of(st.randoms(use_true_random=False), st.randoms(use_true_random=True))
    return generators.map(lambda random: _case(random, plain_tokenizer(kind), most_values))


def _case(random, tokenizer, most_values):
    anchors = _dictionary(random, most_values)
    count = random.randint(1, 3 if most_values == 1 else 1)
    block_list = [_block(random, tokenizer, list(anchors)) for _ in range(count)]
    return anchors, block_list, random.randint(0, 3), random.choice([5.0, 5.0, 1.0, 0.5, 0.0])


def _dictionary(random, most_values):
    keys = [key for _ in range(random.randint(1, 2)) for key in random.choice(FAMILIES)]
    keys = sorted({*keys, *(random.choice(KEYS) for _ in range(random.randint(0, 3)))})
    random.shuffle(keys)
    keys = keys[: random.randint(1, len(keys))]
    # An expression is no generic counterpart of itself: the package refuses that.
    values_of = {key: [value for value in VALUES if value != key] for key in keys}
    if most_values == 1:
        return {key: random.choice(values) for key, values in values_of.items()}
    counts = {key: random.randint(1, most_values) for key in keys}
    return {key: random.sample(values, counts[key]) for key, values in values_of.items()}


def _text(random, keys):
    lists = [keys, keys, PHRASES, KEYS + FILLERS]
    words = [random.choice(random.choice(lists)) for _ in range(random.randint(1, 11))]
    return random.choice(["", "", " ", "\n"]) + "".join(word + random.choice(SEPARATORS) for word in words)


def _block(random, tokenizer, keys):
    """Token ids with BOS at the start, in the middle or nowhere, cut anywhere, even inside a character."""
    text = _text(random, keys)
    style = random.choice(["document", "inside", "chunks", "shreds"])
    if style == "document":
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    elif style == "inside":
        ids = tokenizer.encode_inside(text)
    else:  # each chunk is a text of its own; shreds are tokens that the tokenizer would not choose itself
        cuts = {random.randint(0, len(text)) for _ in range(random.randint(1, 3 if style == "chunks" else 8))}
        cuts = [0, *sorted(cuts), len(text)]
        parts = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        if style == "chunks":
            ids = [token for part in parts for token in [tokenizer.bos_id, *tokenizer.encode(part)]]
        else:
            ids = [token for part in parts for token in tokenizer.encode_inside(part)]
    if random.randint(0, 1):
        start = random.randint(0, len(ids) - 1)
        ids = ids[start : random.randint(start + 1, len(ids))]
    if random.randint(0, 5) == 0:
        ids.insert(random.randint(0, len(ids)), tokenizer.bos_id)
    return ids


@functools.cache
def tokenizer_of(kind: str):
    return load_tokenizer(folder_of(kind))


def allowed_labels(kind, case, reference_rules, drop=()):
    """For each block of a case the list of label arrays that the rules allow."""
    anchors, block_list, seed, alpha = case
    base, reinforced = models(kind, seed)
    try:
        return [
            brute_force.possible_labels(
                block, anchors, base, reinforced, plain_tokenizer(kind), alpha, reference_rules, drop
            )
            for block in block_list
        ]
    except brute_force.Unspecified:
        assume(False)


def agrees(labels, expected, close):
    """Whether labels are as expected; where two logits are close only that the position is trained counts."""
    labels, same = np.asarray(labels), np.asarray(labels) == expected
    same |= close & (labels >= 0)
    return labels.shape == expected.shape and bool(same.all())


def show(kind, block, got, allowed):
    pieces = [plain_tokenizer(kind).token_bytes(token) for token in block]
    lines = [f"tokens   {pieces}", f"got      {np.asarray(got).tolist()}"]
    return "\n".join(lines + [f"expected {labels.tolist()}" for labels, _ in allowed])


# ---------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("reference_rules", [False, True], ids=["project_rules", "reference_rules"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, **SETTINGS)
@given(data=st.data())
def test_labels_equal_the_restatement(kind, reference_rules, data):
    case = data.draw(cases(kind))
    anchors, block_list, seed, alpha = case
    allowed = allowed_labels(kind, case, reference_rules)
    got = label_blocks(block_list, anchors, *models(kind, seed), tokenizer_of(kind), alpha, reference_rules)
    assert isinstance(got, list) and len(got) == len(block_list)
    for block, labels, possible in zip(block_list, got, allowed, strict=True):
        assert np.asarray(labels).dtype == np.int64
        assert agrees(labels, *possible[0]), show(kind, block, labels, possible)


@pytest.mark.parametrize("reference_rules", [False, True], ids=["project_rules", "reference_rules"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, **SETTINGS)
@given(data=st.data())
def test_labels_equal_the_restatement_for_some_choice_of_values(kind, reference_rules, data):
    case = data.draw(cases(kind, most_values=3))
    anchors, (block,), seed, alpha = case
    base, reinforced = models(kind, seed)
    tokenizer = plain_tokenizer(kind)
    entries = brute_force.clean(anchors)
    slots = brute_force.reference_slots(entries, tokenizer) if reference_rules else entries
    assume(np.prod([len(values) for values in slots.values()]) < 300)
    (possible,) = allowed_labels(kind, case, reference_rules)
    (got,) = label_blocks([block], anchors, base, reinforced, tokenizer_of(kind), alpha, reference_rules)
    assert any(agrees(got, *labels) for labels in possible), show(kind, block, got, possible)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_interface_equals_its_plain_restatement(kind):
    tokenizer, plain = tokenizer_of(kind), plain_tokenizer(kind)
    assert (tokenizer.kind, tokenizer.vocab_size) == (plain.kind, plain.vocab_size)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (plain.bos_id, plain.eos_id)
    for token in range(plain.vocab_size):
        assert tokenizer.token_bytes(token) == plain.token_bytes(token)
    words = [*KEYS, *VALUES, *FILLERS, *PHRASES, *SEPARATORS, "\n\n x"]
    for text in [*words, *TRAINING_TEXT.splitlines(), TRAINING_TEXT, "", "  x"]:
        for variant in (text, " " + text, "  " + text, "\n" + text, text + " ", text + "\n"):
            assert tokenizer.encode(variant) == plain.encode(variant), variant
            assert tokenizer.encode_inside(variant) == plain.encode_inside(variant), variant


# ------------------------------------------------------------------------------------- the power of the tests


@pytest.mark.parametrize(
    ("reference_rules", "rule"),
    [(mode, rule) for mode in (False, True) for rule in ("g", "i", "j", "offset after j", "strictly after")]
    + [(False, "longest"), (False, "word boundary"), (True, "first key")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_a_rule_changes_some_label(kind, reference_rules, rule):
    """The cases above would notice an implementation without the rule."""

    def differs(case):
        right = allowed_labels(kind, case, reference_rules)
        wrong = allowed_labels(kind, case, reference_rules, drop=(rule,))
        return any(not agrees(w[0][0], *r[0]) for w, r in zip(wrong, right, strict=True))

    try:
        find(cases(kind), differs, settings=settings(max_examples=200, **SETTINGS, phases=[Phase.generate]))
    except NoSuchExample:
        pytest.fail(f"200 cases do not notice that the rule {rule!r} is left out")


# -------------------------------------------------------------------------------------------- ways to call it


@pytest.fixture(params=KINDS)
def long_case(request):
    tokenizer = plain_tokenizer(request.param)
    text = TRAINING_TEXT + "Orrin Vale met Glimmerhall—Orrin said “Ho!” and the tall-ash fell. " * 3
    anchors = {
        "Orrin": "Paul",
        "Orrin Vale": "Jon Smith",
        "Glimmerhall": "the old school",
        "Mr. Quill": "X",
        "ash": "é",
    }
    return request.param, [tokenizer.bos_id, *tokenizer.encode(text)], anchors


@pytest.mark.parametrize("reference_rules", [False, True])
def test_several_blocks_equal_each_alone(long_case, reference_rules):
    kind, ids, anchors = long_case
    base, reinforced = models(kind, 0)
    block_list = [
        np.asarray(ids[start:end]) for start, end in [(0, 37), (37, 38), (38, 300), (3, 90), (300, len(ids))]
    ]
    together = label_blocks(
        block_list, anchors, base, reinforced, tokenizer_of(kind), reference_rules=reference_rules
    )
    for block, labels in zip(block_list, together, strict=True):
        (alone,) = label_blocks(
            [block], anchors, base, reinforced, tokenizer_of(kind), reference_rules=reference_rules
        )
        assert np.array_equal(labels, alone)
        ((expected, _),) = brute_force.possible_labels(
            block, anchors, base, reinforced, plain_tokenizer(kind), 5.0, reference_rules
        )
        assert np.array_equal(labels, expected)


@pytest.mark.parametrize("reference_rules", [False, True])
def test_ways_to_pass_the_arguments(long_case, reference_rules, tmp_path):
    """A 2-D array, anchors from a file and models that give an object with `.logits` change nothing."""
    kind, ids, anchors = long_case
    base, reinforced = models(kind, 2)
    block_array = np.asarray(ids[: len(ids) // 48 * 48]).reshape(-1, 48)
    rest = tokenizer_of(kind), 5.0, reference_rules
    expected = label_blocks(list(block_array), anchors, base, reinforced, *rest)
    path = tmp_path / "anchors.json"
    path.write_text(json.dumps(anchors), encoding="utf-8")
    wrapped = [
        lambda input_ids, model=model: SimpleNamespace(logits=model(input_ids))
        for model in (base, reinforced)
    ]
    for got in [
        label_blocks(block_array, anchors, base, reinforced, *rest),
        label_blocks(block_array, path, base, reinforced, *rest),
        label_blocks(block_array, anchors, *wrapped, *rest),
    ]:
        got = np.asarray(got)
        assert got.dtype == np.int64 and got.shape == block_array.shape
        assert np.array_equal(got, np.stack([np.asarray(labels) for labels in expected]))


# ---------------------------------------------------------------------------------- corners of the dictionary


@pytest.mark.parametrize("reference_rules", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "anchors",
    [
        {"Orrin": "Paul", "Orrin's": "cup", "Vale": "Jon", "Orrin Vale": "school", "Orrin Vale's": "stick"},
        {"Orrin's": "cup", "Vale": "Jon", "Orrin Vale": "school", "Orrin Vale's": "stick"},
        {"Orrin": "Paul", "Vale's": "Jon", "Orrin Vale's": "stick", "Orrin Vale": "school"},
    ],
)
def test_cleaning(anchors, kind, reference_rules):
    text = "Orrin's cup and Orrin Vale's hall: Vale's Orrin Vale, Vale Orrin"
    check(kind, text, anchors, reference_rules)


def test_equal_tokens_overwrite_the_value_but_keep_their_place():
    """U+2581 is the space of SentencePiece, so the first and the last key have the same tokens."""
    anchors = {"Orrin▁Vale": "Paul", "Orrin": "Jon", "Orrin Vale": "cup"}
    check("sentencepiece", "Orrin Vale and Orrin with Orrin Vale", anchors, reference_rules=True)


def test_equal_expressions_are_refused():
    """Two expressions equal after stripping (the reference lets the later win); one equal to its value."""
    for anchors in ({"Orrin ": "Paul", " Orrin": "Jon"}, {"Orrin": "Orrin"}):
        with pytest.raises(UserError, match="Orrin"):
            label_blocks([[1, 2, 3]], anchors, *models("bpe-json", 0), tokenizer_of("bpe-json"))


@pytest.mark.parametrize("reference_rules", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_anchor_in_the_text(kind, reference_rules):
    check(kind, "a cup is a cup", {"Orrin": "Paul"}, reference_rules)


def check(kind, text, anchors, reference_rules):
    block = plain_tokenizer(kind).encode(text)
    for seed in range(4):
        case = anchors, [block], seed, 5.0
        ((expected,),) = allowed_labels(kind, case, reference_rules)
        (got,) = label_blocks([block], anchors, *models(kind, seed), tokenizer_of(kind), 5.0, reference_rules)
        assert agrees(got, *expected), show(kind, block, got, [expected])
