"""Every kind of tokenizer spells its text byte for byte, and may be cut where `splits_*` says."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import TRAINING_TEXT, byte_level_folder, folder_of, sentencepiece_folder
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from whp_fast.errors import UserError
from whp_fast.tokens import SPECIAL_BYTE, JsonTokenizer, Tokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
KINDS = ("sentencepiece", "bpe-json", "converted", "metaspace", "gpt2", "smollm", "prefix-space")
PREFIXED = ("sentencepiece", "converted", "metaspace", "prefix-space")  # a text begins with a space of theirs
BLANK_LINES = "\n\n\n\na\n\nb\n\nOrrin said.\n\n\nThe hall\n \n.\n" * 20  # so that "\n\n" becomes a token


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind in ("sentencepiece", "bpe-json"):
        return load_tokenizer(folder_of(kind))
    if kind in ("converted", "metaspace"):
        return load_tokenizer(llama2_json(kind))
    return load_tokenizer(gpt2_json(kind))


def llama2_json(kind: str) -> tokenizers.Tokenizer:
    """The fixture's sentencepiece model as Hugging Face converts Llama 2: the old way, and the newer one."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder() / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []  # every way to make a piece of two, the pieces of best score (lowest id) first
    for piece in pieces:
        if vocab[piece] > 2 and not model.is_byte(vocab[piece]):
            pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
            merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    result = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    if kind == "converted":
        prepend = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        result.normalizer = normalizers.Sequence(list(prepend))
    else:
        result.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    result.decoder = decoders.Sequence([*replace, decoders.Strip(" ", 1, 0)])
    specials = [tokenizers.AddedToken(pieces[i], normalized=False, special=True) for i in range(3)]
    result.add_special_tokens(specials)
    result.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return result


@functools.cache
def gpt2_json(kind: str) -> tokenizers.Tokenizer:
    """Byte-level BPE behind GPT-2's own regular expression, which looks ahead at blank lines."""
    result = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix-space")
    digits = pre_tokenizers.Digits(individual_digits=True)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if kind == "smollm" else byte_level
    result.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    result.train_from_iterator([TRAINING_TEXT, BLANK_LINES], trainer)
    result.add_special_tokens(["<|endoftext|>"])
    assert result.token_to_id("ĊĊ") is not None
    return result


def spelled(tokenizer, ids):
    return b"".join(map(tokenizer.token_bytes, ids))


words = st.sampled_from(
    "Orrin|Vale|Glimmerhall| |  |\n|\n\n|\r|\t|.|“|é|Zoë|🦉|中文|한국|Ж|7|42|'s|—|</s>|<s>|<unk>|<0x41>|"
    "<|endoftext|>|<|begin_of_text|>|<|end_of_text|>|▁| a|hall\n|\x00|\ufeff|e\u0301".replace("<|", "<¦")
    .replace("|>", "¦>")
    .split("|")
).map(lambda word: word.replace("¦", "|"))
texts = st.one_of(st.lists(words, max_size=12).map("".join), st.text(max_size=20))
texts = texts.map(lambda text: text.encode("utf-8", "replace").decode())  # no halves of surrogate pairs


# ------------------------------------------------------------------------------------ tokens spell the text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text="Orrin</s>Vale<s> <unk><|end_of_text|><|endoftext|>")
def test_tokens_spell_the_text(kind, text):
    tokenizer = tokenizer_of(kind)
    ids, inside = tokenizer.encode(text), tokenizer.encode_inside(text)
    as_spelled = text.replace("▁", " ") if kind in PREFIXED[:3] else text
    prefix = " " if kind in PREFIXED and text else ""
    if kind == "metaspace" and as_spelled.startswith(" "):
        prefix = ""  # the newer conversion adds none before a space
    if kind == "prefix-space" and text.startswith(" "):
        prefix = ""
    assert spelled(tokenizer, ids) == (prefix + as_spelled).encode()
    assert spelled(tokenizer, inside) == as_spelled.encode()
    for token in (*ids, *inside):
        assert isinstance(token, int) and 0 <= token < tokenizer.vocab_size
        assert tokenizer.token_bytes(token) != SPECIAL_BYTE
    assert tokenizer.encode_inside_batch([text, "a", text]) == [inside, tokenizer.encode_inside("a"), inside]


@pytest.mark.parametrize("kind", KINDS)
def test_decode(kind):
    tokenizer = tokenizer_of(kind)
    text = "Orrin Vale  walked to Glimmerhall.\n“Zoë” 🦉 中"
    ids = np.array(tokenizer.encode(text))
    assert tokenizer.decode(ids) == (" " + text if kind == "prefix-space" else text)


def test_kinds_agree_where_they_are_the_same_model():
    """The conversions of the sentencepiece model give its tokens."""
    for text in [*TRAINING_TEXT.splitlines(), "Zoë 🦉 Orrin\nVale", "", "a"]:
        expected = tokenizer_of("sentencepiece").encode(text)
        assert tokenizer_of("converted").encode(text) == expected
        if not text.startswith(" "):
            assert tokenizer_of("metaspace").encode(text) == expected
        inside = tokenizer_of("sentencepiece").encode_inside(text)
        assert tokenizer_of("converted").encode_inside(text) == inside
        assert tokenizer_of("metaspace").encode_inside(text) == inside


@pytest.mark.parametrize("kind", KINDS)
def test_variants(kind):
    """An expression after a space, and directly after a newline."""
    tokenizer = tokenizer_of(kind)
    after_space, after_newline = tokenizer.variants("Orrin")
    assert spelled(tokenizer, after_space) == b" Orrin" and spelled(tokenizer, after_newline) == b"Orrin"
    sentence = tokenizer.encode_inside("a Orrin")
    assert sentence[-len(after_space) :] == after_space
    line = tokenizer.encode_inside("a\nOrrin")
    assert line[-len(after_newline) :] == after_newline


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(
            st.sampled_from([b"Orrin", b" Vale", b"\n", "🦉".encode(), "é".encode(), b"a"]),
            st.sampled_from(
                ["🦉".encode()[:3], "🦉".encode()[1:], b"\xc3", b"\xa9", b"\x80", b"\xed\xa0\x80"]
            ),
            st.binary(max_size=5),
        ),
        max_size=8,
    )
)
@example(pieces=[b"\xc3(\xe2\x82 x\xf0\x9f"])
def test_bytes_that_are_no_text(kind, pieces):
    data = b"".join(pieces).replace(b"\xff", b"")  # the byte of special tokens is never text
    tokenizer = tokenizer_of(kind)
    if kind in PREFIXED[:3]:
        data = data.replace("▁".encode(), b" ")
    assert spelled(tokenizer, tokenizer.encode_bytes(data)) == data


@pytest.mark.parametrize("kind", KINDS)
def test_single_bytes(kind):
    tokenizer = tokenizer_of(kind)
    for value in range(0xFF):
        assert tokenizer.token_bytes(tokenizer.byte_token(value)) == bytes([value])
    assert tokenizer.byte_token(0xFF) is None
    if kind == "sentencepiece":  # a byte piece, though "a" is a piece too
        assert tokenizer.byte_token(ord("a")) == tokenizer.encode_inside("\x00")[0] + ord("a")


@pytest.mark.parametrize("kind", KINDS)
def test_byte_table(kind):
    tokenizer = tokenizer_of(kind)
    table, offsets = tokenizer.byte_table
    assert table.dtype == np.uint8 and offsets.dtype == np.int64 and len(offsets) == tokenizer.vocab_size + 1
    for token in range(tokenizer.vocab_size):
        assert table[offsets[token] : offsets[token + 1]].tobytes() == tokenizer.token_bytes(token)
    assert (np.diff(offsets) > 0).all()  # boundaries are strictly increasing


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(kind):
    tokenizer = tokenizer_of(kind)
    specials = {tokenizer.bos_id, tokenizer.eos_id} - {None}
    assert specials and {tokenizer.token_bytes(token) for token in specials} == {SPECIAL_BYTE}
    expected = {"sentencepiece": (1, 2), "converted": (1, 2), "metaspace": (1, 2), "bpe-json": (398, 399)}
    end = tokenizer.vocab_size - 1  # <|endoftext|> of GPT-2 ends a text; nothing names it a beginning
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected.get(kind, (None, end))


def test_added_tokens_and_holes():
    """Qwen adds special tokens after a hole, and tokens that are text ("<think>")."""
    spec = json.loads(gpt2_json("gpt2").to_str())
    last = max(token["id"] for token in spec["added_tokens"])
    for number, (content, special) in enumerate([("<think>", False), ("<pad>", True)], start=last + 1):
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        spec["added_tokens"].append({"id": number, "content": content, "special": special, **flags})
    hole = spec["model"]["vocab"].pop("<|endoftext|>", None)
    assert hole is None
    tokenizer = JsonTokenizer(json.dumps(spec))
    assert tokenizer.token_bytes(last + 1) == b"<think>" and tokenizer.token_bytes(last + 2) == SPECIAL_BYTE
    assert tokenizer.vocab_size == last + 3
    assert tokenizer.token_bytes(last + 100) == SPECIAL_BYTE
    assert spelled(tokenizer, tokenizer.encode("a<think>b<pad>")) == b"a<think>b<pad>"
    assert last + 2 not in tokenizer.encode("a<pad>")


# -------------------------------------------------------------------------------- cuts that change no token


def cut_places(tokenizer, text):
    """Where the tokenizer says that a text may be cut."""
    shift = 1 if tokenizer.splits_after_newline else 0 if tokenizer.splits_before_newline else None
    return [
        i + shift
        for i in range(len(text) - 1)
        if shift is not None and text[i] == "\n" and text[i + 1].isalpha() and i + shift > 0
    ]


lines = st.sampled_from(
    "Orrin|said.|\n|\n\n|\n\n\n|\n \n|\t\n| \n|\r|7|42|é|א|中|Ж|“no.”|);|!|'s| |  |a|_|²|½|ª|🦉|🦉\n|-\n"
    "|\u2028|\u00a0".split("|")
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(text=st.lists(lines, min_size=2, max_size=14).map("".join))
@example(text="a\n\nb")
@example(text="Orrin.\n\nא")
@example(text="a\n\n\n7")
def test_cut_texts_keep_their_tokens(kind, text):
    tokenizer = tokenizer_of(kind)
    whole = tokenizer.encode(text)
    for cut in cut_places(tokenizer, text):
        assert tokenizer.encode(text[:cut]) + tokenizer.encode_inside(text[cut:]) == whole, (text, cut)


def test_which_kinds_may_be_cut():
    after = {kind for kind in KINDS if tokenizer_of(kind).splits_after_newline}
    before = {kind for kind in KINDS if tokenizer_of(kind).splits_before_newline}
    assert after == {"sentencepiece", "bpe-json", "converted", "metaspace"}
    assert before >= {"gpt2", "smollm", "prefix-space"}  # their blank lines are taken apart before a letter


@pytest.mark.parametrize("letter", ["b", "7", "é", "ב", "中"])
def test_a_piece_across_the_cut_forbids_it(letter):
    """A vocabulary that holds a newline and a letter in one piece (Hebrew's first byte looks like "×")."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    characters = [alphabet_character(byte) for byte in ("\n" + letter).encode()]
    merges = []
    newline, first, *others = characters
    for other in others:  # the bytes of the letter first, then the newline and the letter
        merges.append((first, other))
        first += other
        vocab[first] = len(vocab)
    merges.append((newline, first))
    vocab[newline + first] = len(vocab)
    result = tokenizers.Tokenizer(models.BPE(vocab, merges))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer(result)
    assert len(tokenizer.encode("\n" + letter)) == 1
    assert not tokenizer.splits_after_newline
    whole = [tokenizer.encode(text) for text in ("a\n" + letter, "a\n\n" + letter)]
    assert [tokenizer.encode("a") + tokenizer.encode("\n" + letter)] == whole[:1]


def alphabet_character(byte: int) -> str:
    (piece,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a")
    assert piece[0] == "a"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def test_an_unpredictable_pre_tokenizer_is_never_cut():
    """One that keeps a newline and what surrounds it together."""
    result = tokenizers.Tokenizer.from_str(gpt2_json("gpt2").to_str())
    result.normalizer = normalizers.Replace(tokenizers.Regex(r"\.\n+(?=b)"), "!")
    tokenizer = load_tokenizer(result)
    assert not tokenizer.splits_after_newline and not tokenizer.splits_before_newline


@pytest.mark.skipif(not (SHARED / "llama2_tokenizer.model").is_file(), reason="no Llama 2 tokenizer here")
@pytest.mark.parametrize("book", ["alice_in_wonderland.txt", "sherlock_holmes.txt"])
def test_books_with_the_tokenizer_of_llama_2(book):
    if not (SHARED / book).is_file():
        pytest.skip("no book here")
    tokenizer = load_tokenizer(SHARED / "llama2_tokenizer.model")
    text = (SHARED / book).read_text(encoding="utf-8-sig")[:60_000]
    ids = tokenizer.encode(text)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32_000, 1, 2)
    assert spelled(tokenizer, ids) == b" " + text.encode()
    places = cut_places(tokenizer, text)[::40]
    assert len(places) > 10
    pieces = [text[i:j] for i, j in zip([0, *places], [*places, len(text)])]
    head, *rest = pieces
    assert tokenizer.encode(head) + [t for p in tokenizer.encode_inside_batch(rest) for t in p] == ids


# -------------------------------------------------------------------------------------------- where they are


def test_sources():
    folder = sentencepiece_folder()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    assert load_tokenizer(tokenizer) is tokenizer
    text = "Orrin Vale"
    for source in (folder / "tokenizer.model", str(folder), model):
        assert load_tokenizer(source).encode(text) == tokenizer.encode(text)
    assert tokenizer.kind == "sentencepiece" and tokenizer.files == [folder / "tokenizer.model"]
    assert load_tokenizer(model).files == []

    folder = byte_level_folder()
    tokenizer = load_tokenizer(folder)
    ready = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for source in (folder / "tokenizer.json", ready):
        assert load_tokenizer(source).encode(text) == tokenizer.encode(text)
    assert tokenizer.kind == "bpe-json"
    assert [path.name for path in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


def test_a_ready_tokenizer_is_not_changed():
    ready = tokenizers.Tokenizer.from_file(str(byte_level_folder() / "tokenizer.json"))
    ready.enable_truncation(3)
    tokenizer = load_tokenizer(ready)
    assert len(tokenizer.encode("Orrin walked to Glimmerhall and said no")) > 3
    assert len(ready.encode("Orrin walked to Glimmerhall and said no").ids) == 3
    assert not ready.encode_special_tokens


def test_fast_tokenizer_of_transformers():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(byte_level_folder() / "tokenizer.json"))
    tokenizer = load_tokenizer(fast)
    assert tokenizer.encode("Orrin Vale") == tokenizer_of("bpe-json").encode("Orrin Vale")
    assert tokenizer.bos_id == 398


def test_the_original_model_is_preferred(tmp_path):
    for folder in (byte_level_folder(), sentencepiece_folder()):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "sentencepiece"
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in tokenizer.files] == names


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        (
            {"tokenizer_config.json": {"bos_token": "<|x|>", "eos_token": {"content": "<|y|>"}}},
            ("<|x|>", "<|y|>"),
        ),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": "<|y|>"}}, (None, "<|y|>")),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"bos_token": "<|x|>"}}, ("<|x|>", "</s>")),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|y|>"}}}, ("<s>", "<|y|>")),
        ({}, ("<s>", "</s>")),
    ],
)
def test_names_of_bos_and_eos(files, ids, tmp_path):
    result = tokenizers.Tokenizer.from_str(gpt2_json("gpt2").to_str())
    result.add_special_tokens(["<|x|>", "<|y|>", "<s>", "</s>"])
    result.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    expected = tuple(None if name is None else result.token_to_id(name) for name in ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


# ---------------------------------------------------------------------------------------------------- errors


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.model and no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="there.json: cannot read the tokenizer .*No such file"):
        load_tokenizer(tmp_path / "there.json")


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00garbage", b"[]", b"{}", b'{"model": 3}', b"null"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_garbage(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    kind = "a tokenizer.json" if name.endswith("json") else "a sentencepiece model"
    with pytest.raises(UserError, match=f"{name}: not {kind}"):
        load_tokenizer(tmp_path)


def test_tokens_without_their_spaces():
    """A word-level tokenizer does not spell the text."""
    result = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="do not carry their spaces"):
        load_tokenizer(result)


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_broken_file_beside(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder() / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer_config.json: not a JSON object"):
        load_tokenizer(tmp_path)
