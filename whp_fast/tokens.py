"""Tokenizers behind one small class: sentencepiece ``tokenizer.model`` and Hugging Face ``tokenizer.json``.

The rest of the project never asks a tokenizer for character offsets. It asks what bytes each token adds to
the text (:meth:`Tokenizer.token_bytes`), because a prediction point is a boundary between bytes. Every token
owns at least one byte: special tokens own ``0xFF``, which UTF-8 never uses, so boundaries are strictly
increasing and no expression can match across a special token.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from whp_fast.errors import UserError

SPECIAL_BYTE = b"\xff"
_SPACE_MARK = "\u2581"  # the lower one eighth block, sentencepiece's written space
# Serialised `normalizer_spec { add_dummy_prefix: false remove_extra_whitespaces: false }`. Protocol buffers
# merge a message that is appended to another one, so this turns a model into its twin for text inside a text,
# with any version of sentencepiece and without the protobuf package.
_NO_DUMMY_PREFIX = bytes([0x1A, 4, 0x18, 0, 0x20, 0])
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")
_BEFORE_NEWLINE, _BLANKS = ("a", "7", ".", "\u201d", ");"), ("", "\n", "\n\n", " ", "\n ", " \n", "\t\n")
_AFTER_NEWLINE = ("b", "B", "\u00e9", "\u0436", "\u05d0", "\u4e2d")
_SIDE_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SIDE_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def load_tokenizer(source) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: a model folder (``tokenizer.model`` is preferred to ``tokenizer.json``: it is the original of
            the two), one of these files, or a ready ``Tokenizer``, ``sentencepiece.SentencePieceProcessor``
            or ``tokenizers.Tokenizer``.

    Raises:
        UserError: nothing usable is there.
    """
    if isinstance(source, Tokenizer):
        return source
    if hasattr(source, "serialized_model_proto"):
        return SentencePieceTokenizer(source.serialized_model_proto())
    if hasattr(source, "backend_tokenizer"):  # a fast tokenizer of transformers
        source = source.backend_tokenizer
    if hasattr(source, "to_str"):
        return JsonTokenizer(source.to_str())
    path = Path(source)
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise UserError(
            f"{path}: no tokenizer.model and no tokenizer.json found; copy the tokenizer files of the model "
            "here."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error.strerror}); check the path.") from error
    return JsonTokenizer(data, path) if path.suffix == ".json" else SentencePieceTokenizer(data, path)


class Tokenizer:
    """What every tokenizer offers. Ids are Python ints; ``vocab_size`` counts ids, holes included."""

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def __init__(self, path: Path | None):
        self.path = path

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that begins here; no BOS is added."""
        raise NotImplementedError

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that stands in the middle of another: no prefix space is added."""
        return self.encode_inside_batch([text])[0]

    def encode_inside_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode_inside` of many texts, with the library's threads."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, as the library gives it (special tokens left out)."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to the text; ``b"\\xff"`` for a special or unknown token."""
        raise NotImplementedError

    def byte_token(self, value: int) -> int | None:
        """The id of the token that stands for one single byte, if the vocabulary has it."""
        return self._single_bytes.get(bytes([value]))

    def variants(self, text: str) -> tuple[list[int], list[int]]:
        """A string as it is tokenised after a space (or at the start of a text) and directly after a newline.

        These are the two spellings of the reference code (section "exact algorithm", rule a).
        """
        return self.encode_inside(" " + text), self.encode_inside(text)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of bytes in the middle of a text; bytes that are no whole character become byte tokens.

        Blocks may start or end inside a character, and a token may hold a part of one.
        """
        try:
            return self.encode_inside(data.decode())
        except UnicodeDecodeError as error:
            head = self.encode_inside(data[: error.start].decode()) if error.start else []
            broken = [self.byte_token(value) for value in data[error.start : error.end]]
            rest = data[error.end :]
            return head + [t for t in broken if t is not None] + (self.encode_bytes(rest) if rest else [])

    @functools.cached_property
    def byte_table(self) -> tuple[np.ndarray, np.ndarray]:
        """All token bytes as one uint8 array and int64 offsets [vocab_size + 1]."""
        pieces = [self.token_bytes(i) for i in range(self.vocab_size)]
        offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(p) for p in pieces], out=offsets[1:])
        return np.frombuffer(b"".join(pieces), dtype=np.uint8), offsets

    @functools.cached_property
    def splits_after_newline(self) -> bool:
        """Whether a text may be cut between a newline and a letter without changing any token.

        True when no piece of the vocabulary holds a newline followed by a letter or digit, so that no merge
        can cross such a place, and the pre-tokenizer breaks there whatever follows. It lets long documents be
        tokenised in parts.
        """
        for token in range(self.vocab_size):
            piece = self.token_bytes(token)
            if b"\n" in piece[:-1] and any(
                a == 10 and (b >= 0x80 or chr(b).isalnum()) for a, b in zip(piece, piece[1:])
            ):
                return False
        return self._may_cut(1)

    @functools.cached_property
    def splits_before_newline(self) -> bool:
        """Whether a text may be cut before the last newline in front of a letter.

        That is where GPT-2's pre-tokenizer (SmolLM) breaks: it looks ahead, so it takes the two newlines of
        ``"a\\n\\nb"`` one by one, but those of ``"a\\n\\n"`` together.
        """
        return self._may_cut(0)

    @functools.cached_property
    def splits_before_space(self) -> bool:
        """Whether a text may be cut before a single space between two letters without changing any token.

        True when no piece of the vocabulary goes on after a space, and samples keep their tokens.
        """
        for token in range(self.vocab_size):
            if b" " in self.token_bytes(token).lstrip(b" "):
                return False
        samples = (("The cat", " sat on"), ("a", " b"), ("It's\n\nThe end", " was near"), ("été", " là"))
        return all(
            self.encode_inside(head + tail) == self.encode_inside(head) + self.encode_inside(tail)
            for head, tail in samples
        )

    def _may_cut(self, shift: int) -> bool:
        """Whether samples keep their tokens when cut ``shift`` characters after the start of their last
        newline."""
        for before, blank, after in itertools.product(_BEFORE_NEWLINE, _BLANKS, _AFTER_NEWLINE):
            text, cut = before + blank + "\n" + after, len(before + blank) + shift
            if self.encode_inside(text) != self.encode_inside(text[:cut]) + self.encode_inside(text[cut:]):
                return False
        return True

    @functools.cached_property
    def _single_bytes(self) -> dict[bytes, int]:
        table: dict[bytes, int] = {}
        for token in range(self.vocab_size):
            piece = self.token_bytes(token)
            if len(piece) == 1 and (piece not in table or self._is_byte(token)):
                table[piece] = token
        table.pop(SPECIAL_BYTE, None)
        return table

    def _is_byte(self, token: int) -> bool:
        return False

    def copy_to(self, folder: Path) -> None:
        """Put the tokenizer's files beside a model, under the names by which they are looked for there."""
        for file in self.files:
            usual = "tokenizer.json" if self.kind == "bpe-json" else "tokenizer.model"
            shutil.copyfile(file, folder / (usual if file == self.path else file.name))

    @property
    def files(self) -> list[Path]:
        """The files to put beside an exported model."""
        if self.path is None:
            return []
        folder = self.path.parent
        names = [self.path.name, *(name for name in _SIDE_FILES if (folder / name).is_file())]
        return [folder / name for name in dict.fromkeys(names)]


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model (Llama 2, Mistral)."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, path: Path | None = None):
        super().__init__(path)
        import sentencepiece

        try:
            self._start = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._inside = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except Exception as error:  # the library raises RuntimeError or a bare parse error, by version
            raise UserError(
                f"{path or 'tokenizer'}: not a sentencepiece model ({error}); use the original file."
            ) from error
        self.vocab_size = self._start.get_piece_size()
        self.bos_id = self._start.bos_id() if self._start.bos_id() >= 0 else None
        self.eos_id = self._start.eos_id() if self._start.eos_id() >= 0 else None

    def encode(self, text):
        return self._start.encode(text)

    def encode_inside_batch(self, texts):
        return self._inside.encode(list(texts))

    def decode(self, ids):
        return self._start.decode([int(i) for i in ids])

    def token_bytes(self, token):
        model = self._start
        if model.is_byte(token):
            return bytes([int(model.id_to_piece(token)[3:5], 16)])
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return SPECIAL_BYTE
        return model.id_to_piece(token).replace(_SPACE_MARK, " ").encode() or SPECIAL_BYTE

    def _is_byte(self, token):
        return self._start.is_byte(token)


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` (Llama 3, Qwen, SmolLM: byte-level; also the converted Llama 2: space marks)."""

    kind = "bpe-json"

    def __init__(self, text: str | bytes, path: Path | None = None):
        super().__init__(path)
        import tokenizers

        where = path or "tokenizer.json"
        try:
            text = text.decode() if isinstance(text, bytes) else text
            spec = json.loads(text)
            self._start = tokenizers.Tokenizer.from_str(text)
            self._inside = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix_space(spec)))
        except Exception as error:
            raise UserError(f"{where}: not a tokenizer.json ({error}); use the file of the model.") from error
        for tokenizer in (self._start, self._inside):
            tokenizer.encode_special_tokens = True  # a corpus may contain "</s>": there it is text
            tokenizer.no_padding()
            tokenizer.no_truncation()
        kinds = _component_types(spec)
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and _SPACE_MARK not in text:
            raise UserError(
                f"{where}: its tokens do not carry their spaces (neither byte-level nor {_SPACE_MARK} "
                "pieces), so they do "
                "not spell the text; use the tokenizer of a causal language model."
            )
        vocabulary = self._start.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._pieces = {index: piece for piece, index in vocabulary.items()}
        self._special = {i for i, t in self._start.get_added_tokens_decoder().items() if t.special}
        self._added = set(self._start.get_added_tokens_decoder()) - self._special
        self._unknown = (spec.get("model") or {}).get("unk_token")
        self.bos_id = self._named_id("bos", _BOS_NAMES)
        self.eos_id = self._named_id("eos", _EOS_NAMES)

    def encode(self, text):
        return self._start.encode(text, add_special_tokens=False).ids

    def encode_inside_batch(self, texts):
        return [e.ids for e in self._inside.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids):
        return self._start.decode([int(i) for i in ids])

    def token_bytes(self, token):
        piece = self._pieces.get(token)
        if piece is None or token in self._special or piece == self._unknown:
            return SPECIAL_BYTE
        if token in self._added:
            return piece.encode() or SPECIAL_BYTE
        if self._byte_level:
            return bytes(_BYTE_OF_CHARACTER[c] for c in piece) or SPECIAL_BYTE
        if self._is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode() or SPECIAL_BYTE

    def _is_byte(self, token):
        piece = self._pieces.get(token, "")
        return not self._byte_level and len(piece) == 6 and piece.startswith("<0x")

    def _named_id(self, role: str, usual: Sequence[str]) -> int | None:
        """The id of the BOS or EOS token: what the files beside say, else a usual name among the special
        tokens.
        """
        folder = self.path.parent if self.path is not None else None
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if folder is not None and (folder / name).is_file():
                try:
                    entry = json.loads((folder / name).read_text(encoding="utf-8")).get(f"{role}_token", "")
                except (OSError, ValueError, AttributeError) as error:
                    raise UserError(
                        f"{folder / name}: not a JSON object ({error}); mend the file."
                    ) from error
                if entry is None:
                    return None  # Qwen says so: it has no BOS
                content = entry.get("content") if isinstance(entry, dict) else entry
                if content:
                    return self._start.token_to_id(content)
        ids = (self._start.token_to_id(name) for name in usual)
        return next((i for i in ids if i is not None), None)


def _component_types(spec) -> set[str]:
    """Every ``type`` named in the normalizer, pre-tokenizer and decoder of a tokenizer.json."""
    found: set[str] = set()
    stack = [spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            found.add(node.get("type"))
            stack += list(node.values())
        elif isinstance(node, list):
            stack += node
    return found


def _without_prefix_space(node):
    """The same specification with every rule removed that puts a space before a text."""
    if isinstance(node, list):
        return [_without_prefix_space(child) for child in node if not _is_prepend(child)]
    if not isinstance(node, dict):
        return node
    changed = {
        key: None if _is_prepend(child) else _without_prefix_space(child) for key, child in node.items()
    }
    if node.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    if node.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)
    return changed


def _is_prepend(node) -> bool:
    return isinstance(node, dict) and node.get("type") == "Prepend"


def _byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's table: printable characters stand for themselves, the others for 256 + k."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in printable}
    others = (value for value in range(256) if value not in set(printable))
    table.update({chr(256 + k): value for k, value in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()
