"""A candidate expression, its places, and the ways it is written."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from whp_fast.extraction.kinds import Context
from whp_fast.extraction.words import plain

LONGEST_PHRASE = 4


@dataclass
class Candidate:
    """One expression and where it stands.

    Attributes:
        expression: as written in the corpus, underscores and apostrophes included.
        plain: as counted.
        log_likelihood: against the background.
        burst: how many times fewer segments it stands in than it would at random (0 for names).
        named: whether capitals made it a candidate.
        places: (document, first word, last word) of each occurrence.
        rise: mean rise of its log-probability by training on the corpus, nats; None if not measured.
    """

    expression: str
    plain: str
    log_likelihood: float
    burst: float
    named: bool
    places: list[tuple[int, int, int]] = field(default_factory=list)
    rise: float | None = None

    @property
    def count(self) -> int:
        return len(self.places)


def spellings(candidates: Sequence[Candidate], contexts: Sequence[Context], least: int) -> list[Candidate]:
    """Each candidate once for each way it is written, with its places (marks of italics belong to a word
    in matching, and apostrophes may be straight or curly)."""
    by_first = defaultdict(list)
    for candidate in candidates:
        by_first[_first_form(candidate.plain)].append((candidate, _further_words(candidate.plain)))
    written: dict[tuple[str, str], Candidate] = {}
    for d, context in enumerate(contexts):
        words = context.words
        for i, form in enumerate(context.plain):
            for candidate, more in by_first.get(form, ()):
                if i + more >= len(words) or not words.joined(i, i + more):
                    continue
                raw = words.phrase(i, i + more)
                if plain(raw) != candidate.plain:
                    continue
                if raw.startswith("_") != raw.endswith("_"):  # the name is part of longer italics
                    continue
                key = candidate.plain, raw
                if key not in written:
                    written[key] = replace(candidate, expression=raw, places=[])
                written[key].places.append((d, i, i + more))
    fullest: Counter[str] = Counter()
    for (name, _), candidate in written.items():
        fullest[name] = max(fullest[name], candidate.count)
    return [c for (n, _), c in written.items() if c.count >= min(least, fullest[n])]


def shouted(found: Sequence[Candidate], contexts: Sequence[Context], least: int) -> list[Candidate]:
    """Names in capitals throughout (headings, signatures) whose usual form is a candidate."""
    named = {c.plain.upper(): c for c in found if c.named and c.plain.upper() != c.plain}
    places = defaultdict(list)
    for d, context in enumerate(contexts):
        words = context.words
        for i, form in enumerate(context.plain):
            if not form.isupper():
                continue
            for more in range(LONGEST_PHRASE):
                if i + more < len(words) and words.joined(i, i + more):
                    raw = words.phrase(i, i + more)
                    if raw in named:
                        places[raw].append((d, i, i + more))
    return [
        replace(named[raw], expression=raw, plain=raw, places=where)
        for raw, where in sorted(places.items())
        if len(where) >= min(least, 2)
    ]


def _first_form(expression: str) -> str:
    """The first word of an expression as the texts' words have it: without the full stop behind "St."."""
    return expression.split()[0].rstrip(".") if not is_initials(expression) else expression


def _further_words(expression: str) -> int:
    return 0 if is_initials(expression) else expression.count(" ")


def is_initials(expression: str) -> bool:
    """Whether an expression is a run of single letters with full stops."""
    return all(len(part) == 2 and part[1] == "." for part in expression.split())
