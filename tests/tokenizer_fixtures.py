"""Two small tokenizers trained on the spot, and a plain class around each.

`sentencepiece_folder` is Llama-2-like: BPE with byte fallback, a prefix space, no normalisation.
`byte_level_folder` is Llama-3-like: byte-level BPE with a regular-expression split and a BOS that the
post-processor adds. Both hold about 400 tokens, so that words fall into several tokens, and both are the same
on every machine.
"""

import functools
import json
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 400
SPECIAL_BYTE = b"\xff"  # what the interface gives for special tokens: a byte that UTF-8 never uses

# Invented names beside ordinary words. Some words of the tests (the emoji, the dash, "Zoë") are left out on
# purpose, so that they fall back to bytes in the SentencePiece model.
TRAINING_TEXT = """\
Orrin Vale walked to Glimmerhall and said that the wand of ash was lost.
Orrin was in the old school when Mr. Quill came down to the hall, and Orrin said no.
“Paul Smith is a name,” said Mr. Quill to Orrin Vale. The hall was old, and the cup was cold.
Élise and Orrin's sister went to the Glimmer, the vale of the ash trees, and stayed all day.
A wand is a stick; a stick of ash is a wand of ash. Jon has the cup and Paul has the stick.
He was at the café with Élise, and the old cup of the school stood in the hall at Glimmerhall.
In the vale there was a school. Jon walked to the school, and Paul Smith walked home with Jon.
It is said, Orrin, that the ash tree in the old hall is as old as the name of the vale itself.
The tall-ash in the vale  was a tree; a tall-ash  is not a wand.
  The tall-ash was old, as old as a tall-ash can be.
He (Orrin) had a wand (ash) in the old hall.
The other (Vale) had a cup (old) in the old hall. Orrin was in the hall.
Said Quill (Mr. Quill) to Orrin (Vale), to Orrin (not Vale): “The tall-ash is not in the hall.”
“Vale is in the hall.”
"""
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS_TEXT, EOS_TEXT = "<|begin_of_text|>", "<|end_of_text|>"


@functools.cache
def sentencepiece_folder() -> Path:
    """A folder with the `tokenizer.model` of a Llama-2-like SentencePiece BPE model (unk 0, bos 1, eos 2)."""
    folder = _temporary_folder("sentencepiece")
    with (folder / "tokenizer.model").open("wb") as model_file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINING_TEXT.splitlines()),
            model_writer=model_file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            character_coverage=1.0,
            byte_fallback=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            split_digits=True,
            split_by_unicode_script=False,  # so that a piece can hold the end of an expression and more
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    return folder


@functools.cache
def byte_level_folder() -> Path:
    """A folder with the `tokenizer.json` of a Llama-3-like byte-level BPE model (BOS and EOS are last)."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = _llama3_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    return _save_byte_level(tokenizer, "byte_level")


def spelled_byte_level_folder(tokens: list[str]) -> Path:
    """A folder with a byte-level `tokenizer.json` of single bytes, `tokens` and the beginnings of `tokens`.

    A token may begin with one space. Merges go from left to right in the order of `tokens`, so the caller
    should check that a text falls into the tokens meant.
    """
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for token in tokens:
        token = token.replace(" ", "Ġ")
        for end in range(2, len(token) + 1):
            if token[:end] not in vocab:
                vocab[token[:end]] = len(vocab)
                merges.append((token[: end - 1], token[end - 1]))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _llama3_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return _save_byte_level(tokenizer, "spelled")


class PlainSentencePiece:
    """The tokenizer interface of `whp_fast.tokens`, restated plainly over a SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, folder: Path):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.vocab_size = self.processor.get_piece_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_inside(self, text: str) -> list[int]:
        # The prefix space and the newline are tokens of their own: no piece holds a newline.
        return self.processor.encode("\n" + text)[2:]

    def token_bytes(self, token: int) -> bytes:
        piece = self.processor.id_to_piece(token)
        if self.processor.is_control(token) or self.processor.is_unknown(token):
            return SPECIAL_BYTE
        if self.processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace("▁", " ").encode()


class PlainByteLevel:
    """The tokenizer interface of `whp_fast.tokens`, restated plainly over a byte-level BPE tokenizer."""

    kind = "bpe-json"

    def __init__(self, folder: Path):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.bos_id, self.eos_id = (self.tokenizer.token_to_id(text) for text in (BOS_TEXT, EOS_TEXT))
        # GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self.byte_of = {chr(byte): byte for byte in printable}
        self.byte_of |= {chr(0x100 + index): byte for index, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    encode_inside = encode  # a byte-level model adds no prefix space

    def token_bytes(self, token: int) -> bytes:
        if token in (self.bos_id, self.eos_id):
            return SPECIAL_BYTE
        return bytes(self.byte_of[character] for character in self.tokenizer.id_to_token(token))


@functools.cache
def folder_of(kind: str) -> Path:
    """The folder of the trained tokenizer of a kind, "sentencepiece" or "bpe-json"."""
    return sentencepiece_folder() if kind == "sentencepiece" else byte_level_folder()


@functools.cache
def plain_tokenizer(kind: str):
    """The plain class around the trained tokenizer of a kind, "sentencepiece" or "bpe-json"."""
    return (PlainSentencePiece if kind == "sentencepiece" else PlainByteLevel)(folder_of(kind))


def _llama3_pre_tokenizer():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _save_byte_level(tokenizer: tokenizers.Tokenizer, name: str) -> Path:
    tokenizer.add_special_tokens([BOS_TEXT, EOS_TEXT])
    bos_id = tokenizer.token_to_id(BOS_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TEXT} $A", special_tokens=[(BOS_TEXT, bos_id)]
    )
    folder = _temporary_folder(name)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS_TEXT, "eos_token": EOS_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


_TEMPORARY_FOLDERS = []  # they are removed when the interpreter ends


def _temporary_folder(name: str) -> Path:
    _TEMPORARY_FOLDERS.append(tempfile.TemporaryDirectory(prefix=f"whp_fast_{name}_"))
    return Path(_TEMPORARY_FOLDERS[-1].name)
