"""What a dictionary does on a corpus, and what is wrong with it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from whp_fast.anchors import Dictionary, Matcher, load_dictionary
from whp_fast.extraction.counterparts import TOGETHER_WORDS
from whp_fast.extraction.english import FUNCTION_WORDS, GROUP_NOUNS, PLACE_NOUNS, TITLES

_GENERAL = FUNCTION_WORDS | PLACE_NOUNS | GROUP_NOUNS | TITLES | {"st"}


class Utf8:
    """Stands in for a tokenizer where expressions are matched in plain text: a token is a byte."""

    def encode_inside(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


@dataclass
class Findings:
    """What :func:`check` found.

    Attributes:
        words, covered_words: of the corpus, and inside matches.
        matches: occurrences of each expression (leftmost longest, across line ends).
        broken_by_lines: occurrences that only match with match_across_lines, by expression.
        never: expressions without an occurrence.
        hidden: expressions that occur, but only inside longer ones.
        leaks: (expression, counterpart, why).
        splittable: expressions that loading leaves out, or that stand in parts -> why.
    """

    words: int = 0
    covered_words: int = 0
    matches: dict[str, int] = field(default_factory=dict)
    broken_by_lines: dict[str, int] = field(default_factory=dict)
    never: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    leaks: list[tuple[str, str, str]] = field(default_factory=list)
    splittable: dict[str, str] = field(default_factory=dict)


def check(anchors: Path | Dictionary, documents: Sequence[str]) -> Findings:
    """Match a dictionary in a corpus and look for what goes wrong in training with it."""
    dictionary = load_dictionary(anchors)
    found = Findings(matches=dict.fromkeys(dictionary.expressions, 0), splittable=dict(dictionary.dropped))
    across, windows = Counter(), defaultdict(set)
    for d, document in enumerate(documents):
        data = document.encode()
        text = np.frombuffer(data, dtype=np.uint8)
        starts = np.array([m.start() for m in re.finditer(rb"\S+", data)], dtype=np.int64)
        found.words += len(starts)
        matches = _find(dictionary, text, match_across_lines=True)
        in_lines = Counter(_find(dictionary, text, match_across_lines=False)[:, 0].tolist())
        for which, begin, end in matches.tolist():
            first, last = np.searchsorted(starts, (begin, end), side="left")
            found.covered_words += max(1, int(last - first))
            windows[dictionary.expressions[which]].add((d, int(first) // TOGETHER_WORDS))
        counts = Counter(matches[:, 0].tolist())
        for which, n in counts.items():
            found.matches[dictionary.expressions[which]] += n
            across[dictionary.expressions[which]] += max(0, n - in_lines[which])
    found.broken_by_lines = {e: n for e, n in across.items() if n}
    text = "\n".join(" ".join(document.split()) for document in documents)
    for expression in (e for e, n in found.matches.items() if not n):
        (found.hidden if _stands(expression, text) else found.never).append(expression)
    found.leaks = _leaks(dictionary, text, windows)
    found.splittable |= _in_parts(dictionary)
    return found


def report(found: Findings, most: int = 20) -> list[str]:
    """The findings as lines."""
    total = sum(found.matches.values())
    lines = [
        f"coverage: {total} matches of {sum(n > 0 for n in found.matches.values())} of {len(found.matches)} "
        f"expressions, {100 * found.covered_words / max(1, found.words):.1f} % of {found.words} words"
    ]
    broken = sum(found.broken_by_lines.values())
    if broken:
        lines.append(f"broken by line ends: {broken} matches, found only with anchors.match_across_lines")
    lines += _listed("never matched", [repr(e) for e in found.never], most)
    lines += _listed("only inside longer expressions", [repr(e) for e in found.hidden], most)
    lines += _listed("counterparts that leak", [f"{e!r} -> {v!r}: {why}" for e, v, why in found.leaks], most)
    lines += _listed("splittable", [f"{e!r}: {why}" for e, why in found.splittable.items()], most)
    return lines


def _listed(title: str, items: list[str], most: int) -> list[str]:
    shown = [f"  {item}" for item in items[:most]]
    more = [f"  … and {len(items) - most} more"] if len(items) > most else []
    return [f"{title}: {len(items)}", *shown, *more]


def _find(dictionary: Dictionary, text: np.ndarray, *, match_across_lines: bool) -> np.ndarray:
    matcher = Matcher(dictionary, Utf8(), match_across_lines=match_across_lines)
    return matcher.find(text, np.array([0, len(text)]), 0, len(text), across=True)


def _leaks(dictionary: Dictionary, text: str, windows: dict) -> list[tuple[str, str, str]]:
    """Counterparts by which something of the corpus comes back."""
    leaks, users = [], defaultdict(list)
    matcher = Matcher(dictionary, Utf8())
    for expression, values in dictionary.entries.items():
        own = {w.lower() for w in re.findall(r"\w+", expression.replace("_", " ")) if len(w) > 2} - _GENERAL
        for value in values:
            users[value].append(expression)
            data = np.frombuffer(value.encode(), dtype=np.uint8)
            inside = matcher.find(data, np.array([0, len(data)]), 0, len(data), across=True)
            shared = own & {w.lower() for w in re.findall(r"\w+", value)}
            if len(inside):
                other = dictionary.expressions[inside[0, 0]]
                leaks.append((expression, value, f"holds the expression {other!r}"))
            elif shared and expression[:1].isupper():
                leaks.append((expression, value, f"keeps {min(shared)!r} of its expression"))
            elif value[:1].isupper() and _stands(value, text):
                leaks.append((expression, value, "is a name in the corpus"))
    for value, expressions in users.items():
        for i, one in enumerate(expressions):
            for other in expressions[i + 1 :]:
                if windows[one] & windows[other]:
                    leaks.append((one, value, f"also stands for {other!r}, which occurs near it"))
    return leaks


def _in_parts(dictionary: Dictionary) -> dict[str, str]:
    """Phrases that are made of other expressions in part, so that both spellings are translated apart."""
    found = {}
    for expression, values in dictionary.entries.items():
        parts = expression.split()
        own = [p for p in parts if p in dictionary.entries]
        if len(parts) < 2 or not own:
            continue
        if not any(v.split()[-1] in dictionary.entries[p] for p in own for v in values) and not any(
            v.split()[0] in dictionary.entries[p] for p in own for v in values
        ):
            found[expression] = f"{own[0]!r} is an expression too, with other counterparts"
    return found


def _stands(expression: str, text: str) -> bool:
    return expression in text and re.search(rf"(?<!\w){re.escape(expression)}(?!\w)", text) is not None
