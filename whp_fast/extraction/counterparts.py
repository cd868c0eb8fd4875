"""Generic counterparts from the background: same kind, number and capitals, none idiosyncratic itself.

Names come from the background's names, the widely spread first; a phrase keeps its generic words ("Street")
and gets counterparts for the others, the same ones as the expressions inside it; a common word gets words
that stand in like company. Two expressions that occur together never share a counterpart.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from whp_fast.extraction.candidates import SEGMENT_WORDS
from whp_fast.extraction.english import (
    ADVERBS,
    FUNCTION_WORDS,
    GROUP_NOUNS,
    NUMBERS,
    PLACE_NOUNS,
    RANKS,
    TITLES,
    WORLD,
)
from whp_fast.extraction.kinds import Context, Kind, count_votes, kind_of
from whp_fast.extraction.spellings import Candidate, is_initials
from whp_fast.extraction.words import Counts, Texts, is_shouted

POOL_WORDS = 3_000_000
"""Counterparts are looked for in so many words of the background."""
TOGETHER_WORDS = 1000
"""Expressions within so many words of each other occur together."""
_CASES = 40  # occurrences looked at per word
_NEIGHBOURS = 4
_LEAST_DETERMINED = 0.35  # of a noun's occurrences in the background, those behind an article or the like
_MANY_SEGMENTS, _LEAST_SPREAD = 10, 0.15
_NOT_NOUNS = FUNCTION_WORDS | ADVERBS | NUMBERS | WORLD | TITLES
# Which pools serve a kind, the best first.
_POOLS = {
    "person": ("person", "name"),
    "name": ("name", "person"),
    "place": ("place", "name", "person"),
    "group": ("group", "place", "name", "person"),
    "thing": ("thing", "group", "name", "place", "person"),
}


@dataclass(frozen=True)
class Offer:
    """A word of the background that can stand for others."""

    word: str
    kind: Kind
    documents: int
    spread: float
    determined: float


class Pool:
    """The words of the background that may be counterparts.

    Args:
        background: its texts.
        counts: of the background.
        corpus: counts of the corpus.
    """

    def __init__(self, background: Texts, counts: Counts, corpus: Counts):
        self.counts, self.corpus = counts, corpus
        self.company: dict[str, Counter] = {}
        places: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        segments: dict[str, set[int]] = defaultdict(set)
        contexts: list[Context] = []
        base = 0
        wanted = self._wanted_names() | self._wanted_words()
        for d, words in enumerate(background):
            contexts.append(Context(words))
            for i, form in enumerate(contexts[-1].plain):
                if form in wanted:
                    segments[form].add((base + i) // SEGMENT_WORDS)
                    if len(places[form]) < _CASES and not (words.opening[i] and form[:1].isupper()):
                        places[form].append((d, i, i))
            base += len(words)
            if base > POOL_WORDS:
                break
        self.names: list[Offer] = []
        self.words: list[Offer] = []
        for word in sorted(places):
            votes = count_votes(contexts, places[word])
            kind, articles = kind_of(word, votes, counts.forms), votes["the"] + votes["determined"]
            spread = len(segments[word]) / counts.forms[word]
            offer = Offer(word, kind, counts.documents[word.lower()], spread, articles / max(1, votes["n"]))
            (self.names if word[0].isupper() else self.words).append(offer)
            if word[0].islower():
                self.company[word] = self.weighed(company(contexts, places[word]))
        if base >= _MANY_SEGMENTS * SEGMENT_WORDS:  # heroes of one book are no generic names
            self.names = [offer for offer in self.names if offer.spread >= _LEAST_SPREAD]
        self.names.sort(key=lambda o: (-o.documents, -min(o.spread, 0.5), -counts.named[o.word], o.word))

    def weighed(self, found: Counter) -> dict[str, float]:
        """A company as a vector of length one, rare words weighing more."""
        total = self.counts.words
        weights = {
            feature: math.log1p(n) * math.log(1 + total / (self.counts.folded[feature.lstrip("<>")] + 1))
            for feature, n in found.items()
        }
        norm = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        return {feature: weight / norm for feature, weight in weights.items()}

    def _wanted_names(self) -> set[str]:
        return {
            word
            for word, n in self.counts.named.items()
            if n >= 3
            and n > 10 * self.counts.forms[word.lower()]
            and not (word.endswith("s") and self.counts.folded[word[:-1].lower()])
            and word.isalpha()
            and 2 < len(word)
            and not is_shouted(word)
            and word.lower() not in _NOT_NOUNS | PLACE_NOUNS | GROUP_NOUNS
            and not self.corpus.folded[word.lower()]
        }

    def _wanted_words(self) -> set[str]:
        """Common words that the corpus has no more of than twice what the background has."""
        most = 2 * self.corpus.words / max(1, self.counts.words)
        return {
            word
            for word, n in self.counts.forms.items()
            if n >= 4
            and word[:1].islower()
            and word.isalpha()
            and 3 < len(word)
            and word not in _NOT_NOUNS
            and self.corpus.folded[word] <= most * n
            and 4 * self.counts.named[word.capitalize()] < n
        }


def company(contexts: Sequence[Context], places: Iterable[tuple[int, int, int]]) -> Counter:
    """The words around occurrences: direct neighbours with their side, content words nearby without."""
    found: Counter[str] = Counter()
    for d, first, last in places:
        folded = contexts[d].folded
        for i in range(max(0, first - _NEIGHBOURS), min(len(folded), last + _NEIGHBOURS + 1)):
            if i == first - 1:
                found["<" + folded[i]] += 1
            elif i == last + 1:
                found[">" + folded[i]] += 1
            if not first <= i <= last and folded[i] not in FUNCTION_WORDS:
                found[folded[i]] += 1
    return found


class Assignment:
    """Gives every candidate its counterparts.

    Args:
        candidates: with their places.
        kinds: of each candidate, by expression.
        contexts: of the corpus.
        pool: of the background.
        generic: words of names that stay as they are in phrases.
        alternatives: counterparts each, at most.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        kinds: Mapping[str, Kind],
        contexts: Sequence[Context],
        pool: Pool,
        generic: set[str],
        alternatives: int = 3,
    ):
        self.candidates, self.kinds, self.contexts, self.pool = candidates, kinds, contexts, pool
        self.generic, self.alternatives = generic, alternatives
        self.keys = {c.plain for c in candidates} | {c.expression for c in candidates}
        self.windows = windows_of(candidates, [len(context.folded) for context in contexts])
        self.widened = {e: w | {x - 1 for x in w} | {x + 1 for x in w} for e, w in self.windows.items()}
        self.users: dict[str, set[str]] = defaultdict(set)
        self.found: dict[str, list[str]] = {}

    def run(self, given: Mapping[str, Counter] | None = None) -> dict[str, list[str]]:
        """expression -> counterparts; expressions for which nothing was found are left out.

        Args:
            given: counterparts of another source with their votes, preferred where they may be used.
        """
        for candidate in sorted(self.candidates, key=self._simple_first):
            offers = self._checked((given or {}).get(candidate.expression, Counter()), candidate)
            offers = offers or self._offers(candidate)
            if offers:
                self.found[candidate.expression] = offers
                for offer in offers:
                    self.users[offer].add(candidate.expression)
        return {c.expression: self.found[c.expression] for c in self.candidates if c.expression in self.found}

    def _simple_first(self, candidate: Candidate) -> tuple:
        """What others are made of comes first, and of that the frequent, which meet most others."""
        bare = candidate.plain
        return (
            is_shouted(bare),
            bare.count(" "),
            bare.endswith("s") and bare[:-1] in self.keys,
            -candidate.count,
            candidate.expression,
        )

    def _offers(self, candidate: Candidate) -> list[str]:
        kind, bare = self.kinds[candidate.expression], candidate.plain
        by_plain = {c.plain: self.found[c.expression] for c in self.candidates if c.expression in self.found}
        if bare in by_plain:  # the same words written in another way
            return by_plain[bare]
        if is_initials(bare):
            return self._initials(candidate)
        if kind.form == "capitals":
            usual = next((p for p in by_plain if p.upper() == bare), None)
            return [value.upper() for value in by_plain[usual]] if usual else []
        if kind.form == "lower":
            return self._words(candidate, kind)
        if bare.endswith("s") and bare[:-1] in by_plain:
            return [plural(value) for value in by_plain[bare[:-1]]]
        if " " not in bare:
            return self._names(candidate, kind, self.alternatives)
        return self._phrase(candidate, kind, by_plain)

    def _checked(self, votes: Counter, candidate: Candidate) -> list[str]:
        """Of counterparts from elsewhere those that hold no expression and meet no other's."""
        ordered = sorted(votes, key=lambda value: (-votes[value], value))
        free = [v for v in ordered if self._is_free(v, candidate, True) and self.keys.isdisjoint(v.split())]
        return free[: self.alternatives]

    def _phrase(self, candidate: Candidate, kind: Kind, by_plain: Mapping[str, list[str]]) -> list[str]:
        """A phrase with its generic words kept and the others replaced."""
        parts = candidate.plain.split()
        replaced = [i for i, p in enumerate(parts) if not self._stays(p)] or [0]
        if kind.name != "person" and len(replaced) == len(parts):
            return self._names(candidate, kind, self.alternatives)
        columns: dict[int, list[str]] = {}
        for i in replaced:
            part_kind = Kind("person", kind.gender) if kind.name == "person" else Kind("place")
            columns[i] = by_plain.get(parts[i]) or self._names(
                candidate, part_kind, self.alternatives, {v for column in columns.values() for v in column}
            )
        rows = min((len(column) for column in columns.values()), default=0)
        return [
            " ".join(columns[i][k] if i in columns else p for i, p in enumerate(parts)) for k in range(rows)
        ]

    def _stays(self, part: str) -> bool:
        folded = part.rstrip(".").lower()
        if part in self.keys:
            return False
        generic = part.rstrip(".") in self.generic and folded not in WORLD - {"st"}
        return generic or not part[:1].isupper() or folded in RANKS

    def _names(self, candidate: Candidate, kind: Kind, n: int, besides: Iterable[str] = ()) -> list[str]:
        taken, chosen = set(besides), []
        pools = _POOLS.get(kind.name, ("name", "person"))
        levels = [
            [
                o
                for o in self.pool.names
                if o.kind.name == name
                and (not strict or o.kind.gender == kind.gender)
                and (o.kind.plural == kind.plural or not o.kind.plural)
            ]
            for name in pools
            for strict in ((True, False) if kind.gender else (False,))
        ]
        other = {"male": "female", "female": "male"}.get(kind.gender)
        for reuse in (False, True):
            for level in levels:
                for offer in level:
                    word = plural(offer.word) if kind.plural and not offer.kind.plural else offer.word
                    if len(chosen) == n:
                        return chosen
                    if word in taken or (other and offer.kind.gender == other):
                        continue
                    if self._is_free(word, candidate, reuse):
                        chosen.append(word)
                        taken.add(word)
        return chosen

    def _is_free(self, word: str, candidate: Candidate, reuse: bool) -> bool:
        users = self.users.get(word, set()) - {candidate.expression}
        if word in self.keys or (users and not reuse):
            return False
        own = self.widened[candidate.expression]
        return all(own.isdisjoint(self.windows[user]) for user in users)

    def _words(self, candidate: Candidate, kind: Kind) -> list[str]:
        """Common words of the same kind and number in like company."""
        own = self.pool.weighed(company(self.contexts, candidate.places))
        parts = candidate.plain.split()
        head = (
            len(parts) > 1
            and parts[-1] not in self.keys
            and self.pool.corpus.forms[parts[-1]] > (3 * candidate.count)
        )
        scored = []
        for offer in self.pool.words:
            same = offer.kind.name == kind.name and offer.kind.plural == kind.plural
            if kind.name == "thing" and not kind.plural and offer.determined < _LEAST_DETERMINED:
                continue
            if not same or offer.kind.ending != kind.ending or offer.word in parts:
                continue
            other = self.pool.company[offer.word]
            likeness = sum(weight * other.get(feature, 0.0) for feature, weight in own.items())
            scored.append((-likeness, offer.word))
        chosen: list[str] = []
        for reuse in (False, True):
            for _, word in sorted(scored):
                value = " ".join([word, parts[-1]]) if head else word
                if len(chosen) < self.alternatives and value not in chosen:
                    if self._is_free(value, candidate, reuse):
                        chosen.append(value)
        return chosen

    def _initials(self, candidate: Candidate) -> list[str]:
        """Other letters, the first ones of names of the background."""
        letters = [name[0] for name in (o.word for o in self.pool.names) if name[0] not in candidate.plain]
        n = len(candidate.plain.split())
        rows = [letters[k * n : (k + 1) * n] for k in range(self.alternatives)]
        values = [" ".join(f"{letter}." for letter in row) for row in rows if len(row) == n]
        return [value for value in dict.fromkeys(values) if self._is_free(value, candidate, True)]


def windows_of(candidates: Iterable[Candidate], lengths: Sequence[int]) -> dict[str, set[int]]:
    """The stretches of TOGETHER_WORDS words in which each expression stands; documents never share one."""
    bases = [0]
    for length in lengths:
        bases.append(bases[-1] + (length // TOGETHER_WORDS + 3) * TOGETHER_WORDS)
    return {c.expression: {(bases[d] + i) // TOGETHER_WORDS for d, i, _ in c.places} for c in candidates}


def plural(name: str) -> str:
    """The plural of a name, as families have it."""
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")
