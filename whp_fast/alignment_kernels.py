"""The compiled loops of :mod:`whp_fast.alignment`: bytes and tokens in, maps and masks out (numba).

Bytes and tokens count from the first of the run of blocks. A *part* is a match cut at the edges of its
blocks, a *segment* a run of parts that share tokens, and a *piece* the new tokens of a segment.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from whp_fast.reasons import INSIDE, NO_BOUNDARY, REPEATED


@njit(cache=True)
def spell(tokens, table, table_offsets):
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
def block_boundaries(ends, offsets):
    """The byte where each block begins, and the end of the last."""
    result = np.zeros(len(offsets), dtype=np.int64)
    for b in range(len(offsets)):
        if offsets[b] > 0:
            result[b] = ends[offsets[b] - 1]
    return result


@njit(cache=True)
def clip_to_blocks(matches, block_bytes, text):
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
def token_spans(parts, ends, n_tokens):
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
def draw_values(parts, value_offsets, seed, first_block):
    values = np.empty(len(parts), dtype=np.int64)
    for k in range(len(parts)):
        expression = parts[k, 0]
        choices = value_offsets[expression + 1] - value_offsets[expression]
        values[k] = value_offsets[expression] + draw(seed, first_block + parts[k, 3], expression, choices)
    return values


@njit(cache=True)
def segments_of(parts, spans):
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
def group_alike(text, ends, parts, values, segments):
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
def assemble(
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
                    reason[t] = INSIDE
                    continue
                while cursor < new_end and piece_ends[cursor] < boundary + shift:
                    cursor += 1
                if cursor < new_end and piece_ends[cursor] == boundary + shift:
                    index_map[t] = out - begin + (cursor - new)
                else:
                    reason[t] = NO_BOUNDARY

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
                    reason[before] = REPEATED
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
