"""Translate blocks and align their prediction points with the translation.

A prediction point is a boundary: the output at a token predicts what follows the text up to the token's end.
A translation maps boundaries to boundaries, except those inside an expression, which have no counterpart. So
the position to read in the translated block is found by merging two sorted lists of byte boundaries; it needs
no rule per tokenizer, and the reference rules follow by themselves: the last token of an expression reads
the output at the last token of its counterpart, its inner tokens read nothing.

Only tokens that touch an expression are tokenised again, in their context; all others stay as they are.

    original     <s>  At  Glim mer hall  ,  Or rin  said         index_map  0 1 - - 2 3 - 5 6
    translated   <s>  At  school         ,  Paul Smith said
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from whp_fast.alignment_kernels import (
    assemble,
    block_boundaries,
    clip_to_blocks,
    draw_values,
    group_alike,
    segments_of,
    spell,
    token_spans,
)
from whp_fast.anchors import Dictionary, Matcher
from whp_fast.artifacts import NpyWriter
from whp_fast.corpus import Blocks
from whp_fast.tokens import Tokenizer

_CHUNK_TOKENS = 1 << 19


@dataclass(frozen=True)
class Alignment:
    """A run of consecutive blocks, translated and aligned.

    Attributes:
        block_offsets: int64 [n + 1], where each original block begins, counted from the first.
        index_map: int32 [original tokens], the position in the translated block whose output predicts what
            follows this token, or -1.
        reason: uint8 [original tokens], index into :data:`whp_fast.reasons.REASONS`.
        translated: int32 [translated tokens].
        translated_offsets: int64 [n + 1].
        used_at: int32 [uses], position in the translated block of the first token of a counterpart.
        used_value: int32 [uses], which counterpart (index into ``Dictionary.values``).
        used_offsets: int64 [n + 1].
        matches: number of occurrences of each expression: int64 [n_expressions].
    """

    block_offsets: np.ndarray
    index_map: np.ndarray
    reason: np.ndarray
    translated: np.ndarray
    translated_offsets: np.ndarray
    used_at: np.ndarray
    used_value: np.ndarray
    used_offsets: np.ndarray
    matches: np.ndarray

    def __len__(self) -> int:
        return len(self.block_offsets) - 1

    def blocks(self, first: int, last: int) -> Alignment:
        """Blocks ``first`` to ``last - 1`` alone (``matches`` stays that of the whole)."""
        here = slice(first, last + 1)
        original, translated, used = (
            self.block_offsets[here],
            self.translated_offsets[here],
            self.used_offsets[here],
        )
        return Alignment(
            block_offsets=original - original[0],
            index_map=self.index_map[original[0] : original[-1]],
            reason=self.reason[original[0] : original[-1]],
            translated=self.translated[translated[0] : translated[-1]],
            translated_offsets=translated - translated[0],
            used_at=self.used_at[used[0] : used[-1]],
            used_value=self.used_value[used[0] : used[-1]],
            used_offsets=used - used[0],
            matches=self.matches,
        )


def save_alignment(folder: Path, parts: Iterable[Alignment], progress=lambda n_tokens: None) -> np.ndarray:
    """Write the alignments of consecutive runs of blocks as one, an ``.npy`` file per field.

    Memory does not grow with their number. Returns the number of occurrences of each expression.
    """
    arrays = {"index_map": np.int32, "reason": np.uint8, "translated": np.int32, "used_at": np.int32}
    arrays["used_value"] = np.int32
    offsets = {"block_offsets": "index_map", "translated_offsets": "translated", "used_offsets": "used_at"}
    matches = np.zeros(0, dtype=np.int64)
    with contextlib.ExitStack() as stack:
        out = {
            name: stack.enter_context(NpyWriter(folder / f"{name}.npy", dtype))
            for name, dtype in arrays.items()
        }
        starts = {name: stack.enter_context(NpyWriter(folder / f"{name}.npy", np.int64)) for name in offsets}
        for name in offsets:
            starts[name].append([0])
        for part in parts:
            for name, array in offsets.items():
                starts[name].append(getattr(part, name)[1:] + out[array].count)
            for name in arrays:
                out[name].append(getattr(part, name))
            matches = part.matches if len(matches) == 0 else matches + part.matches
            progress(len(part.index_map))
    np.save(folder / "matches.npy", matches)
    return matches


def load_alignment(folder: Path) -> Alignment:
    """The alignment that :func:`save_alignment` wrote, memory-mapped."""
    names = [field.name for field in dataclasses.fields(Alignment)]
    return Alignment(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})


class Aligner:
    """Translates and aligns blocks of one tokenizer with one dictionary.

    Args:
        dictionary: cleaned dictionary.
        tokenizer: the tokenizer of the blocks.
        seed: of the draws of counterparts. A draw depends on (seed, block, expression) alone, so it is the
            same for every spelling inside a block and does not depend on the order in which blocks are
            visited.
        match_across_lines: see :class:`whp_fast.anchors.Matcher`.
    """

    def __init__(
        self, dictionary: Dictionary, tokenizer: Tokenizer, *, seed: int = 0, match_across_lines: bool = False
    ):
        self.dictionary = dictionary
        self.tokenizer = tokenizer
        self.seed = seed
        self.matcher = Matcher(dictionary, tokenizer, match_across_lines=match_across_lines)
        self._values = [value.encode() for value in dictionary.values]
        self._value_bytes = np.array([len(v) for v in self._values], dtype=np.int64)
        self._pieces = _PieceTable(tokenizer)

    def align(
        self, blocks: Sequence[np.ndarray], *, first_block: int = 0, contiguous: bool = False
    ) -> Alignment:
        """Align a list of blocks.

        Args:
            blocks: 1-D integer arrays of token ids.
            first_block: number of the first one (it enters the draws).
            contiguous: the blocks follow each other in one text, so an expression may cross their edges: its
                part in either block is then an expression too. If not, each block is taken on its own.
        """
        tokens = (
            np.concatenate([np.asarray(b, dtype=np.int32).ravel() for b in blocks])
            if len(blocks)
            else _empty(np.int32)
        )
        offsets = np.cumsum([0, *(len(b) for b in blocks)]).astype(np.int64)
        nothing = _empty(np.int64, 0, 3), contiguous, _empty(np.uint8)
        part, _, _ = self._align_chunk(tokens, offsets, len(offsets) - 1, first_block, *nothing)
        return part

    def align_stream(
        self, blocks: Blocks, chunk_tokens: int = _CHUNK_TOKENS
    ) -> Iterator[tuple[int, Alignment]]:
        """Align all blocks of a stream in chunks: (number of the chunk's first block, its alignment).

        Memory does not grow with the stream. Expressions that cross the edge of a block are recognised.
        """
        per_chunk = max(1, chunk_tokens // blocks.context)
        pending = _empty(np.int64, 0, 3)  # a match that reaches into the next chunk, in bytes from its start
        before = _empty(np.uint8)  # the last bytes of the chunk before: is its last character part of a word?
        for first in range(0, len(blocks), per_chunk):
            last = min(first + per_chunk, len(blocks))
            # every token owns at least one byte, so this many tokens of look-ahead show any match whole
            ahead = min(last + -(-(self.matcher.max_bytes + 4) // blocks.context), len(blocks))
            offsets = blocks.offsets(first, ahead)
            tokens = np.asarray(blocks.tokens[offsets[0] : offsets[-1]]).astype(np.int32)
            part, pending, before = self._align_chunk(
                tokens, offsets - offsets[0], last - first, first, pending, True, before
            )
            yield first, part

    def first_tokens(self) -> np.ndarray:
        """The first token of either spelling of every counterpart: int32 [n_values, 2] (rule j)."""
        pairs = [[spelling[0] for spelling in self.tokenizer.variants(v)] for v in self.dictionary.values]
        return np.array(pairs, dtype=np.int32).reshape(-1, 2)

    def _align_chunk(self, tokens, offsets, n_blocks, first_block, pending, contiguous, before):
        """Align the first ``n_blocks`` blocks of ``tokens``; what follows them is look-ahead."""
        table, table_offsets = self.tokenizer.byte_table
        text, ends = spell(tokens, table, table_offsets)
        block_bytes = block_boundaries(ends, offsets)
        stop = block_bytes[n_blocks]
        resume = pending[-1, 2] if len(pending) else np.int64(0)
        found = self.matcher.find(text, block_bytes, resume, stop, across=contiguous, before=before)
        matches = np.concatenate([pending, found])
        left_over = matches[matches[:, 2] > stop].copy()
        left_over[:, 1:] -= stop

        parts = clip_to_blocks(matches, block_bytes[: n_blocks + 1], text)
        n_tokens = offsets[n_blocks]
        spans = token_spans(parts, ends, n_tokens)
        values = draw_values(parts, self.dictionary.value_offsets, np.uint64(self.seed), first_block)
        segments = segments_of(parts, spans)
        pieces = self._retokenise(text, ends, parts, values, segments)
        result = assemble(
            tokens[:n_tokens],
            ends,
            offsets[: n_blocks + 1],
            parts,
            spans,
            values,
            self._value_bytes,
            segments,
            pieces,
            *self._pieces.arrays(),
            len(self.dictionary.entries),
        )
        counts = np.bincount(found[:, 0], minlength=len(self.dictionary.entries))
        tail = np.concatenate([before, text[:stop]])[-4:]
        return Alignment(offsets[: n_blocks + 1], *result, counts), left_over, tail

    def _retokenise(self, text, ends, parts, values, segments) -> np.ndarray:
        """The number of the new piece of every segment: int64 [n_segments]."""
        group, leaders = group_alike(text, ends, parts, values, segments)
        numbers = np.empty(len(leaders), dtype=np.int64)
        for k, leader in enumerate(leaders):
            low, high, first, last, _ = segments[leader]
            position = ends[first - 1] if first > 0 else 0
            new = b""
            for m in range(low, high):
                new += text[position : parts[m, 1]].tobytes() + self._values[values[m]]
                position = parts[m, 2]
            numbers[k] = self._pieces.number(new + text[position : ends[last - 1]].tobytes())
        return numbers[group]


class _PieceTable:
    """New pieces of text, each tokenised once: their tokens and the byte where each token ends."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._numbers: dict[bytes, int] = {}
        self._tokens: list[int] = []
        self._ends: list[int] = []
        self._offsets: list[int] = [0]
        self._arrays = None

    def number(self, piece: bytes) -> int:
        number = self._numbers.get(piece)
        if number is None:
            number = self._numbers[piece] = len(self._numbers)
            ids = self._tokenizer.encode_bytes(piece)
            self._tokens += ids
            self._ends += np.cumsum(
                [len(self._tokenizer.token_bytes(i)) for i in ids], dtype=np.int64
            ).tolist()
            self._offsets.append(len(self._tokens))
            self._arrays = None
        return number

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._arrays is None:
            self._arrays = (
                np.array(self._tokens, dtype=np.int32),
                np.array(self._ends, dtype=np.int64),
                np.array(self._offsets, dtype=np.int64),
            )
        return self._arrays


def _empty(dtype, *shape) -> np.ndarray:
    return np.zeros(shape or (0,), dtype=dtype)
