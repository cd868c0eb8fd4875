"""The dictionary is checked and cleaned, and the matcher finds what a regular expression finds."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokens import tokenizer_of

from whp_fast.anchors import Dictionary, Matcher, clean, load_dictionary, nearest_words
from whp_fast.errors import UserError

KINDS = ("sentencepiece", "bpe-json")
# Letters, digits and marks of scripts that put spaces between words, restated as a regular expression: \w
# without the others, and the combining marks that \w leaves out.
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff"
WORD = f"[^\\W{NO_SPACES}]"
MARK = "[\u0300-\u036f]"


def regex_of(expressions, match_across_lines):
    """Leftmost matches at word boundaries, of those the longest."""
    alternatives = []
    for expression in sorted(expressions, key=lambda e: -len(e.encode())):
        escaped = re.escape(expression)
        if match_across_lines:
            escaped = escaped.replace("\\ ", "[ \\n]").replace("\\\n", "[ \\n]")
        before = f"(?<!{WORD})(?<!{MARK})" if re.match(f"{WORD}|{MARK}", expression[0]) else ""
        after = f"(?!{WORD}|{MARK})" if re.match(f"{WORD}|{MARK}", expression[-1]) else ""
        alternatives.append(f"({before}{escaped}{after})")
    return re.compile("|".join(alternatives))


def find(expressions, text, kind="bpe-json", match_across_lines=False):
    """[(expression, first byte, end byte)] of a text in one block."""
    dictionary = Dictionary({expression: ["x"] for expression in expressions}, {})
    matcher = Matcher(dictionary, tokenizer_of(kind), match_across_lines=match_across_lines)
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    found = matcher.find(data, np.array([0, len(data)]), 0, len(data), across=False)
    return [(dictionary.expressions[k], int(start), int(end)) for k, start, end in found]


def found_words(expressions, text, **options):
    data = text.encode()
    return [data[start:end].decode() for _, start, end in find(expressions, text, **options)]


# ------------------------------------------------------------------------------------------------ the matcher

EXPRESSIONS = (
    "Orrin|Orrin Vale|Vale|Orrin's|No. 7|7|No.|77|Glimmer-cup|cup|Mr.|“Quill|Quill.|é|Élise|e\u0301|🦉"
    "|🦉 post|—|_x|Гарри|Гарри Поттер|哈利|哈利波特|해리|ハリー|the old|old|Orrin\nVale"
).split("|")
FILLERS = " | |  |\n|\n\n|s|'s|’s|_|x|7|.|,|“|é|\u0301|Г|и|在|는|の|🦉|-|²|Ö|\u00a0|\x00|ﬀ|١|ไ".split("|")


@pytest.mark.parametrize("match_across_lines", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=250, deadline=None)
@given(
    expressions=st.lists(st.sampled_from(EXPRESSIONS), min_size=1, max_size=7, unique=True),
    text=st.lists(st.sampled_from(EXPRESSIONS + FILLERS), max_size=14).map("".join),
)
@example(expressions=["Orrin", "Orrin Vale", "Vale"], text="Orrin Vales")
def test_matches_equal_a_regular_expression(kind, match_across_lines, expressions, text):
    if match_across_lines and {"Orrin Vale", "Orrin\nVale"} <= set(expressions):
        expressions.remove("Orrin\nVale")  # the same then
    expected = [
        (expressions_at(expressions, match.group(), match_across_lines), *byte_span(text, match))
        for match in regex_of(expressions, match_across_lines).finditer(text)
    ]
    assert find(expressions, text, kind, match_across_lines) == expected


def expressions_at(expressions, matched, match_across_lines):
    def same(a):
        return a.replace("\n", " ") if match_across_lines else a

    (expression,) = [e for e in expressions if same(e) == same(matched)]
    return expression


def byte_span(text, match):
    return len(text[: match.start()].encode()), len(text[: match.end()].encode())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Orrin, (Orrin) “Orrin” Orrin's Orrin’s-Orrin.", ["Orrin"] * 6),
        ("Orrins xOrrin Orrin7 7Orrin _Orrin Orrin_ Orriné éOrrin Orrin\u0301", []),
        ("orrin ORRIN", []),
        ("Orrin Vale", ["Orrin Vale"]),
        ("Orrin Vales", ["Orrin"]),  # the longest breaks a word, the shorter one does not
        ("Orrin  Vale Orrin\nVale", ["Orrin", "Vale", "Orrin", "Vale"]),
        ("在Orrin的 Orrin는", ["Orrin", "Orrin"]),  # no boundary can be seen there
        ("", []),
    ],
)
def test_word_boundaries(text, words):
    assert found_words(["Orrin", "Orrin Vale", "Vale"], text) == words


def test_scripts():
    """Cyrillic, Greek and Arabic write spaces; Chinese, Japanese, Thai and Korean particles do not."""
    assert found_words(["Гарри"], "Гарри, Гаррин, мГарри «Гарри»") == ["Гарри", "Гарри"]
    assert found_words(["Άρης"], "Άρης Άρηςα") == ["Άρης"]
    assert found_words(["هاري"], "هاري وهاري") == ["هاري"]
    assert found_words(["哈利"], "小哈利在哈利家") == ["哈利", "哈利"]
    assert found_words(["해리"], "해리는 우리해리") == ["해리", "해리"]
    assert found_words(["ハリー", "แฮร์รี่"], "ハリーとแฮร์รี่มา") == ["ハリー", "แฮร์รี่"]


def test_expressions_that_end_in_signs_need_no_boundary_there():
    assert found_words(["Mr.", "-cup", "“Q"], "Mr.Quill tall-cups a-cup x“Q “Quill") == ["Mr.", "-cup", "“Q"]


def test_match_across_lines():
    text = "Orrin\nVale Orrin Vale Orrin\n\nVale"
    assert found_words(["Orrin Vale"], text) == ["Orrin Vale"]
    assert found_words(["Orrin Vale"], text, match_across_lines=True) == ["Orrin\nVale", "Orrin Vale"]
    across = found_words(["Orrin\nVale"], text, match_across_lines=True)
    assert across == ["Orrin\nVale", "Orrin Vale"] and found_words(["Orrin\nVale"], text) == ["Orrin\nVale"]


def blocks_of(*blocks):
    data = [block.encode() if isinstance(block, str) else block for block in blocks]
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([0, *map(len, data)])


def test_edges_of_blocks():
    """Blocks on their own: an edge is a boundary, and nothing crosses it. Blocks in one text: neither."""
    matcher = Matcher(
        Dictionary({"Orrin Vale": ["x"], "Orrin": ["x"], "Vale": ["x"]}, {}), tokenizer_of("bpe-json")
    )
    text, starts = blocks_of("xx Orrin", " Vale and", "s Vale", "s in Orrin", "Vale")
    alone = matcher.find(text, starts, 0, len(text), across=False)
    assert [text[i:j].tobytes() for _, i, j in alone] == [b"Orrin", b"Vale", b"Vale", b"Orrin", b"Vale"]
    across = matcher.find(text, starts, 0, len(text), across=True)
    assert [text[i:j].tobytes() for _, i, j in across] == [b"Orrin Vale"]


def test_character_cut_by_the_edge_of_a_block():
    matcher = Matcher(Dictionary({"Orrin": ["x"]}, {}), tokenizer_of("bpe-json"))
    text, starts = blocks_of(b"Orrin\xc3", b"\xa9Orrin", b" Orrin\xff", b"Orrin")
    assert len(matcher.find(text, starts, 0, len(text), across=False)) == 4  # half a character is no word
    across = matcher.find(text, starts, 0, len(text), across=True)
    assert across[:, 1].tolist() == [13, 19]  # and 0xFF, a special token, is never part of one


def test_resume_stop_and_before():
    matcher = Matcher(Dictionary({"a": ["x"], "a b": ["x"], "b": ["y"]}, {}), tokenizer_of("bpe-json"))
    text, starts = blocks_of("a b a b")

    def spans(**options):
        options = {"resume": 0, "stop": len(text), **options}
        return matcher.find(text, starts, across=True, **options)[:, 1:].tolist()

    assert spans() == [[0, 3], [4, 7]]
    assert spans(resume=1) == [[2, 3], [4, 7]]
    assert spans(stop=4) == [[0, 3]] and spans(stop=5) == [[0, 3], [4, 7]]
    for before, is_word in [
        (b"x", True),
        ("é".encode(), True),
        (b" ", False),
        ("中".encode(), False),
    ]:
        got = spans(before=np.frombuffer(before, np.uint8))
        assert got == ([[2, 3], [4, 7]] if is_word else [[0, 3], [4, 7]])


def test_nothing_to_find():
    matcher = Matcher(Dictionary({"Orrin": ["x"]}, {}), tokenizer_of("bpe-json"))
    for text in ("", "none here"):
        data, starts = blocks_of(text)
        found = matcher.find(data, starts, 0, len(data), across=False)
        assert found.shape == (0, 3) and found.dtype == np.int64
    assert (
        len(Matcher(Dictionary({}, {}), tokenizer_of("bpe-json")).find(*blocks_of("x"), 0, 1, across=False))
        == 0
    )


def test_expressions_are_normalised_as_the_tokenizer_does():
    """The sentencepiece space mark in an expression is the space of the token stream."""
    assert found_words(["Orrin▁Vale"], "Orrin Vale", kind="sentencepiece") == ["Orrin Vale"]
    assert found_words(["Orrin▁Vale"], "Orrin Vale", kind="bpe-json") == []


# ------------------------------------------------------------------------------------------------- cleaning


def test_cleaning_rules():
    entries = {
        "Orrin": ["Jon"],
        "Orrin's": ["Jon's"],  # its stem is there
        "Vale": ["Smith"],
        "Orrin Vale": ["Jon Smith"],  # all its words are there
        "Orrin Vale's": ["Jon Smith's"],  # its stem was there, though dropped itself
        "Quill's": ["Pen's"],  # no stem
        "the Orrin": ["the Jon"],  # one word is not there
        "Orrin Orrin": ["Jon Jon"],
        "s's": ["x"],
    }
    kept, dropped = clean(entries)
    assert list(kept) == ["Orrin", "Vale", "Quill's", "the Orrin", "s's"]
    assert all(kept[key] == entries[key] for key in kept)
    assert set(dropped) == set(entries) - set(kept)
    assert dropped["Orrin's"] == "possessive of 'Orrin'"
    assert dropped["Orrin Vale"] == dropped["Orrin Orrin"] == "each of its words is an expression of its own"


def test_loading():
    dictionary = load_dictionary({" Orrin ": " Jon", "Vale": ["Smith", "Mill ", "Smith"], "Orrin Vale": "x"})
    assert dictionary.entries == {"Orrin": ["Jon"], "Vale": ["Smith", "Mill"]}
    assert list(dictionary.dropped) == ["Orrin Vale"]
    assert dictionary.expressions == ["Orrin", "Vale"] and dictionary.values == ["Jon", "Smith", "Mill"]
    assert dictionary.value_offsets.tolist() == [0, 1, 3] and dictionary.value_offsets.dtype == np.int64
    assert load_dictionary(dictionary) is dictionary


def test_loading_a_file(tmp_path):
    path = tmp_path / "anchors.json"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"Élise": ["Ann"], "Orrin": "Jon"}, ensure_ascii=False).encode()
    )
    for source in (path, str(path)):
        dictionary = load_dictionary(source)
        assert dictionary.entries == {"Élise": ["Ann"], "Orrin": ["Jon"]} and dictionary.source == str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: not valid JSON"),
        (b'{\n"a": "b",\n}', "line [23]: not valid JSON"),
        (b'["a"]', "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'\xef\xbb\xbf{"a": "\xff"}', "byte 10 is not UTF-8"),
        (b"{}", "the dictionary has no entries"),
        (b'{"a": "x", " ": "y"}', "entry 2: the expression is empty"),
        (b'{"a": "x", "b": "x", "a": "y"}', "entry 3: the expression 'a' is there twice"),
        (b'{"a": "x", "a ": "y"}', "entry 2: the expression 'a' is there twice"),
        (b'{"a": []}', "'a': no counterpart"),
        (b'{"a": null}', "'a': no counterpart"),
        (b'{"a": {"b": "c"}}', "'a': no counterpart"),
        (b'{"a": ["b", " "]}', "'a': a counterpart is empty or not a string"),
        (b'{"a": ["b", 3]}', "'a': a counterpart is empty or not a string"),
        (b'{"a": ["b", " a"]}', "'a': the counterpart equals the expression"),
    ],
)
def test_mistakes_in_a_file(content, message, tmp_path):
    path = tmp_path / "anchors.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{message}"):
        load_dictionary(path)


def test_mistakes_in_a_mapping(tmp_path):
    for entries in ({3: "x"}, {"a": ("b", "a")}, {"a": 3}, {}):
        with pytest.raises(UserError, match="^anchors"):
            load_dictionary(entries)
    with pytest.raises(UserError, match="no.json: cannot read the dictionary"):
        load_dictionary(tmp_path / "no.json")


def test_nearest_words():
    dictionary = load_dictionary({"Orrin": "Jon", "Glimmerhall": "school", "Vale": "Smith"})
    text = "Then, “orrin” went to Glimerhall. (Valley) and so on and on, Glimerhall!"
    pairs = nearest_words(dictionary, text)
    assert pairs[0] == ("Glimmerhall", "Glimerhall") and len(pairs) == 3
    assert dict(pairs)["Vale"] == "Valley"
    assert len(nearest_words(dictionary, text, n=1)) == 1
    assert nearest_words(dictionary, "") == []
