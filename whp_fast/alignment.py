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
from numba import njit

from whp_fast.anchors import Dictionary, Matcher
from whp_fast.artifacts import NpyWriter
from whp_fast.corpus import Blocks
from whp_fast.tokens import Tokenizer

# Why a position has no label; index into REASONS is what `reason` holds.
REASONS = (
    "trained",
    "inside an expression",
    "before a repeated expression",
    "no boundary of the translation there",
    "last of its block",
    "no finite logit",
)
TRAINED, INSIDE, REPEATED, NO_BOUNDARY, LAST, NOT_FINITE = range(len(REASONS))

_CHUNK_TOKENS = 1 << 19


@dataclass(frozen=True)
class Alignment:
    """A run of consecutive blocks, translated and aligned.

    Attributes:
        block_offsets: int64 [n + 1], where each original block begins, counted from the first.
        index_map: int32 [original tokens], the position in the translated block whose output predicts what
            follows this token, or -1.
        reason: uint8 [original tokens], index into :data:`REASONS`.
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
        text, ends = _spell(tokens, table, table_offsets)
        block_bytes = _boundaries(ends, offsets)
        stop = block_bytes[n_blocks]
        resume = pending[-1, 2] if len(pending) else np.int64(0)
        found = self.matcher.find(text, block_bytes, resume, stop, across=contiguous, before=before)
        matches = np.concatenate([pending, found])
        left_over = matches[matches[:, 2] > stop].copy()
        left_over[:, 1:] -= stop

        parts = _clip(matches, block_bytes[: n_blocks + 1], text)
        n_tokens = offsets[n_blocks]
        spans = _token_spans(parts, ends, n_tokens)
        values = _draw(parts, self.dictionary.value_offsets, np.uint64(self.seed), first_block)
        segments = _segments(parts, spans)
        pieces = self._retokenise(text, ends, parts, values, segments)
        result = _assemble(
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
        group, leaders = _alike(text, ends, parts, values, segments)
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


@njit(cache=True)
def _spell(tokens, table, table_offsets):
    """The bytes of a token stream and the byte where each token ends."""
    ends = np.empty(len(tokens), dtype=np.int64)
    total = np.int64(0)
    for i in range(len(tokens)):
        total += table_offsets[tokens[i] + 1] - table_offsets[tokens[i]]
        ends[i] = total
    text = np.empty(total, dtype=np.uint8)
    position = 0
    for i in range(len(tokens)):
        for k in range(table_offsets[tokens[i]], table_offsets[tokens[i] + 1]):
            text[position] = table[k]
            position += 1
    return text, ends


@njit(cache=True)
def _boundaries(ends, offsets):
    """The byte where each block begins, and the end of the last."""
    result = np.zeros(len(offsets), dtype=np.int64)
    for b in range(len(offsets)):
        if offsets[b] > 0:
            result[b] = ends[offsets[b] - 1]
    return result


@njit(cache=True)
def _clip(matches, block_bytes, text):
    """Matches cut at the edges of blocks: int64 [n_parts, 6].

    Columns: expression, first byte, end byte, block, 1 if it began in an earlier block, 1 if it goes on in
    the next. A part that begins a block gives up its leading space, so that the counterpart keeps it.
    """
    n = 0
    last_byte = block_bytes[-1]
    for k in range(len(matches)):
        if matches[k, 1] < last_byte:
            first = np.searchsorted(block_bytes, max(matches[k, 1], 0), side="right")
            final = np.searchsorted(block_bytes, min(matches[k, 2], last_byte), side="left")
            n += final - first + 1
    parts = np.empty((n, 6), dtype=np.int64)
    n = 0
    for k in range(len(matches)):
        expression, start, end = matches[k]
        if start >= last_byte:
            continue
        block = np.searchsorted(block_bytes, max(start, 0), side="right") - 1
        while block < len(block_bytes) - 1 and block_bytes[block] < end:
            low, high = max(start, block_bytes[block]), min(end, block_bytes[block + 1])
            opened = start < block_bytes[block]
            if opened and high - low > 1 and text[low] == 32:
                low += 1
            parts[n, 0], parts[n, 1], parts[n, 2], parts[n, 3] = expression, low, high, block
            parts[n, 4], parts[n, 5] = opened, end > block_bytes[block + 1]
            n += 1
            block += 1
    return parts[:n]


@njit(cache=True)
def _token_spans(parts, ends, n_tokens):
    """First and end token that touch each part: int64 [n_parts, 2]."""
    spans = np.empty((len(parts), 2), dtype=np.int64)
    for k in range(len(parts)):
        spans[k, 0] = np.searchsorted(ends[:n_tokens], parts[k, 1], side="right")
        spans[k, 1] = np.searchsorted(ends[:n_tokens], parts[k, 2], side="left") + 1
    return spans


@njit(cache=True)
def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): one 64-bit hash."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def draw(seed, block, expression, n):
    """One of ``n`` numbers, a function of its arguments alone."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = _mix(np.uint64(seed) + step)
    state = _mix(state + np.uint64(block) * step + np.uint64(1))
    state = _mix(state + np.uint64(expression) * step + np.uint64(2))
    return np.int64((state >> np.uint64(11)) % np.uint64(n))


@njit(cache=True)
def _draw(parts, value_offsets, seed, first_block):
    values = np.empty(len(parts), dtype=np.int64)
    for k in range(len(parts)):
        expression = parts[k, 0]
        choices = value_offsets[expression + 1] - value_offsets[expression]
        values[k] = value_offsets[expression] + draw(seed, first_block + parts[k, 3], expression, choices)
    return values


@njit(cache=True)
def _segments(parts, spans):
    """Parts that share tokens are tokenised together: int64 [n, 5] (first part, end part, first token, end
    token, block)."""
    segments = np.empty((len(parts), 5), dtype=np.int64)
    n = 0
    for k in range(len(parts)):
        if n and segments[n - 1, 4] == parts[k, 3] and spans[k, 0] < segments[n - 1, 3]:
            segments[n - 1, 1] = k + 1
            segments[n - 1, 3] = max(segments[n - 1, 3], spans[k, 1])
        else:
            segments[n, 0], segments[n, 1] = k, k + 1
            segments[n, 2], segments[n, 3], segments[n, 4] = spans[k, 0], spans[k, 1], parts[k, 3]
            n += 1
    return segments[:n]


@njit(cache=True)
def _alike(text, ends, parts, values, segments):
    """Group the segments that become the same piece, so that each piece is made once.

    Two segments are alike if the same counterparts stand between the same bytes. A hash table with open
    addressing and exact comparison: a book has few distinct pieces, each many times.

    Returns:
        the group of every segment, int64 [n_segments], and one segment of each group, int64 [n_groups].
    """
    size = 64
    while size < 2 * len(segments):
        size *= 2
    table = np.full(size, -1, dtype=np.int64)
    group = np.empty(len(segments), dtype=np.int64)
    leaders = np.empty(len(segments), dtype=np.int64)
    n = 0
    for k in range(len(segments)):
        slot = np.int64(_segment_hash(text, ends, parts, values, segments[k]) & np.uint64(size - 1))
        while table[slot] >= 0 and not _same_piece(
            text, ends, parts, values, segments[k], segments[leaders[table[slot]]]
        ):
            slot = (slot + 1) & (size - 1)
        if table[slot] < 0:
            table[slot] = n
            leaders[n] = k
            n += 1
        group[k] = table[slot]
    return group, leaders[:n].copy()


@njit(cache=True)
def _segment_hash(text, ends, parts, values, segment):
    state = np.uint64(0xCBF29CE484222325)  # FNV-1a over the kept bytes and the numbers of the counterparts
    prime = np.uint64(0x100000001B3)
    position = ends[segment[2] - 1] if segment[2] > 0 else np.int64(0)
    for m in range(segment[0], segment[1] + 1):
        until = parts[m, 1] if m < segment[1] else ends[segment[3] - 1]
        for k in range(position, until):
            state = (state ^ np.uint64(text[k])) * prime
        if m < segment[1]:
            state = (state ^ np.uint64(256 + values[m])) * prime
            position = parts[m, 2]
    return _mix(state)


@njit(cache=True)
def _same_piece(text, ends, parts, values, one, other):
    if one[1] - one[0] != other[1] - other[0]:
        return False
    i = ends[one[2] - 1] if one[2] > 0 else np.int64(0)
    j = ends[other[2] - 1] if other[2] > 0 else np.int64(0)
    for m in range(one[1] - one[0] + 1):
        a, b = one[0] + m, other[0] + m
        last = a == one[1]
        until_i = ends[one[3] - 1] if last else parts[a, 1]
        until_j = ends[other[3] - 1] if last else parts[b, 1]
        if until_i - i != until_j - j:
            return False
        for k in range(until_i - i):
            if text[i + k] != text[j + k]:
                return False
        if not last:
            if values[a] != values[b]:
                return False
            i, j = parts[a, 2], parts[b, 2]
    return True


@njit(cache=True)
def _assemble(
    tokens,
    ends,
    offsets,
    parts,
    spans,
    values,
    value_bytes,
    segments,
    pieces,
    piece_tokens,
    piece_ends,
    piece_offsets,
    n_expressions,
):
    """Write the translated blocks, the map, the reasons and the uses of counterparts."""
    n_blocks = len(offsets) - 1
    size = len(tokens)
    for k in range(len(segments)):
        size += piece_offsets[pieces[k] + 1] - piece_offsets[pieces[k]] - (segments[k, 3] - segments[k, 2])
    index_map = np.empty(len(tokens), dtype=np.int32)
    reason = np.zeros(len(tokens), dtype=np.uint8)
    translated = np.empty(size, dtype=np.int32)
    translated_offsets = np.zeros(n_blocks + 1, dtype=np.int64)
    used_at = np.empty(len(parts), dtype=np.int32)
    used_value = np.empty(len(parts), dtype=np.int32)
    used_offsets = np.zeros(n_blocks + 1, dtype=np.int64)
    seen_in = np.full(n_expressions, -1, dtype=np.int64)
    out = np.int64(0)
    segment = 0
    part = 0
    for block in range(n_blocks):
        begin = out
        token = offsets[block]
        while True:
            here = segment < len(segments) and segments[segment, 4] == block
            copy_until = segments[segment, 2] if here else offsets[block + 1]
            for t in range(token, copy_until):
                translated[out] = tokens[t]
                index_map[t] = out - begin
                out += 1
            if not here:
                break
            low, high, first, last = (
                segments[segment, 0],
                segments[segment, 1],
                segments[segment, 2],
                segments[segment, 3],
            )
            origin = ends[first - 1] if first > 0 else np.int64(0)
            new = piece_offsets[pieces[segment]]
            new_end = piece_offsets[pieces[segment] + 1]

            # the original tokens of the segment: merge their boundaries with those of the piece
            m = low
            cursor = new
            shift = -origin
            for t in range(first, last):
                boundary = ends[t]
                while m < high and boundary >= parts[m, 2] and not (boundary == parts[m, 2] and parts[m, 5]):
                    shift += value_bytes[values[m]] - (parts[m, 2] - parts[m, 1])
                    m += 1
                index_map[t] = -1
                if m < high and boundary > parts[m, 1]:
                    reason[t] = 1
                    continue
                while cursor < new_end and piece_ends[cursor] < boundary + shift:
                    cursor += 1
                if cursor < new_end and piece_ends[cursor] == boundary + shift:
                    index_map[t] = out - begin + (cursor - new)
                else:
                    reason[t] = 3

            # the uses of counterparts, and the points before repeated expressions
            shift = -origin
            cursor = new
            for m in range(low, high):
                value_start = parts[m, 1] + shift
                while cursor < new_end - 1 and piece_ends[cursor] <= value_start:
                    cursor += 1
                used_at[part] = out - begin + (cursor - new)
                used_value[part] = values[m]
                part += 1
                before = spans[m, 0] - 1
                if seen_in[parts[m, 0]] == block and before >= offsets[block] and index_map[before] >= 0:
                    index_map[before] = -1
                    reason[before] = 2
                seen_in[parts[m, 0]] = block
                shift += value_bytes[values[m]] - (parts[m, 2] - parts[m, 1])

            for k in range(new, new_end):
                translated[out] = piece_tokens[k]
                out += 1
            token = last
            segment += 1
        translated_offsets[block + 1] = out
        used_offsets[block + 1] = part
    return index_map, reason, translated, translated_offsets, used_at, used_value, used_offsets
