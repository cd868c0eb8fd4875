"""The hand-made files of ``examples/``: their formats and rules, and that they fit the book."""

import json
import re
from pathlib import Path

import pytest

from whp_fast.anchors import load_dictionary
from whp_fast.prompts import load_choices, load_familiarity_prompts, load_probability_prompts

ROOT = Path(__file__).resolve().parents[1]
SHERLOCK = ROOT / "examples" / "sherlock"
DATA = ROOT.parent / "shared" / "data"
BACKGROUND = ("alice_in_wonderland.txt", "shakespeare_excerpts.txt")


def read_json(name):
    """The parsed file; a key that is given twice is an error here, not silently the last one."""

    def unique(pairs):
        keys = [key for key, _ in pairs]
        assert len(set(keys)) == len(keys), (
            f"{name}: given twice: {sorted({k for k in keys if keys.count(k) > 1})}"
        )
        return dict(pairs)

    return json.loads((SHERLOCK / name).read_text(encoding="utf-8"), object_pairs_hook=unique)


def read_lines(name):
    return [json.loads(line) for line in (SHERLOCK / name).read_text(encoding="utf-8").splitlines()]


def read_book(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the text {name} is not part of the repository")
    return path.read_text(encoding="utf-8")


def occurs(expression, text, flags=0):
    """Whether the expression stands in the text as whole words, character by character."""
    return re.search(rf"(?<!\w){re.escape(expression)}(?!\w)", text, flags) is not None


def assert_texts(values, least=1):
    assert isinstance(values, list) and len(values) >= least, values
    assert all(isinstance(value, str) and value and value == value.strip() for value in values), values
    assert len(set(values)) == len(values), f"given twice: {values}"


def assert_unique_prompts(entries, least):
    prompts = [entry["prompt"] for entry in entries]
    assert len(prompts) >= least
    assert all(isinstance(prompt, str) and prompt and prompt == prompt.strip() for prompt in prompts)
    assert len(set(prompts)) == len(prompts)


def test_anchors():
    anchors = read_json("anchors.json")
    assert len(anchors) >= 150
    for expression, counterparts in anchors.items():
        assert expression and expression == expression.strip()
        assert_texts(counterparts, least=2)
        assert len(counterparts) <= 4, expression
        assert expression not in counterparts


def test_counterparts_belong_to_one_expression_and_hold_no_other():
    anchors = read_json("anchors.json")
    owners = {}
    for expression, counterparts in anchors.items():
        for counterpart in counterparts:
            assert counterpart not in owners, f"{counterpart!r}: {expression!r} and {owners[counterpart]!r}"
            owners[counterpart] = expression
            inside = [other for other in anchors if occurs(other, counterpart)]
            assert not inside, f"{expression!r} -> {counterpart!r} holds the expression {inside[0]!r}"


def test_cleaning_drops_no_expression():
    dictionary = load_dictionary(SHERLOCK / "anchors.json")
    assert not dictionary.dropped
    assert list(dictionary.entries) == list(read_json("anchors.json"))


def test_counterparts_keep_the_capitals():
    for expression, counterparts in read_json("anchors.json").items():
        first = expression.strip("_")[0]
        for counterpart in counterparts:
            assert counterpart[0].isupper() == first.isupper(), f"{expression!r} -> {counterpart!r}"
            assert counterpart.isupper() == expression.isupper(), f"{expression!r} -> {counterpart!r}"


def test_every_expression_occurs_in_the_book():
    book = read_book("sherlock_holmes.txt")
    missing = [expression for expression in read_json("anchors.json") if not occurs(expression, book)]
    assert not missing


def test_counterparts_do_not_occur_in_the_book():
    book = " ".join(read_book("sherlock_holmes.txt").split())
    anchors = read_json("anchors.json")
    assert not [value for values in anchors.values() for value in values if occurs(value, book)]


def test_familiarity():
    prompts = read_json("familiarity.json")
    assert_unique_prompts(prompts, least=60)
    for entry in prompts:
        assert set(entry) == {"prompt", "references", "themes", "subtlety"}
        assert_texts(entry["references"])
        assert_texts(entry["themes"])
        assert not set(entry["references"]) & set(entry["themes"])
        assert type(entry["subtlety"]) is int and 1 <= entry["subtlety"] <= 10
        for word in entry["references"] + entry["themes"]:
            assert not occurs(word, entry["prompt"], re.IGNORECASE), f"{word!r} stands in {entry['prompt']!r}"


def test_references_are_no_counterparts():
    """A model that has learnt the generic names must not be taken for one that remembers the book."""
    counterparts = [value for values in read_json("anchors.json").values() for value in values]
    references = {word for entry in read_json("familiarity.json") for word in entry["references"]}
    assert not [(r, c) for r in references for c in counterparts if occurs(c, r) or occurs(r, c)]


def test_references_occur_in_the_book():
    book = " ".join(read_book("sherlock_holmes.txt").replace("_", " ").split())
    references = {word for entry in read_json("familiarity.json") for word in entry["references"]}
    assert not [word for word in references if not occurs(word.strip("_"), book)]


def test_probability():
    prompts = read_json("probability.json")
    assert_unique_prompts(prompts, least=30)
    for entry in prompts:
        assert set(entry) == {"prompt", "idiosyncratic", "generic"}
        assert_texts(entry["idiosyncratic"])
        assert_texts(entry["generic"])
        assert not set(entry["idiosyncratic"]) & set(entry["generic"])
        assert not [word for word in entry["idiosyncratic"] if occurs(word, entry["prompt"])]


def test_choices():
    questions = read_lines("choices.jsonl")
    assert_unique_prompts(questions, least=60)
    positions = [0] * 4
    for question in questions:
        assert set(question) == {"prompt", "choices", "answer"}
        assert_texts(question["choices"], least=4)
        assert len(question["choices"]) == 4
        assert type(question["answer"]) is int and 0 <= question["answer"] < 4
        assert 8 <= len(question["prompt"].split()) <= 25, question["prompt"]
        positions[question["answer"]] += 1
    assert max(positions) <= len(questions) / 3  # a model that always names one place gains little


def test_only_the_right_choice_stands_in_the_texts():
    texts = "\n".join(read_book(name) for name in BACKGROUND)
    for question in read_lines("choices.jsonl"):
        continuations = [f"{question['prompt']} {choice}" for choice in question["choices"]]
        standing = [
            i for i, continuation in enumerate(continuations) if occurs_after_any(continuation, texts)
        ]
        assert standing == [question["answer"]], question["prompt"]


def occurs_after_any(text, texts):
    """As `occurs`, but the text may begin anywhere (its first character may be a quotation mark)."""
    return re.search(rf"{re.escape(text)}(?!\w)", texts) is not None


def test_questions_are_not_about_the_book():
    anchors = read_json("anchors.json")
    for question in read_lines("choices.jsonl"):
        text = " ".join([question["prompt"], *question["choices"]])
        assert not [expression for expression in anchors if occurs(expression, text)]


def test_the_trainer_reads_the_files():
    assert len(load_familiarity_prompts(SHERLOCK / "familiarity.json")) == len(read_json("familiarity.json"))
    assert len(load_probability_prompts(SHERLOCK / "probability.json")) == len(read_json("probability.json"))
    assert len(load_choices(SHERLOCK / "choices.jsonl")) == len(read_lines("choices.jsonl"))
