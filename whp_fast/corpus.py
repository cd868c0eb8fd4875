"""Documents to token blocks: read, tokenise, write one memory-mapped token file.

Documents are concatenated, each behind a BOS token (or the EOS token where a tokenizer has no BOS), and the
stream is split into blocks of the context length. No token is dropped: the last block is short. Nothing here
holds more than a few megabytes of the corpus.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whp_fast.artifacts import NpyWriter
from whp_fast.errors import UserError
from whp_fast.tokens import Tokenizer

_READ_BYTES = 1 << 20
_PART_CHARACTERS = 1 << 14  # sentencepiece slows down on long strings; parts this long run at full speed
_BATCH_PARTS = 32
_NEWLINE_WITHIN = 1 << 16  # characters in which to look for a newline before a space will do
_NEWLINE_LETTER = re.compile(r"\n(?=[^\W\d_])")
_SPACE_BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_REFERENCE_CHUNK = 10_000  # characters; the reference code's fixed chunks (rule m)
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_TEXT_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Blocks:
    """Blocks of a token stream.

    Attributes:
        tokens: integer array [n_tokens], usually memory-mapped.
        context: tokens in a block.
        count: number of blocks; by default all, the last one short.
    """

    tokens: np.ndarray
    context: int
    count: int

    @classmethod
    def of(cls, tokens: np.ndarray, context: int, *, drop_tail: bool = False) -> Blocks:
        """All blocks of a stream; ``drop_tail`` follows the reference code (rule m), which leaves out the
        last block, full or not."""
        n = len(tokens)
        return cls(tokens, context, max(0, -(-(n - context) // context)) if drop_tail else -(-n // context))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.tokens[index * self.context : (index + 1) * self.context]

    @property
    def n_tokens(self) -> int:
        """Tokens inside the blocks."""
        return min(self.count * self.context, len(self.tokens))

    def offsets(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Stream positions (int64) where blocks ``first`` to ``last - 1`` begin, and where the last ends."""
        last = self.count if last is None else last
        return np.minimum(np.arange(first, last + 1, dtype=np.int64) * self.context, self.n_tokens)


def corpus_files(paths: Sequence[str | Path], setting: str = "data.corpus") -> list[Path]:
    """The text files of a corpus in a fixed order; folders are searched for ``.txt`` and ``.jsonl``.

    Args:
        setting: that names them, for messages.

    Raises:
        UserError: a path does not exist, is of another kind, or a folder holds no text.
    """
    if not paths:
        raise UserError(
            f"{setting}: no path given; name the .txt or .jsonl files or folders of the text to forget."
        )
    files: list[Path] = []
    for entry in map(Path, paths):
        if entry.is_dir():
            found = sorted(p for p in entry.rglob("*") if p.suffix in _TEXT_SUFFIXES and p.is_file())
            if not found:
                raise UserError(
                    f"{entry}: the folder holds no .txt or .jsonl file; name the folder of the corpus."
                )
            files += found
        elif not entry.is_file():
            raise UserError(f"{entry}: corpus file not found; check {setting}.")
        elif entry.suffix not in _TEXT_SUFFIXES:
            raise UserError(f"{entry}: a corpus file must end in .txt or .jsonl; convert or rename it.")
        else:
            files.append(entry)
    return files


def read_documents(path: Path, text_field: str = "text", errors: str = "strict") -> Iterator[Iterator[str]]:
    """The documents of one file, each as an iterator over its text parts.

    A ``.txt`` file is one document; a line of a ``.jsonl`` file is one. ``errors`` is ``strict`` or
    ``replace``.

    Raises:
        UserError: text that is not UTF-8 (with the byte), a line that is not JSON or lacks the field.
    """
    if path.suffix == ".txt":
        yield _decoded(path, errors)
        return
    pending = ""
    number = 0
    for part in _decoded(path, errors):
        *lines, pending = (pending + part).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield iter([_text_of_line(path, number, line, text_field, errors)])
    if pending.strip():
        yield iter([_text_of_line(path, number + 1, pending, text_field, errors)])


def tokenise_corpus(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    writer: TokenWriter,
    *,
    text_field: str = "text",
    errors: str = "strict",
    reference_chunks: bool = False,
    progress=lambda n_bytes: None,
) -> dict:
    """Write the token stream of all files; return counts (documents, characters, tokens).

    Args:
        reference_chunks: cut every file into 10,000-character chunks, each tokenised on its own behind a BOS
            (the reference code's way, rule m).
        progress: called with the number of UTF-8 bytes of each part that was tokenised.

    Raises:
        UserError: a file cannot be read, or the corpus has no text at all.
    """
    separator = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    head = [] if separator is None else [separator]
    documents = characters = 0
    blank = True
    for path in files:
        for document in read_documents(path, text_field, errors):
            parts = _fixed_chunks(document) if reference_chunks else _parts(document, tokenizer)
            began = False
            for batch in _batched(parts, _BATCH_PARTS):
                if not began:
                    documents += 1
                    writer.document_starts.append(writer.count)
                if reference_chunks:
                    encoded = [head + tokenizer.encode(part) for part in batch]
                elif began:
                    encoded = tokenizer.encode_inside_batch(batch)
                else:
                    encoded = [head + tokenizer.encode(batch[0]), *tokenizer.encode_inside_batch(batch[1:])]
                began = True
                for part, ids in zip(batch, encoded):
                    characters += len(part)
                    blank = blank and part.isspace()
                    writer.append(ids)
                    progress(len(part.encode("utf-8", "replace")))
    if blank:
        names = ", ".join(str(p) for p in files[:3])
        raise UserError(
            f"data.corpus: no text found in {names}; the corpus to forget is empty, name other files."
        )
    return {"documents": documents, "characters": characters, "tokens": writer.count}


class TokenWriter(NpyWriter):
    """Appends token ids to a ``.npy`` file (uint16 for vocabularies up to 65,536 ids, else uint32)."""

    def __init__(self, path: Path, vocab_size: int):
        super().__init__(path, np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.document_starts: list[int] = []


def _decoded(path: Path, errors: str) -> Iterator[str]:
    """The text of a file in pieces of about a megabyte, newlines as ``\\n``, a byte order mark left out."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    try:
        with open(path, "rb") as file:
            while True:
                data = file.read(_READ_BYTES)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    at = offset + len(data) - len(error.object) + error.start  # a part may be held over
                    raise UserError(
                        f"{path}: byte {at} (0x{error.object[error.start]:02x}) is not UTF-8; convert "
                        "the file, or set data.encoding_errors to replace."
                    ) from error
                yield newlines.decode(text, final=not data)
                offset += len(data)
                if not data:
                    return
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the corpus file ({error.strerror}); check the path and its rights."
        ) from error


def _text_of_line(path: Path, number: int, line: str, field: str, errors: str) -> str:
    try:
        text = json.loads(line).get(field)
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{path}, line {number}: not a JSON object; every line must be one.") from error
    if not isinstance(text, str):
        raise UserError(
            f"{path}, line {number}: no text in the field {field!r}; set data.text_field to its name."
        )
    if _HALF_PAIR.search(text):  # JSON can spell "\ud800", which no UTF-8 text holds
        if errors == "strict":
            raise UserError(
                f"{path}, line {number}: half of a surrogate pair is not UTF-8 text; mend the line, or set "
                "data.encoding_errors to replace."
            )
        text = _HALF_PAIR.sub("\ufffd", text)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parts(document: Iterator[str], tokenizer: Tokenizer) -> Iterator[str]:
    """A document in parts that tokenise as the whole does.

    Cut at a newline in front of a letter; in a text that has none for long (verse, one long line), before a
    space between letters.
    """
    pending = ""
    for text in document:
        pending += text
        start = 0
        while len(pending) - start > _PART_CHARACTERS:
            cut = _safe_cut(pending, start + _PART_CHARACTERS, tokenizer)
            if cut is None:
                break
            yield pending[start:cut]
            start = cut
        pending = pending[start:]
    if pending:
        yield pending


def _safe_cut(text: str, start: int, tokenizer: Tokenizer) -> int | None:
    shift = 1 if tokenizer.splits_after_newline else 0
    if shift == 1 or tokenizer.splits_before_newline:
        newline = _NEWLINE_LETTER.search(text, start, start + _NEWLINE_WITHIN)
        if newline:
            return newline.start() + shift
    if len(text) - start > _NEWLINE_WITHIN and tokenizer.splits_before_space:
        space = _SPACE_BETWEEN_LETTERS.search(text, start)
        if space:
            return space.start()
    return None


def _fixed_chunks(document: Iterator[str]) -> Iterator[str]:
    pending = ""
    for text in document:
        pending += text
        while len(pending) >= _REFERENCE_CHUNK:
            yield pending[:_REFERENCE_CHUNK]
            pending = pending[_REFERENCE_CHUNK:]
    if pending:
        yield pending


def _batched(parts: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for part in parts:
        batch.append(part)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
