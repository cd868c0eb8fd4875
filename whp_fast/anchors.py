"""The dictionary of idiosyncratic expressions ("anchors"): load, check, clean, match in text.

Matching works on the bytes of the token stream: case-sensitive, at word boundaries, leftmost-longest. All
occurrences of all expressions come from an Aho-Corasick automaton (``ahocorasick_rs``); which of them stand
is decided afterwards, because a longest match that breaks a word must not hide a shorter one that does not.
"""

from __future__ import annotations

import difflib
import functools
import heapq
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from whp_fast.errors import UserError
from whp_fast.tokens import Tokenizer

# Scripts that write no spaces between words, or glue particles to names: there a word boundary cannot be
# seen.
_NO_WORD_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1100, 0x11FF),  # Hangul Jamo
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x9FFF),  # CJK, kana
    (0xAC00, 0xD7FF),  # Hangul
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


_NOTHING = np.zeros(0, dtype=np.uint8)


@dataclass(frozen=True)
class Dictionary:
    """A cleaned dictionary.

    Attributes:
        entries: expression -> its generic counterparts (at least one, unique, in file order).
        dropped: expressions that the cleaning rules left out -> why.
        source: file name for messages.
    """

    entries: dict[str, list[str]]
    dropped: dict[str, str]
    source: str = "anchors"

    @functools.cached_property
    def expressions(self) -> list[str]:
        return list(self.entries)

    @functools.cached_property
    def values(self) -> list[str]:
        """The counterparts of all expressions, one after another."""
        return [value for values in self.entries.values() for value in values]

    @functools.cached_property
    def value_offsets(self) -> np.ndarray:
        """Where the counterparts of each expression begin in :attr:`values`: int64 [n_expressions + 1]."""
        return np.cumsum([0, *(len(v) for v in self.entries.values())]).astype(np.int64)


def load_dictionary(source: str | Path | Mapping | Dictionary) -> Dictionary:
    """Read, check and clean a dictionary.

    Args:
        source: a JSON file ``{"expression": "generic"}`` or ``{"expression": ["generic", ...]}``, or such a
        mapping.

    Raises:
        UserError: no such file, not JSON, or an entry that is empty, duplicated or equal to its counterpart.
    """
    if isinstance(source, Dictionary):
        return source
    if isinstance(source, Mapping):
        pairs, name = list(source.items()), "anchors"
    else:
        path, name = Path(source), str(source)
        try:
            data = path.read_bytes()
            pairs = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_Pairs)
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the dictionary ({error.strerror}); check anchors.path."
            ) from error
        except UnicodeDecodeError as error:
            at = len(data) - len(error.object) + error.start  # the decoder may have taken off a mark
            raise UserError(f"{path}: byte {at} is not UTF-8; save the dictionary as UTF-8.") from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg}); mend the file."
            ) from error
        if not isinstance(pairs, _Pairs):
            raise UserError(f'{path}: not a JSON object; write {{"expression": ["generic", ...], ...}}.')
    return Dictionary(*clean(_checked(pairs, name)), source=name)


def clean(entries: Mapping[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The cleaning rules of the reference code (rule b); returns what stays and what was dropped, with the
    reason.

    A possessive goes if its stem is an expression, a phrase goes if each of its words is one: otherwise an
    expression and its parts would be translated in ways that do not agree.
    """
    kept: dict[str, list[str]] = {}
    dropped: dict[str, str] = {}
    for expression, values in entries.items():
        words = expression.split()
        if expression.endswith("'s") and expression[:-2] in entries:
            dropped[expression] = f"possessive of {expression[:-2]!r}"
        elif len(words) > 1 and all(word in entries for word in words):
            dropped[expression] = "each of its words is an expression of its own"
        else:
            kept[expression] = values
    return kept, dropped


def nearest_words(dictionary: Dictionary, text: str, n: int = 10) -> list[tuple[str, str]]:
    """The (expression, word of the text) pairs that look most alike, for a dictionary that matches
    nothing.
    """
    words = sorted({w.strip(".,;:!?\"'()[]") for w in text.split()} - {""})
    with_pair: dict[str, list[str]] = {}
    for word in words:
        for pair in _letter_pairs(word):
            with_pair.setdefault(pair, []).append(word)
    scored: list[tuple[float, str, str]] = []
    for expression in dictionary.expressions[:500]:
        pairs = _letter_pairs(expression)
        shared = Counter(word for pair in pairs for word in with_pair.get(pair, ()))
        # comparing letter by letter with every word would take minutes
        likely = heapq.nlargest(20, shared, key=lambda w: shared[w] / (len(pairs) + len(w))) or words[:20]
        for word in likely:
            alike = difflib.SequenceMatcher(None, expression.lower(), word.lower()).ratio()
            scored.append((alike, expression, word))
    best = {expression: (alike, expression, word) for alike, expression, word in sorted(scored)}
    return [(expression, word) for _, expression, word in sorted(best.values(), reverse=True)[:n]]


class Matcher:
    """Finds the expressions of a dictionary in the bytes of a token stream.

    Args:
        dictionary: the cleaned dictionary.
        tokenizer: its normalisation (NFC, space marks) is applied to the expressions too, by tokenising them.
        match_across_lines: a line break in the text matches a space in an expression (books with wrapped
        lines).
    """

    def __init__(self, dictionary: Dictionary, tokenizer: Tokenizer, *, match_across_lines: bool = False):
        import ahocorasick_rs

        patterns = [_as_tokenised(expression, tokenizer) for expression in dictionary.expressions]
        if match_across_lines:
            patterns = [pattern.replace(b"\n", b" ") for pattern in patterns]
        self.match_across_lines = match_across_lines
        self.max_bytes = max(map(len, patterns), default=1)
        self._automaton = ahocorasick_rs.BytesAhoCorasick(patterns) if patterns else None
        self._needs_edge = np.array(
            [(_is_word_character(p.decode()[0]), _is_word_character(p.decode()[-1])) for p in patterns],
            dtype=np.bool_,
        ).reshape(len(patterns), 2)

    def find(
        self,
        text: np.ndarray,
        starts: np.ndarray,
        resume: int,
        stop: int,
        *,
        across: bool,
        before: np.ndarray = _NOTHING,
    ) -> np.ndarray:
        """Leftmost-longest matches at word boundaries.

        Args:
            text: uint8 [n], the bytes of consecutive blocks.
            starts: int64 [n_blocks + 1], where each block begins in ``text``, and the end of the last.
            resume: matches begin at this byte or later (the end of the last match before this text).
            stop: matches begin before this byte (what follows is look-ahead).
            across: whether a match may cross the edge of a block. If not, the edge of a block also counts as
                a word boundary, since each block is taken on its own.
            before: uint8, the last bytes (a character has up to four) of the text before this one.

        Returns:
            int64 [n_matches, 3]: expression, first byte, end byte; ordered, not overlapping.
        """
        if self._automaton is None or len(text) == 0:
            return np.zeros((0, 3), dtype=np.int64)
        searched = np.where(text == 10, np.uint8(32), text) if self.match_across_lines else text
        found = self._automaton.find_matches_as_indexes(searched, overlapping=True)
        if not found:
            return np.zeros((0, 3), dtype=np.int64)
        candidates = np.array(found, dtype=np.int64)
        edge_bytes = np.zeros(0, dtype=np.int64) if across else starts
        if len(before) and across:
            shifted = candidates + np.array([0, len(before), len(before)])
            joined = np.concatenate([before, text])
            keep = _valid(joined, shifted, self._needs_edge, _word_characters(), edge_bytes)
        else:
            keep = _valid(text, candidates, self._needs_edge, _word_characters(), edge_bytes)
        candidates = candidates[keep & (candidates[:, 1] >= resume) & (candidates[:, 1] < stop)]
        order = np.lexsort((-candidates[:, 2], candidates[:, 1]))
        return _leftmost_longest(candidates[order])


class _Pairs(list):
    """The members of a JSON object as pairs, so that duplicated keys are seen."""


def _checked(pairs, name: str) -> dict[str, list[str]]:
    """Entries with stripped expressions and unique counterparts; every mistake is named."""
    entries: dict[str, list[str]] = {}
    for number, (key, values) in enumerate(pairs, start=1):
        if not isinstance(key, str) or not key.strip():
            raise UserError(f"{name}, entry {number}: the expression is empty; remove it or fill it in.")
        expression = key.strip()
        if expression in entries:
            raise UserError(
                f"{name}, entry {number}: the expression {expression!r} is there twice; merge the two "
                "entries."
            )
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, (list, tuple)) or isinstance(values, _Pairs) or not values:
            raise UserError(
                f"{name}, {expression!r}: no counterpart; write a string or a non-empty list of strings."
            )
        for value in values:
            if not isinstance(value, str) or not value.strip():
                raise UserError(
                    f"{name}, {expression!r}: a counterpart is empty or not a string; fill it in."
                )
            if value.strip() == expression:
                raise UserError(
                    f"{name}, {expression!r}: the counterpart equals the expression; choose a generic one."
                )
        entries[expression] = list(dict.fromkeys(value.strip() for value in values))
    if not entries:
        raise UserError(
            f"{name}: the dictionary has no entries; add expressions and their generic counterparts."
        )
    return entries


def _letter_pairs(word: str) -> set[str]:
    spelled = f" {word} ".lower()
    return {spelled[i : i + 2] for i in range(len(spelled) - 1)}


def _as_tokenised(expression: str, tokenizer: Tokenizer) -> bytes:
    spelled = b"".join(map(tokenizer.token_bytes, tokenizer.encode_inside(expression)))
    try:
        spelled.decode()
    except (
        UnicodeDecodeError
    ):  # an unknown character: the token stream cannot spell it, so nothing will match
        return expression.encode()
    return spelled or expression.encode()


def _is_word_character(character: str) -> bool:
    return bool(_word_characters()[ord(character)])


@functools.cache
def _word_characters() -> np.ndarray:
    """bool [0x110000]: letters, digits, marks and the underscore, in scripts that put spaces between
    words.
    """
    table = np.fromiter((unicodedata.category(chr(c))[0] in "LNM" for c in range(0x110000)), dtype=np.bool_)
    table[ord("_")] = True
    for first, last in _NO_WORD_SPACES:
        table[first : last + 1] = False
    return table


@njit(cache=True)
def _code_point_at(text, position):
    """The code point that starts at a byte, or -1 for a broken one."""
    lead = text[position]
    if lead < 0x80:
        return np.int64(lead)
    length = 2 if 0xC0 <= lead < 0xE0 else (3 if 0xE0 <= lead < 0xF0 else (4 if 0xF0 <= lead < 0xF8 else 0))
    if length == 0 or position + length > len(text):
        return np.int64(-1)
    code = np.int64(lead) & (0xFF >> (length + 1))
    for k in range(1, length):
        if text[position + k] & 0xC0 != 0x80:
            return np.int64(-1)
        code = (code << 6) | (np.int64(text[position + k]) & 0x3F)
    return code if code < 0x110000 else np.int64(-1)


@njit(cache=True)
def _word_before(text, position, floor, words):
    """Whether the character that ends at ``position`` is a word character (not before ``floor``)."""
    start = position - 1
    while start > floor and position - start < 4 and text[start] & 0xC0 == 0x80:
        start -= 1
    if start < floor:
        return False
    code = _code_point_at(text[:position], start)
    return code >= 0 and words[code]


@njit(cache=True)
def _valid(text, candidates, needs_edge, words, block_starts):
    """bool [n]: candidates at word boundaries that stay inside a block (when ``block_starts`` is given)."""
    keep = np.ones(len(candidates), dtype=np.bool_)
    for k in range(len(candidates)):
        pattern, start, end = candidates[k]
        floor, ceiling = np.int64(0), np.int64(len(text))
        if len(block_starts):
            block = np.searchsorted(block_starts, start, side="right")
            floor, ceiling = block_starts[block - 1], block_starts[block]
            if end > ceiling:
                keep[k] = False
                continue
        if needs_edge[pattern, 0] and _word_before(text, start, floor, words):
            keep[k] = False
        elif needs_edge[pattern, 1] and end < ceiling:
            code = _code_point_at(text[:ceiling], end)
            if code >= 0 and words[code]:
                keep[k] = False
    return keep


@njit(cache=True)
def _leftmost_longest(candidates):
    """Of candidates ordered by (start, longest first), those that stand when matches may not overlap."""
    chosen = np.zeros(len(candidates), dtype=np.bool_)
    free_from = np.int64(-1)
    for k in range(len(candidates)):
        if candidates[k, 1] >= free_from:
            chosen[k] = True
            free_from = candidates[k, 2]
    return candidates[chosen]


if __name__ == "__main__":
    from whp_fast.extraction.command import main

    sys.exit(main())
