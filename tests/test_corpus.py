"""Documents to blocks: nothing lost, nothing changed at the seams, mistakes named."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import KINDS, spelled, tokenizer_of
from tokenizer_fixtures import TRAINING_TEXT

from whp_fast import corpus
from whp_fast.corpus import Blocks, TokenWriter, corpus_files, read_documents, tokenise_corpus
from whp_fast.errors import UserError
from whp_fast.tokens import load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def documents(path, **options):
    return ["".join(parts) for parts in read_documents(path, **options)]


def tokenise(paths, tokenizer, folder, **options):
    """(summary, tokens, starts of the documents)."""
    with TokenWriter(folder / "tokens.npy", tokenizer.vocab_size) as writer:
        summary = tokenise_corpus(list(paths), tokenizer, writer, **options)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    assert summary["tokens"] == len(tokens)
    return summary, tokens, writer.document_starts


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------------------------------- blocks


@given(n=st.integers(0, 60), context=st.integers(1, 15), drop_tail=st.booleans())
def test_blocks(n, context, drop_tail):
    tokens = np.arange(n)
    blocks = Blocks.of(tokens, context, drop_tail=drop_tail)
    starts = range(0, n - context, context) if drop_tail else range(0, n, context)
    expected = [tokens[start : start + context].tolist() for start in starts]
    assert [blocks[i].tolist() for i in range(len(blocks))] == expected
    assert blocks.n_tokens == sum(map(len, expected))
    offsets = blocks.offsets()
    assert offsets.dtype == np.int64
    assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    for first in range(len(blocks)):
        assert blocks.offsets(first, first + 1).tolist() == offsets[first : first + 2].tolist()
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks[index]


def test_reference_drops_even_a_full_last_block():
    assert len(Blocks.of(np.arange(1024), 512)) == 2
    assert len(Blocks.of(np.arange(1024), 512, drop_tail=True)) == 1
    assert len(Blocks.of(np.arange(1025), 512, drop_tail=True)) == 2
    assert len(Blocks.of(np.arange(512), 512, drop_tail=True)) == 0


# ----------------------------------------------------------------------------------------------------- files


def test_files_of_a_corpus(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    names = ["b/2.txt", "b/10.jsonl", "b/c/1.txt", "b/notes.md", "z.txt", "a.jsonl"]
    paths = {name: written(tmp_path, name, "x") for name in names}
    given_order = [tmp_path / "z.txt", str(tmp_path / "b"), tmp_path / "a.jsonl"]
    found = corpus_files(given_order)
    assert found == [paths[name] for name in ("z.txt", "b/10.jsonl", "b/2.txt", "b/c/1.txt", "a.jsonl")]


def test_files_that_do_not_fit(tmp_path):
    (tmp_path / "empty").mkdir()
    for paths, message in [
        ([], "data.corpus: no path given"),
        ([tmp_path / "no.txt"], "no.txt: corpus file not found"),
        ([written(tmp_path, "book.pdf", "x")], "book.pdf: a corpus file must end in .txt or .jsonl"),
        ([tmp_path / "empty"], "empty: the folder holds no .txt or .jsonl file"),
    ]:
        with pytest.raises(UserError, match=message):
            corpus_files(paths)


# ------------------------------------------------------------------------------------------------- documents


def test_text_file_is_one_document(tmp_path):
    path = written(tmp_path, "a.txt", b"\xef\xbb\xbfOrrin\r\nVale\rand\n\r\n\xc3\xa9\n")
    assert documents(path) == ["Orrin\nVale\nand\n\né\n"]


def test_lines_of_jsonl_are_documents(tmp_path):
    records = [
        {"text": "one\r\ntwo\rthree\u2028four\x85five"},
        {"text": "", "id": 3},
        {"text": "🦉", "body": "other"},
    ]
    lines = [json.dumps(record, ensure_ascii=k % 2 == 0) for k, record in enumerate(records)]
    lines.insert(1, "   ")
    for ending in ("\n", "\r\n"):
        for tail in ("", ending):
            path = written(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + (ending.join(lines) + tail).encode())
            assert documents(path) == ["one\ntwo\nthree\u2028four\x85five", "", "🦉"]
    path = written(tmp_path, "b.jsonl", '{"body": "b", "text": 3}')
    assert documents(path, text_field="body") == ["b"]


def test_mistakes_in_jsonl(tmp_path):
    good = '{"text": "x"}\n\n'
    for line, message in [
        ("{", "a.jsonl, line 3: not a JSON object"),
        ('"text"', "a.jsonl, line 3: not a JSON object"),
        ('{"body": "x"}', "a.jsonl, line 3: no text in the field 'text'"),
        ('{"text": ["x"]}', "a.jsonl, line 3: no text in the field 'text'"),
        ('{"text": "\\ud83e and more"}', "a.jsonl, line 3: half of a surrogate pair"),
    ]:
        for tail in ("", "\n" + good):
            with pytest.raises(UserError, match=message):
                documents(written(tmp_path, "a.jsonl", good + line + tail))
    pair = written(tmp_path, "a.jsonl", '{"text": "\\ud83e\\udd89 \\ud83e!"}')
    assert documents(pair, errors="replace") == ["🦉 \ufffd!"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("before", [0, 5, 16, 17, 35])
def test_byte_that_is_not_utf8(before, mark, tmp_path, monkeypatch):
    """Its place is counted in bytes of the file, mark and earlier reads included."""
    monkeypatch.setattr(corpus, "_READ_BYTES", 16)
    data = mark + "é".encode() * (before // 2) + b"a" * (before % 2)
    path = written(tmp_path, "a.txt", data + b"\xc3(more")
    with pytest.raises(UserError, match=rf"a.txt: byte {len(data)} \(0xc3\) is not UTF-8"):
        documents(path)
    assert documents(path, errors="replace") == [data[len(mark) :].decode() + "\ufffd(more"]


def test_file_that_ends_inside_a_character(tmp_path):
    path = written(tmp_path, "a.txt", b"ab\xf0\x9f")
    with pytest.raises(UserError, match="byte 2 "):
        documents(path)
    assert documents(path, errors="replace") == ["ab\ufffd"]


@settings(max_examples=60)
@given(
    text=st.text(st.sampled_from("a\r\n🦉é\ufeff"), max_size=30),
    read=st.integers(1, 7),
)
def test_reads_that_cut_anything(text, read, tmp_path_factory):
    """Characters, line ends and the mark may lie across the boundary of a read."""
    folder = tmp_path_factory.mktemp("reads")
    path = written(folder, "a.txt", "\ufeff" + text)
    record = json.dumps({"text": text}, ensure_ascii=False) + "\r\n"
    lines = written(folder, "a.jsonl", "\ufeff" + record * 2)
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_READ_BYTES", read)
        assert documents(path) == [expected]
        assert documents(lines) == [expected] * 2


def test_character_and_line_end_across_a_mebibyte(tmp_path):
    for before in (1, 2, 3):
        head = "a" * ((1 << 20) - before)
        for middle in ("🦉", "\r\n\n", "é", "中"):
            path = written(tmp_path, "a.txt", head + middle + "end")
            assert documents(path) == [head + middle.replace("\r\n", "\n") + "end"]


# ---------------------------------------------------------------------------------------------------- tokens


def paragraphs(rng, n):
    """Lines, blank lines and lines without a letter in front, some of them long."""
    sentences = TRAINING_TEXT.splitlines()
    endings = ["\n", "\n", "\n\n", "\n\n\n", "\n \n", " \n", " ", "\n7", "\n—", "\n“", "\n\t", "\né"]
    return "".join(str(rng.choice(sentences)) + str(rng.choice(endings)) for _ in range(n))


@pytest.mark.parametrize("part", [1, 50, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_the_tokens_of_the_whole(kind, part, tmp_path, monkeypatch):
    """The stream equals the whole text's tokens behind a BOS (or EOS), whatever the size of the parts."""
    monkeypatch.setattr(corpus, "_PART_CHARACTERS", part)
    monkeypatch.setattr(corpus, "_READ_BYTES", 777)
    monkeypatch.setattr(corpus, "_BATCH_PARTS", 3)
    tokenizer = tokenizer_of(kind)
    batches = []
    inside = type(tokenizer).encode_inside_batch
    monkeypatch.setattr(
        type(tokenizer), "encode_inside_batch", lambda self, t: batches.append(len(t)) or inside(self, t)
    )
    texts = [paragraphs(np.random.default_rng(seed), 40) for seed in range(2)]
    paths = [written(tmp_path, f"{k}.txt", text) for k, text in enumerate(texts)]
    counted = []
    summary, tokens, starts = tokenise(paths, tokenizer, tmp_path, progress=counted.append)
    head = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    expected = [[head, *tokenizer.encode(text)] for text in texts]
    assert tokens.tolist() == expected[0] + expected[1]
    assert starts == [0, len(expected[0])]
    assert summary["documents"] == 2 and summary["characters"] == sum(map(len, texts))
    assert sum(counted) == sum(len(text.encode()) for text in texts)
    assert sum(batches) > 3  # the text was cut indeed


@pytest.mark.skipif(not (SHARED / "llama2_tokenizer.model").is_file(), reason="no Llama 2 tokenizer here")
def test_book_with_the_tokenizer_of_llama_2(tmp_path):
    book = SHARED / "alice_in_wonderland.txt"
    if not book.is_file():
        pytest.skip("no book here")
    tokenizer = load_tokenizer(SHARED / "llama2_tokenizer.model")
    text = book.read_text(encoding="utf-8-sig")
    _, tokens, starts = tokenise([book], tokenizer, tmp_path)
    assert tokens.dtype == np.uint16 and starts == [0]
    assert tokens.tolist() == [1, *tokenizer.encode(text)]
    assert spelled(tokenizer, tokens[1:].tolist()) == b" " + text.encode()


def test_documents_of_jsonl_each_behind_bos(tmp_path):
    tokenizer = tokenizer_of("sentencepiece")
    texts = ["Orrin Vale", "", "</s> is text", "the hall"]
    path = written(tmp_path, "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    summary, tokens, starts = tokenise([path], tokenizer, tmp_path)
    kept = [[1, *tokenizer.encode(text)] for text in texts if text]
    assert tokens.tolist() == sum(kept, [])
    assert starts == [0, len(kept[0]), len(kept[0]) + len(kept[1])] and summary["documents"] == 3
    assert tokens.tolist().count(1) == 3 and 2 not in tokens


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_token_file(vocab_size, dtype, tmp_path):
    last = vocab_size - 1
    with TokenWriter(tmp_path / "t.npy", vocab_size) as writer:
        for part in ([1, last], [], np.array([5], np.int64)):
            writer.append(part)
    tokens = np.load(tmp_path / "t.npy", mmap_mode="r")
    assert isinstance(tokens, np.memmap) and tokens.dtype == dtype and tokens.tolist() == [1, last, 5]


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe-json", "gpt2"])
def test_chunks_of_the_reference(kind, tmp_path, monkeypatch):
    """10,000 characters each, cut anywhere, each tokenised on its own behind a BOS."""
    monkeypatch.setattr(corpus, "_READ_BYTES", 7_001)
    tokenizer = tokenizer_of(kind)
    text = ("é" + TRAINING_TEXT * 20)[:20_003]
    exact = text[:10_000]
    paths = [written(tmp_path, "0.txt", text), written(tmp_path, "1.txt", exact)]
    summary, tokens, starts = tokenise(paths, tokenizer, tmp_path, reference_chunks=True)
    head = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    chunks = [text[:10_000], text[10_000:20_000], text[20_000:], exact]
    encoded = [[head, *tokenizer.encode(chunk)] for chunk in chunks]
    assert tokens.tolist() == sum(encoded, [])
    assert starts == [0, sum(map(len, encoded[:3]))]
    assert summary["documents"] == 2 and summary["characters"] == 30_003


@pytest.mark.parametrize("content", ["", "\ufeff", " \n\n"])
def test_corpus_without_text(content, tmp_path):
    path = written(tmp_path, "a.txt", content)
    with pytest.raises(UserError, match="data.corpus: no text found in .*a.txt"):
        tokenise([path], tokenizer_of("sentencepiece"), tmp_path)


def test_memory_does_not_grow_with_a_document(tmp_path, monkeypatch):
    """At most one read and one batch of parts are held: no part passes on more than it must."""
    tokenizer = tokenizer_of("sentencepiece")
    assert tokenizer.splits_after_newline  # found out, and remembered, before its encoder is replaced
    sizes = []
    monkeypatch.setattr(
        type(tokenizer),
        "encode_inside_batch",
        lambda self, t: sizes.append(sum(map(len, t))) or [[0] for _ in t],
    )
    path = written(tmp_path, "a.txt", TRAINING_TEXT * 2500)
    assert path.stat().st_size > 2 << 20
    tokenise([path], tokenizer, tmp_path)
    assert max(sizes) < 32 * 20_000 and len(sizes) > 4


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe-json"])
def test_a_text_without_newlines_is_cut_before_spaces(kind, tmp_path, monkeypatch):
    """Verse, or one long line: parts stay small, and the tokens are those of the whole."""
    monkeypatch.setattr(corpus, "_NEWLINE_WITHIN", 300)
    monkeypatch.setattr(corpus, "_PART_CHARACTERS", 100)
    tokenizer = tokenizer_of(kind)
    assert tokenizer.splits_before_space
    text = " ".join(paragraphs(np.random.default_rng(3), 60).split()) + "\n  and  two  spaces 7 times, é à la"
    parts = list(corpus._parts(iter([text[:5000], text[5000:]]), tokenizer))
    assert len(parts) > 10 and max(map(len, parts)) < 700 and "".join(parts) == text
    encoded = tokenizer.encode(parts[0]) + [i for part in parts[1:] for i in tokenizer.encode_inside(part)]
    assert encoded == tokenizer.encode(text)
