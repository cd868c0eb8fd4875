"""Alignment of blocks with their translation: what it means, restated on bytes, and that chunks do not show.

A block's expected translation is made from the matches in the text (`brute_force.find_matches`), cut at the
edges of blocks where the blocks follow each other.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import brute_force
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokens import spelled, tokenizer_of
from tokenizer_fixtures import TRAINING_TEXT, spelled_byte_level_folder

from whp_fast.alignment import Aligner, Alignment, load_alignment, save_alignment
from whp_fast.anchors import load_dictionary
from whp_fast.corpus import Blocks
from whp_fast.reasons import INSIDE, NO_BOUNDARY, REPEATED, TRAINED
from whp_fast.reference_rules import ReferenceAligner
from whp_fast.tokens import load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
KINDS = ("sentencepiece", "bpe-json")
FIELDS = [field.name for field in dataclasses.fields(Alignment)]
ANCHORS = {
    "Orrin": ["Paul", "Jon", "Mr. X"],
    "Orrin Vale": "Paul Smith",
    "Glimmerhall": ["the old school", "é"],
    "Mr. Quill": "X",
    "hall": "🦉",
    "wand of ash": ["a stick", "cup"],
    "ash": "tree",
    "tall-": "old ",
    "Zoë": "Ann",
    "(": "—",
    "🦉—": "a",
}
WORDS = [*ANCHORS, *"Vale ash wand of Orriny xhall the said é 🦉 — cup tall-ash (Orrin)".split()]
SEPARATORS = [" "] * 6 + ["", "\n", "  ", ", ", "'s ", "—", "("]
SETTINGS = dict(max_examples=120, deadline=None)


def texts():
    words = st.tuples(st.sampled_from(WORDS), st.sampled_from(SEPARATORS)).map("".join)
    return st.lists(words, min_size=1, max_size=14).map("".join)


@functools.cache
def aligner_of(kind, seed=0):
    return Aligner(load_dictionary(ANCHORS), tokenizer_of(kind), seed=seed)


def stream_of(tokenizer, text, context):
    """Blocks of a document, with a BOS also in its middle."""
    half = len(text) // 2
    ids = [t for part in (text[:half], text[half:]) for t in [tokenizer.bos_id, *tokenizer.encode(part)]]
    return Blocks.of(np.array(ids, np.uint16), context)


def joined(parts) -> Alignment:
    """One alignment of the parts of a stream, put together here (not by `save_alignment`)."""
    parts = [part for _, part in parts]
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in FIELDS[:-1]}
    for name, array in (
        ("block_offsets", "index_map"),
        ("translated_offsets", "translated"),
        ("used_offsets", "used_at"),
    ):
        base = np.cumsum([0, *(len(getattr(p, array)) for p in parts)])
        arrays[name] = np.concatenate([[0], *(getattr(p, name)[1:] + b for p, b in zip(parts, base))])
    return Alignment(**arrays, matches=sum(p.matches for p in parts))


def assert_equal(one: Alignment, other: Alignment):
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype and np.array_equal(a, b), name


# ------------------------------------------------------------------------------------- what an alignment is


def expected_parts(aligner, blocks, contiguous):
    """For each block its (expression, first byte, end byte, goes on) in bytes of the block."""
    data = [spelled(aligner.tokenizer, block) for block in blocks]
    keys = aligner.dictionary.expressions
    if not contiguous:
        return [[(key, i, j, False) for i, j, key in brute_force.find_matches(d, keys)] for d in data]
    matches = brute_force.find_matches(b"".join(data), keys)
    result, begin = [], 0
    for block in data:
        end, parts = begin + len(block), []
        for i, j, key in matches:
            low, high = max(i, begin), min(j, end)
            if low < high:
                if i < begin and high - low > 1 and block[low - begin : low - begin + 1] == b" ":
                    low += 1  # the counterpart keeps the space
                parts.append((key, low - begin, high - begin, j > end))
        result.append(parts)
        begin = end
    return result


def check_alignment(aligner, blocks, alignment, contiguous):
    """Every field of the alignment of all blocks."""
    tokenizer, dictionary = aligner.tokenizer, aligner.dictionary
    occurrences = dict.fromkeys(dictionary.expressions, 0)
    expected = expected_parts(aligner, blocks, contiguous)
    assert alignment.block_offsets.tolist() == np.cumsum([0, *map(len, blocks)]).tolist()
    goes_on = False
    for number, (block, parts) in enumerate(zip(blocks, expected, strict=True)):
        one = alignment.blocks(number, number + 1)
        translated = one.translated.tolist()
        ends = list(itertools.accumulate(len(tokenizer.token_bytes(t)) for t in block))
        new_ends = list(itertools.accumulate(len(tokenizer.token_bytes(t)) for t in translated))

        # the text is the original with counterparts in the place of expressions
        values = [dictionary.values[v] for v in one.used_value]
        assert len(values) == len(parts)
        original, new_text, cursor, starts = spelled(tokenizer, block), b"", 0, []
        for (key, low, high, _), value in zip(parts, values):
            assert value in dictionary.entries[key]
            new_text += original[cursor:low]
            starts.append(len(new_text))
            new_text += value.encode()
            cursor = high
        assert spelled(tokenizer, translated) == new_text + original[cursor:]
        assert one.used_at.tolist() == [int(np.searchsorted(new_ends, s, side="right")) for s in starts]
        if not parts:
            assert translated == list(block)  # token for token

        # points correspond when the translation maps one boundary to the other
        index_map, reason = [], []
        for end in ends:
            inside = any(low < end < high or (end == high and goes_on) for _, low, high, goes_on in parts)
            shift = sum(len(v.encode()) - (h - i) for (_, i, h, _), v in zip(parts, values) if h <= end)
            found = not inside and end + shift in new_ends
            index_map.append(new_ends.index(end + shift) if found else -1)
            reason.append(TRAINED if found else INSIDE if inside else NO_BOUNDARY)
        seen = set()
        for key, low, _, _ in parts:
            before = int(np.searchsorted(ends, low, side="right")) - 1
            if key in seen and before >= 0 and index_map[before] >= 0:
                index_map[before], reason[before] = -1, REPEATED
            seen.add(key)
        assert one.index_map.tolist() == index_map
        assert one.reason.tolist() == reason
        mapped = [i for i in index_map if i >= 0]
        assert mapped == sorted(set(mapped))  # strictly increasing
        for k, (key, low, _, _) in enumerate(parts):
            began_before = contiguous and k == 0 and goes_on and low <= 1
            occurrences[key] += not began_before
        goes_on = bool(parts) and parts[-1][3]
    assert alignment.matches.tolist() == list(occurrences.values())


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(**SETTINGS)
@given(text=texts(), context=st.integers(3, 20))
@example(text="Orrin Vale Orrin Vale's Glimmerhall 🦉—Zoë Glimmerhall", context=3)
def test_alignment_restated(kind, contiguous, text, context):
    aligner = aligner_of(kind)
    blocks = stream_of(aligner.tokenizer, text, context)
    rows = [blocks[i].tolist() for i in range(len(blocks))]
    check_alignment(aligner, rows, aligner.align(rows, contiguous=contiguous), contiguous)


@pytest.mark.parametrize("kind", KINDS)
@settings(**SETTINGS)
@given(text=texts(), context=st.integers(3, 20), blocks_per_chunk=st.integers(1, 4))
@example(text="Glimmerhall hall xhall Orrin Vale Orrin Vale hall", context=3, blocks_per_chunk=1)
@example(text="a wand of ash, the wand of ash and a wand of ash", context=3, blocks_per_chunk=1)
def test_chunks_do_not_show(kind, text, context, blocks_per_chunk):
    aligner = aligner_of(kind)
    blocks = stream_of(aligner.tokenizer, text, context)
    parts = list(aligner.align_stream(blocks, chunk_tokens=context * blocks_per_chunk + context - 1))
    assert [first for first, _ in parts] == list(range(0, len(blocks), blocks_per_chunk))
    assert max(len(part) for _, part in parts) <= blocks_per_chunk
    whole = list(aligner.align_stream(blocks))
    assert len(whole) == 1
    assert_equal(joined(parts), whole[0][1])
    rows = [blocks[i] for i in range(len(blocks))]
    assert_equal(aligner.align(rows, contiguous=True), whole[0][1])


@pytest.mark.skipif(not (SHARED / "llama2_tokenizer.model").is_file(), reason="no Llama 2 tokenizer here")
def test_book_with_the_tokenizer_of_llama_2():
    if not (SHARED / "alice_in_wonderland.txt").is_file():
        pytest.skip("no book here")
    tokenizer = load_tokenizer(SHARED / "llama2_tokenizer.model")
    anchors = {"Alice": ["Ann", "Josephine"], "White Rabbit": "Grey Hare", "Mock Turtle": ["False Tortoise"]}
    aligner = Aligner(load_dictionary({**anchors, "Queen": "Duke", "Dormouse": "Vole"}), tokenizer)
    text = (SHARED / "alice_in_wonderland.txt").read_text(encoding="utf-8-sig")
    text = text[len(text) // 2 :][:20_000]
    blocks = Blocks.of(np.array([1, *tokenizer.encode(text)], np.uint16), 23)
    parts = joined(aligner.align_stream(blocks, chunk_tokens=70))
    assert parts.matches.sum() > 100
    check_alignment(aligner, [blocks[i].tolist() for i in range(len(blocks))], parts, contiguous=True)


# ------------------------------------------------------------------------------------------ edges of blocks


@functools.cache
def worked_tokenizer():
    words = " At| Glim|mer|hall| Orrin| said| I| am|school| school| Paul| Smith|Smith".split("|")
    return load_tokenizer(spelled_byte_level_folder(words))


def align_words(blocks, anchors, **options):
    """Alignment of blocks given as lists of token texts; the translated blocks as texts too."""
    tokenizer = worked_tokenizer()
    ids = {tokenizer.token_bytes(t).decode("latin-1"): t for t in range(tokenizer.vocab_size)}
    aligner = Aligner(load_dictionary(anchors), tokenizer)
    alignment = aligner.align([[ids[word] for word in block] for block in blocks], **options)
    words = [tokenizer.token_bytes(t).decode() for t in alignment.translated]
    offsets = alignment.translated_offsets
    return alignment, [words[i:j] for i, j in zip(offsets, offsets[1:])]


def test_tail_of_an_expression_at_the_start_of_a_block():
    blocks = [[" At", " Glim"], ["mer", "hall", " said", " Glim", "mer", "hall", "."]]
    alignment, translated = align_words(blocks, {"Glimmerhall": "school"}, contiguous=True)
    assert translated == [[" At", " school"], ["school", " said", " school", "."]]
    head, tail = alignment.blocks(0, 1), alignment.blocks(1, 2)
    # The head's only token is no end of an expression: what follows it is not taught.
    assert head.index_map.tolist() == [0, -1] and head.reason.tolist() == [TRAINED, INSIDE]
    # The tail's inner token is not trained, its last one reads the counterpart's last, and it counts as an
    # occurrence: the token before the second one is not trained.
    assert tail.index_map.tolist() == [-1, 0, -1, -1, -1, 2, 3]
    assert tail.reason.tolist() == [INSIDE, TRAINED, REPEATED, INSIDE, INSIDE, TRAINED, TRAINED]
    assert tail.used_at.tolist() == [0, 2] and head.used_at.tolist() == [1]
    assert alignment.matches.tolist() == [2]  # the one cut in two counts once


def test_tail_keeps_its_space_and_middle_fills_its_block():
    blocks = [[" I", " Orrin"], [" Glim", "mer"], ["hall", " am"]]
    anchors = {"Orrin Glimmerhall": "Paul Smith"}
    alignment, translated = align_words(blocks, anchors, contiguous=True)
    assert translated[0] == [" I", " Paul", " Smith"]
    assert translated[1] == [" Paul", " Smith"]
    assert "".join(translated[2]) == "Paul Smith am" and translated[2][-2:] == [" Smith", " am"]
    last = len(translated[2]) - 1
    assert alignment.index_map.tolist() == [0, -1, -1, -1, last - 1, last]
    assert alignment.matches.tolist() == [1]


def test_blocks_on_their_own_know_no_neighbours():
    blocks = [[" At", " Glim"], ["mer", "hall", " said"]]
    alignment, translated = align_words(blocks, {"Glimmerhall": "school"})
    assert translated == blocks and alignment.index_map.tolist() == [0, 1, 0, 1, 2]
    assert len(alignment.used_at) == 0 and not alignment.reason.any()
    alignment, translated = align_words(blocks, {"hall": "school"})  # "mer" stands before
    assert translated == blocks
    blocks = [[" At", " Glim", "mer"], ["hall", " said"]]
    assert align_words(blocks, {"hall": "school"})[1][1] == ["school", " said"]  # the edge is a boundary
    assert align_words(blocks, {"hall": "school"}, contiguous=True)[1] == blocks


def test_chunk_that_begins_inside_a_word():
    """The character before the chunk decides, though it lies in the chunk before."""
    tokenizer = worked_tokenizer()
    ids = {tokenizer.token_bytes(t): t for t in range(tokenizer.vocab_size)}
    aligner = Aligner(load_dictionary({"hall": "school"}), tokenizer)
    for before, translated in [(b"mer", b"hall"), (b"\n", b"school"), (b"\xff", b"school")]:
        blocks = Blocks.of(np.array([ids[b" At"], ids[before], ids[b"hall"], ids[b"."]]), 2)
        parts = [part for _, part in aligner.align_stream(blocks, chunk_tokens=2)]
        assert spelled(tokenizer, parts[1].translated) == translated + b"."
    blocks = Blocks.of(np.array([ids[b"\xc3"], ids[b"\xa9"], ids[b"hall"], ids[b"."]]), 2)  # é
    assert [part.used_at.size for _, part in aligner.align_stream(blocks, chunk_tokens=2)] == [0, 0]


def test_tokens_that_touch_no_expression_stay():
    """Even a tokenisation that the tokenizer would not choose itself."""
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        shreds = [t for c in "the old hall" for t in tokenizer.encode_inside(c)]
        assert shreds != tokenizer.encode_inside("the old hall")
        aligner = Aligner(load_dictionary({"hall": "cup"}), tokenizer)
        alignment = aligner.align([shreds, shreds[:-4]])
        assert alignment.translated[: len(shreds) - 4].tolist() == shreds[:-4]
        assert alignment.blocks(1, 2).translated.tolist() == shreds[:-4]
        assert alignment.blocks(1, 2).index_map.tolist() == list(range(len(shreds) - 4))


def test_no_blocks():
    alignment = aligner_of("bpe-json").align([])
    assert len(alignment) == 0 and len(alignment.translated) == 0 and not alignment.matches.any()
    empty = Blocks.of(np.zeros(0, np.uint16), 8)
    assert list(aligner_of("bpe-json").align_stream(empty)) == []


# ---------------------------------------------------------------------------------------------------- draws


def draws_of(seed=0, n_blocks=300, first_block=0, kind="sentencepiece", values=("Paul", "Jon", "Ann")):
    """For each block the numbers of the counterparts drawn in it."""
    tokenizer = tokenizer_of(kind)
    block = tokenizer.encode("Orrin, (Orrin) and Orrin\nOrrin's")
    aligner = Aligner(load_dictionary({"Orrin": list(values), "and": ["x", "y", "z"]}), tokenizer, seed=seed)
    alignment = aligner.align([block] * n_blocks, first_block=first_block)
    pairs = zip(alignment.used_offsets, alignment.used_offsets[1:])
    drawn = [alignment.used_value[i:j] for i, j in pairs]
    assert all(len(values) == 5 for values in drawn)
    return [values[values < 3].tolist() for values in drawn], [int(v.max()) for v in drawn]


@pytest.mark.parametrize("kind", KINDS)
def test_one_counterpart_for_all_spellings_in_a_block(kind):
    drawn, _ = draws_of(kind=kind)
    assert all(len(values) == 4 and len(set(values)) == 1 for values in drawn)
    counts = np.bincount([values[0] for values in drawn])
    assert len(counts) == 3 and all(60 < count < 140 for count in counts)  # 300 blocks, 5 deviations


def test_draws_depend_on_seed_block_and_expression_alone():
    first, other = draws_of()
    assert draws_of() == (first, other)
    assert draws_of(first_block=120, n_blocks=50)[0] == first[120:170]
    assert draws_of(seed=1)[0] != first
    agreement = np.mean([a == b for a, b in zip(draws_of(seed=1)[0], first)])
    assert 0.2 < agreement < 0.47  # seeds are independent: one in three
    one = np.array([values[0] for values in first])
    assert abs(np.corrcoef(one == 0, np.array(other) == 3)[0, 1]) < 0.2  # expressions, too


def test_stream_draws_as_single_blocks_do():
    aligner = aligner_of("bpe-json", seed=7)
    tokenizer = aligner.tokenizer
    block = tokenizer.encode(" Orrin said Orrin")
    blocks = Blocks.of(np.array(block * 40, np.uint16), len(block))
    for first, part in aligner.align_stream(blocks, chunk_tokens=3 * len(block)):
        alone = aligner.align([block] * len(part), first_block=first, contiguous=True)
        assert_equal(part, alone)


# ------------------------------------------------------------------------------------------- files and chunks


def test_saved_alignment(tmp_path):
    aligner = aligner_of("sentencepiece")
    blocks = stream_of(aligner.tokenizer, TRAINING_TEXT, 16)
    whole = joined(aligner.align_stream(blocks))
    done = []
    parts = [part for _, part in aligner.align_stream(blocks, chunk_tokens=50)]
    assert len(parts) > 5
    matches = save_alignment(tmp_path, iter(parts), done.append)
    loaded = load_alignment(tmp_path)
    assert_equal(loaded, whole)
    assert np.array_equal(matches, whole.matches) and whole.matches.sum() > 10
    assert sum(done) == len(blocks.tokens) and len(done) == len(parts)
    assert all(isinstance(getattr(loaded, name), np.memmap) for name in FIELDS)
    for first, last in [(0, len(loaded)), (0, 1), (3, 7), (5, 5)]:
        part = loaded.blocks(first, last)
        assert len(part) == last - first
        rows = [blocks[i] for i in range(first, last)]
        assert part.block_offsets.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
        for number in range(first, last):
            one, same = part.blocks(number - first, number - first + 1), whole.blocks(number, number + 1)
            assert_equal(one, same)


def test_saved_alignment_without_expressions(tmp_path):
    aligner = Aligner(load_dictionary({"nowhere": "x"}), tokenizer_of("bpe-json"))
    blocks = stream_of(aligner.tokenizer, TRAINING_TEXT, 16)
    save_alignment(tmp_path, (part for _, part in aligner.align_stream(blocks, 64)))
    loaded = load_alignment(tmp_path)
    assert np.array_equal(loaded.translated, blocks.tokens) and len(loaded.used_at) == 0
    assert loaded.matches.tolist() == [0] and not loaded.reason.any()


def test_a_chunk_reads_no_more_than_itself_and_a_look_ahead(monkeypatch):
    """Memory does not grow with the corpus."""
    sizes = []
    align_chunk = Aligner._align_chunk
    monkeypatch.setattr(
        Aligner,
        "_align_chunk",
        lambda self, tokens, *rest: sizes.append(len(tokens)) or align_chunk(self, tokens, *rest),
    )
    aligner = aligner_of("bpe-json")
    blocks = stream_of(aligner.tokenizer, TRAINING_TEXT * 3, 16)
    for _ in aligner.align_stream(blocks, chunk_tokens=64):
        pass
    longest = max(map(len, (key.encode() for key in ANCHORS)))
    assert max(sizes) <= 64 + longest + 4 + 16 and len(sizes) > 10


# ---------------------------------------------------------------------------------------- the reference rules


@pytest.mark.parametrize("kind", KINDS)
def test_stream_under_the_reference_rules(kind):
    aligner = ReferenceAligner(load_dictionary(ANCHORS), tokenizer_of(kind), seed=3)
    blocks = stream_of(aligner.tokenizer, TRAINING_TEXT, 16)
    rows = [blocks[i] for i in range(len(blocks))]
    whole = aligner.align(rows)
    assert whole.matches.sum() > 5 and len(whole) == len(blocks)
    assert_equal(joined(aligner.align_stream(blocks, chunk_tokens=50)), whole)
    assert_equal(aligner.align(rows, contiguous=True), whole)
    assert_equal(
        aligner.align(rows[5:9], first_block=5),
        dataclasses.replace(whole.blocks(5, 9), matches=aligner.align(rows[5:9], first_block=5).matches),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens(kind):
    tokenizer = tokenizer_of(kind)
    dictionary = load_dictionary(ANCHORS)
    expected = [[v[0] for v in tokenizer.variants(value)] for value in dictionary.values]
    for aligner in (Aligner(dictionary, tokenizer), ReferenceAligner(dictionary, tokenizer)):
        first = aligner.first_tokens()
        assert first.dtype == np.int32 and first.tolist() == expected
