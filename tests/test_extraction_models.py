"""Proposing expressions with models, looking through a dictionary, and checking one."""

import json

import pytest
import torch
from test_extraction import everyday, run, saga, write
from tiny_world import save_tiny_model

from whp_fast.extraction import command
from whp_fast.extraction.candidates import Limits
from whp_fast.extraction.check import check, report
from whp_fast.extraction.expectation import rises
from whp_fast.extraction.prompting import Replies, ask, parse_reply, passages_of
from whp_fast.extraction.proposal import Proposal, propose, read_list
from whp_fast.extraction.proposal import write as write_list
from whp_fast.extraction.review import examples, review
from whp_fast.extraction.words import Texts
from whp_fast.tokens import load_tokenizer


@pytest.mark.parametrize(
    ("reply", "pairs"),
    [
        ('{"Orrin": "Jon", "wand": ["stick", "rod"]}', [("Orrin", ["Jon"]), ("wand", ["stick", "rod"])]),
        (
            '{"Orrin": "Jon",  # a name\n "Vale": "Smith",\n}\nPassage:\n{"x": "y"}',
            [("Orrin", ["Jon"]), ("Vale", ["Smith"])],
        ),
        ("{'Orrin': 'Jon', 'Pope's Court': 'Mill's Yard'", [("Orrin", ["Jon"])]),
        (
            '{"Orrin" -> "Jon", \u201cVale\u201d: \u201cSmith\u201d, "cut',
            [("Orrin", ["Jon"]), ("Vale", ["Smith"])],
        ),
        ("I cannot help with that.", []),
        ("{}", []),
        ('{"Orrin": 3, "Vale": null}', [("Orrin", []), ("Vale", [])]),
    ],
)
def test_replies_are_read_leniently(reply, pairs):
    assert [pair for pair in parse_reply(reply) if pair in pairs or "Court" not in pair[0]] == pairs


def test_nonsense_is_counted_and_left_out():
    replies = Replies()
    passage = "Orrin Vale came\nto Glimmerhall."
    replies.add(
        passage, '{"Orrin": "Jon", "Vale": "Vale Smith", "Hogwarts": "School", "Glimmerhall": "Oak House"}'
    )
    replies.add(passage, "what?")
    replies.add(passage, '{"Orrin": ["Jon", "Paul"], "Vale came": "Smith went"}')
    assert {k: dict(v) for k, v in replies.translations.items()} == {
        "Orrin": {"Jon": 2, "Paul": 1},
        "Glimmerhall": {"Oak House": 1},
        "Vale came": {"Smith went": 1},
    }
    assert (replies.passages, replies.unreadable) == (3, 1)
    assert dict(replies.refused) == {"not in the passage": 1, "counterpart holds the expression": 1}


def test_passages_are_spread_and_hold_all_words():
    document = (
        "\n\n".join(f"Paragraph {i} " + "word " * 150 for i in range(20))
        + "\n\n"
        + " ".join(map(str, range(2000)))
    )
    whole = passages_of([document], 10**6)
    assert " ".join(" ".join(whole).split()) == " ".join(document.split())
    assert max(map(len, whole)) <= 1501
    some = passages_of([document], 5)
    assert len(some) == 5 and [whole.index(p) for p in some] == [i * len(whole) // 5 for i in range(5)]


def test_a_model_is_asked_passage_by_passage():
    asked = []

    def answer(prompts):
        asked.extend(prompts)
        told = '"Orrin": "Harold", "thrumstone": "violin", "the": "a", "Malvek": "Vaelmoor"}'
        return [told for _ in prompts]

    passages = passages_of([saga()], 7)
    replies = ask(passages, answer, batch=3)
    assert len(asked) == 7 and all(p in prompt for p, prompt in zip(passages, asked))
    found = {
        p.expression: p.counterparts
        for p in propose(Texts([saga()]), {"b": Texts([everyday()])}, Limits(), replies=replies)
    }
    assert found["Orrin"] == ["Harold"] and found["thrumstone"] == ["violin"]
    assert "the" not in found  # the background has it as well
    assert "Vaelmoor" not in found["Malvek"] or "Vaelmoor" not in found


def test_the_rise_is_that_of_the_log_probabilities(tmp_path):
    base, trained = save_tiny_model(tmp_path / "base"), save_tiny_model(tmp_path / "trained", seed=1)
    document = "Then Orrin Vale\ncame to Orrin. The vale was cold."
    found, average = rises(
        [document], ["Orrin", "Orrin Vale", "Élise"], tmp_path / "base", tmp_path / "trained"
    )
    tokenizer = load_tokenizer(tmp_path / "base")
    ids = [tokenizer.bos_id, *tokenizer.encode(document)]
    with torch.no_grad():
        logits = [
            torch.log_softmax(m.hidden_states(torch.tensor([ids])) @ m.lm_head_weight.T, -1)[0]
            for m in (base, trained)
        ]
    rise = [float(logits[1][i - 1, t] - logits[0][i - 1, t]) for i, t in enumerate(ids) if i]
    assert average == pytest.approx(sum(rise) / len(rise), abs=1e-4)
    ends, place = [], 0
    for token in ids:
        piece = tokenizer.token_bytes(token)
        ends.append((place, place + len(piece)))
        place += len(piece)
    text = b"".join(map(tokenizer.token_bytes, ids))

    def total(start, end):
        return sum(rise[i - 1] for i, (a, b) in enumerate(ends) if i and a < end and b > start)

    at = text.index(b"Orrin Vale")
    assert found["Orrin Vale"] == pytest.approx(total(at, at + 10), abs=1e-4)
    again = text.index(b"Orrin", at + 5)
    assert found["Orrin"] == pytest.approx(total(again, again + 5), abs=1e-4)
    assert "Élise" not in found


def test_what_training_did_not_raise_is_left_out():
    def measure(expressions):
        return {e: (3.0 if e in ("Orrin", "thrumstone") else 0.1) for e in expressions}, 0.5

    found = {
        p.expression: p.rise
        for p in propose(Texts([saga()]), {"b": Texts([everyday()])}, Limits(), measure=measure)
    }
    assert found == {"Orrin": 3.0, "thrumstone": 3.0}


def test_commands_with_models(tmp_path, capsys):
    save_tiny_model(tmp_path / "base")
    save_tiny_model(tmp_path / "trained", seed=1)
    save_tiny_model(tmp_path / "other", vocab_size=402)
    texts = [write(tmp_path, "saga.txt", saga(60)), "--background", write(tmp_path, "b.txt", everyday())]
    out = tmp_path / "a.json"
    models = ["--base", tmp_path / "base", "--trained", tmp_path / "trained"]
    status, err, _ = run(capsys, "extract", *texts, "--out", out, *models)
    if status == 0:  # untrained models: what is raised is chance, but it is told
        assert all(p.rise is not None for p in read_list(out).values())
    else:
        assert "no expression reaches the limits" in err
    models[-1] = tmp_path / "other"
    status, err, _ = run(capsys, "extract", *texts, "--out", tmp_path / "c.json", *models)
    assert status == 2 and "a vocabulary of 402, but 400" in err
    asked = ["--model", tmp_path / "base", "--passages", 2]
    command.NEW_TOKENS, kept = 4, command.NEW_TOKENS
    try:
        status, err, told = run(capsys, "extract", *texts, "--out", tmp_path / "c.json", *asked)
    finally:
        command.NEW_TOKENS = kept
    assert status == 2 and "gave no usable dictionary for 2 passages" in err
    assert "2 replies unreadable" in told and not (tmp_path / "c.json").exists()


def answers(*given):
    queue = list(given)

    def answer(prompt):
        if not queue:
            raise EOFError
        return queue.pop(0)

    return answer


@pytest.fixture
def listed(tmp_path):
    proposals = [
        Proposal("Orrin", 12, "person male", ["Jon"]),
        Proposal("Malvek", 7, "person male", ["Paul"]),
        Proposal("Vaelmoor", 9, "place", ["Elham"]),
        Proposal("wand", 5, "thing", ["stick"]),
    ]
    write_list(tmp_path / "a.json", proposals)
    return tmp_path / "a.json"


def test_review_keeps_drops_and_edits(listed):
    shown = []
    text = ["Then Orrin\ncame to Vaelmoor, and Orrin saw it. Malvek had a wand."]
    counts = review(listed, text, answers("", "d", "e", "Denton; Hedon", "k"), shown.append)
    assert counts == {"kept": 2, "dropped": 1, "edited": 1, "left": 0}
    assert json.loads(listed.read_text()) == {
        "Orrin": ["Jon"],
        "Vaelmoor": ["Denton", "Hedon"],
        "wand": ["stick"],
    }
    told = "\n".join(shown)
    assert "12 times" in told and "Then [bold]Orrin[/bold] came to Vaelmoor" in told


def test_review_goes_on_where_it_stopped(listed):
    assert review(listed, [], answers("", "d"), lambda line: None)["left"] == 2
    shown = []
    assert review(listed, [], answers("q"), shown.append)["left"] == 2
    assert not any("Orrin" in line or "Malvek" in line for line in shown)
    assert review(listed, [], answers("a", "k"), lambda line: None) == {
        "kept": 3,
        "dropped": 1,
        "edited": 0,
        "left": 0,
    }


def test_review_refuses_a_bad_counterpart_and_goes_back(listed):
    shown = []
    counts = review(listed, [], answers("e", "Orrin", "d", "b", "", "?", "q"), shown.append)
    assert counts["kept"] == 1 and counts["dropped"] == 0
    assert any("not taken" in line for line in shown)
    assert json.loads(listed.read_text())["Orrin"] == ["Jon"]


def test_review_of_a_dictionary_without_a_list(tmp_path, capsys, monkeypatch):
    anchors = tmp_path / "hand.json"
    anchors.write_text('{"Orrin": "Jon", "wand": ["stick"]}')
    corpus = write(tmp_path, "c.txt", "Orrin had a wand. Orrin!")
    monkeypatch.setattr(command.console, "input", answers("", "d"))
    status, err, told = run(capsys, "review", anchors, "--corpus", corpus)
    assert (status, err) == (0, "") and "1 kept, 1 dropped, 0 edited, 0 left" in told
    assert json.loads(anchors.read_text()) == {"Orrin": ["Jon"]}
    assert read_list(anchors)["Orrin"].count == 2


def test_examples_are_whole_words_and_spread():
    text = " ".join(f"{i} wand wands" for i in range(9))
    found = examples("wand", [text], 3)
    assert [before.split()[-1] for before, _, _ in found] == ["0", "3", "6"]


def test_check_tells_coverage_and_what_is_wrong(tmp_path, capsys):
    anchors = {
        "Orrin": ["Jon", "Malvek Smith"],
        "Malvek": ["Paul"],
        "Orrin's": ["Jon's"],
        "Baker Street": ["Baker Road", "Mill Street"],
        "Wyndle Hall": ["Elham"],
        "Wyndle": ["Denton"],
        "wand": ["stick"],
        "Quell": ["Paul"],
        "Tharn": ["Hugo"],
    }
    (tmp_path / "a.json").write_text(json.dumps(anchors))
    text = "Orrin met Quell in Baker\nStreet, and Malvek in Wyndle Hall with a wand. Hugo is here."
    found = check(tmp_path / "a.json", [text])
    assert found.matches["Orrin"] == 1 and found.matches["Baker Street"] == 1
    assert found.broken_by_lines == {"Baker Street": 1}
    assert (found.words, found.covered_words) == (17, 8)
    assert found.never == ["Tharn"] and found.hidden == ["Wyndle"]
    leaks = {(e, v): why for e, v, why in found.leaks}
    assert leaks == {
        ("Orrin", "Malvek Smith"): "holds the expression 'Malvek'",
        ("Baker Street", "Baker Road"): "keeps 'baker' of its expression",
        ("Malvek", "Paul"): "also stands for 'Quell', which occurs near it",
        ("Tharn", "Hugo"): "is a name in the corpus",
    }
    assert set(found.splittable) == {"Orrin's", "Wyndle Hall"}
    status, err, told = run(
        capsys, "check", tmp_path / "a.json", write(tmp_path, "c.txt", text), "--json", tmp_path / "r.json"
    )
    assert (status, err) == (0, "") and "never matched: 1 'Tharn'" in told
    assert json.loads((tmp_path / "r.json").read_text())["never"] == ["Tharn"]
    assert any("47.1 % of 17 words" in line for line in report(found))
