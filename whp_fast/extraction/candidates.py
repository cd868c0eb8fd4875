"""Expressions that a corpus uses and its background does not: names, their phrases, common words, word pairs.

A candidate is kept for its log-likelihood ratio (Dunning 1993, "Accurate methods for the statistics of
surprise and coincidence") and for how many times more frequent it is in the corpus. Names are told by
capitals where a common word would have none. Words without capitals must besides be bursty: a thing that
belongs to a story is spoken of again and again in one place, a word of the author's language is spread.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from whp_fast.extraction.english import (
    FUNCTION_WORDS,
    GROUP_NOUNS,
    NUMBERS,
    PLACE_NOUNS,
    RANKS,
    TITLES,
    WORLD,
)
from whp_fast.extraction.kinds import Context, count_votes, kind_of, leans_to_place
from whp_fast.extraction.spellings import LONGEST_PHRASE, Candidate, shouted, spellings
from whp_fast.extraction.words import (
    DOTTED,
    JOINED,
    Counts,
    Texts,
    Words,
    count_phrases,
    is_capitalised,
    is_shouted,
    plain,
)

SEGMENT_WORDS = 5000
"""Burstiness is measured over segments of so many words, shorter ones in a corpus of less than 20."""
LARGE_BACKGROUND = 1_000_000
"""From so many words on, a background is trusted to hold the common words of the language."""
OFTEN = 5e-4
"""A word that is so large a part of the corpus and not in the background at all needs no bursts."""
_HEADING_CHARACTERS = 40
_CONNECTORS = frozenset({"of", "the", "and", "&", "de", "von", "van", "la", "du"})


@dataclass(frozen=True)
class Limits:
    """What a candidate must reach.

    Attributes:
        count: occurrences in the corpus.
        log_likelihood: 6.63 is one chance in a hundred, 10.83 one in a thousand.
        ratio: frequency in the corpus over that in the background (half an occurrence is added there).
        burst: for expressions without a capital: how many times fewer segments they stand in than they would
            at random.
        common_count, common_score: for single words without a capital.
        common_ratio: single words without a capital need not come in bursts from this ratio on, if the
            background is large.
        parts: no phrase that holds a name of its own, but the name: "Baker" for "Baker Street". What follows
            an inner word of an expression is never trained, so a model goes on saying it.
    """

    count: int = 3
    log_likelihood: float = 6.63
    ratio: float = 5.0
    burst: float = 2.5
    common_count: int = 5
    common_score: float = 10.83
    common_ratio: float = 30.0
    parts: bool = False


def log_likelihood_ratio(n: int, total: int, n_background: int, total_background: int) -> float:
    """Dunning's ratio of a word's two frequencies, negative where the background has more of it."""
    rows = ((n, total), (n_background, total_background))
    rate = (n + n_background) / (total + total_background)
    score = 0.0
    for k, size in rows:
        for observed, expected in ((k, size * rate), (size - k, size * (1 - rate))):
            if observed:
                score += observed * math.log(observed / expected)
    return 2 * score if n * total_background >= n_background * total else -2 * score


class Finder:
    """Finds the candidates of a corpus.

    Args:
        corpus: its documents.
        background: the background.
        limits: what a candidate must reach.
    """

    def __init__(self, corpus: Sequence[Words], background: Texts, limits: Limits):
        self.corpus, self.limits = corpus, limits
        self.counts, self.background = Counts.of(corpus), Counts.of(background)
        self._background_texts = background
        self.contexts = [Context(words) for words in corpus]
        self.spans = [span for d in range(len(corpus)) for span in self._spans(d)]
        self.generic, self.shared_first_names = self._generic_parts()
        self._places_of_phrases: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        self._segment_words = max(200, min(SEGMENT_WORDS, self.counts.words // 20))

    def find(self) -> list[Candidate]:
        """The candidates, most telling first."""
        names = self._names()
        phrases = self._name_phrases(names)
        found = self._settled(names, phrases)
        found += self._words({c.plain.lower() for c in found})
        found += self._word_pairs()
        found = spellings(found, self.contexts, self.limits.count)
        found += shouted(found, self.contexts, self.limits.count)
        unique = {candidate.expression: candidate for candidate in found}
        return sorted(unique.values(), key=lambda c: (-c.log_likelihood, c.expression))

    def given(self, expressions: Iterable[str]) -> list[Candidate]:
        """Expressions of another source as candidates, without those the background has as well."""
        names = [Candidate(e, plain(e), 0.0, 0.0, e[:1].isupper()) for e in expressions]
        found = spellings(names, self.contexts, 1)
        common = count_phrases(self._background_texts, {c.plain for c in found})
        kept = {}
        for candidate in found:
            ratio, score = self._compare(candidate.count, common[candidate.plain])
            if ratio >= self.limits.ratio:
                kept[candidate.expression] = replace(candidate, log_likelihood=score)
        return sorted(kept.values(), key=lambda c: (-c.log_likelihood, c.expression))

    def score(self, n: int, n_background: int) -> float | None:
        """The log-likelihood ratio if both it and the ratio of frequencies reach the limits."""
        if n < self.limits.count:
            return None
        ratio, score = self._compare(n, n_background)
        return score if score >= self.limits.log_likelihood and ratio >= self.limits.ratio else None

    def _compare(self, n: int, n_background: int) -> tuple[float, float]:
        """The ratio of frequencies and the log-likelihood ratio."""
        own, other = max(1, self.counts.words), max(1, self.background.words)
        return (n / own) / ((n_background + 0.5) / other), log_likelihood_ratio(n, own, n_background, other)

    def is_name(self, word: str) -> bool:
        """Whether a word with a capital is a name rather than a common word in a special position."""
        folded = word.lower()
        if folded in FUNCTION_WORDS or not word[:1].isupper():
            return False
        return self.counts.named[word] > 2 * self.counts.forms[folded]

    def _spans(self, d: int) -> list[tuple[int, int, int]]:
        """Runs of words with capitals (document, first, last) without leading titles; of headings none."""
        words, spans, i = self.corpus[d], [], 0
        forms = [plain(form) for form in words.forms]
        while i < len(forms):
            if not self._may_begin(words, forms, i):
                i += 1
                continue
            last = j = i
            while j + 1 < len(forms) and words.before[j + 1] in (JOINED, DOTTED):
                j += 1
                if words.follows_short_line(j, _HEADING_CHARACTERS):
                    break  # that line is a heading, not a wrapped one
                if is_capitalised(words.forms[j]) and not is_shouted(forms[j]) and forms[j] != "I":
                    last = j
                elif forms[j] not in _CONNECTORS or j - last > 2 or (forms[j] == "the" and j - last == 1):
                    break
            first = i
            while first < last and forms[first].lower() in TITLES - {"saint"}:
                first += 1
            spans.append((d, first, last))
            i = last + 1
        return spans

    def _may_begin(self, words: Words, forms: list[str], i: int) -> bool:
        form = forms[i]
        if not is_capitalised(words.forms[i]) or form == "I":
            return False
        if form.lower() in (FUNCTION_WORDS if words.opening[i] else FUNCTION_WORDS - NUMBERS):
            return False
        if is_shouted(form) and "." not in form:
            return False
        return not words.opening[i] or self.is_name(form) or form.lower() in TITLES

    def _generic_parts(self) -> tuple[set[str], set[str]]:
        """Words that many different names share (titles before them, kinds of places behind them), and first
        names of three persons or more, which tell of none."""
        after, before = defaultdict(set), defaultdict(set)
        total: Counter[str] = Counter()
        for d, first, last in self.spans:
            forms = [plain(form) for form in self.corpus[d].forms[first : last + 1]]
            total.update(forms)
            for one, other in zip(forms, forms[1:]):
                after[one].add(other)
                before[other].add(one)
        shared = {w for w in total if len(after[w]) >= 5 or len(before[w]) >= 4}
        known = PLACE_NOUNS | GROUP_NOUNS | TITLES | WORLD
        generic = {w for w in total if w.lower() in known}
        generic |= {w for w in shared if self.counts.forms[w.lower()]}
        first = {
            w
            for w, others in after.items()
            if sum(self.is_name(o) and o not in generic for o in others) >= 3 and self.background.named[w]
        }
        return generic, first

    def _names(self) -> dict[str, Candidate]:
        """Single names."""
        names = {}
        for word, n in self.counts.named.items():
            if len(word) < 2 or not self.is_name(word) or word.lower() in WORLD | TITLES or "'" in word:
                continue
            if self.limits.parts and word.lower() in PLACE_NOUNS:
                continue  # of "Baker Street" the telling part alone
            initials = word.count(".")
            if initials in (1, 2) or (is_shouted(word) and not initials) or word in self.shared_first_names:
                continue
            if word in self.generic and (n < 10 or self.counts.forms[word.lower()] > 0.1 * n):
                continue
            if not self.counts.forms[word.lower()] and not self.background.folded[word.lower()]:
                n = self.counts.forms[word]  # never a common word, so that every capital counts
            score = self.score(n, self.background.named[word])
            if score is not None:
                names[word] = Candidate(word, word, score, 0.0, True)
        return names

    def _name_phrases(self, names: dict[str, Candidate]) -> dict[str, Candidate]:
        """Phrases of two to four words with capitals, and runs of initials."""
        standing: Counter[str] = Counter()
        inside: Counter[str] = Counter()
        for d, first, last in self.spans:
            words = self.corpus[d]
            standing[plain(words.phrase(first, last))] += 1
            for i in range(first, last):
                for j in range(i + 1, min(i + LONGEST_PHRASE + 2, last + 1)):
                    phrase = plain(words.phrase(i, j))
                    inside[phrase] += 1
                    self._places_of_phrases[phrase].append((d, i, j))
        phrases = {}
        wanted = [
            phrase
            for phrase, n in inside.items()
            if n >= self.limits.count and standing[phrase] >= 2 and self._is_phrase(phrase)
        ]
        in_background = count_phrases(self._background_texts, wanted)
        for phrase in wanted:
            sides = re.split(" (?:and|of) ", phrase)
            if len(sides) > 1 and all(standing[side] > 1 or side in names for side in sides):
                continue  # two names side by side
            score = self.score(inside[phrase], in_background[phrase])
            if score is not None:
                phrases[phrase] = Candidate(phrase, phrase, score, 0.0, True)
        return phrases

    def _is_phrase(self, phrase: str) -> bool:
        parts = phrase.split()
        if not parts[0][:1].isupper() or parts[0].rstrip(".").lower() in TITLES:
            return False
        capitals = [p for p in parts if p[:1].isupper()]
        if len(capitals) < 2 or parts[-1].lower() in FUNCTION_WORDS | _CONNECTORS:
            return False
        folded = [p.rstrip(".").lower() for p in capitals]
        return not all(p in RANKS | WORLD for p in folded) and not all(p in FUNCTION_WORDS for p in folded)

    def _settled(self, names: dict[str, Candidate], phrases: dict[str, Candidate]) -> list[Candidate]:
        """Names and phrases that go together: of persons the parts, of other things the whole."""
        kept, persons = {}, set()
        candidate_count = {phrase: len(self._places_of_phrases[phrase]) for phrase in phrases}
        for phrase, candidate in phrases.items():
            parts = phrase.split()
            own = [part for part in parts if part in names]
            if own and self.limits.parts:
                continue
            if own and not self._stays_whole(phrase):
                if len(own) == len(parts):
                    continue
                # the one name in it never stands without the rest, and says all
                if any(self.counts.named[part] <= candidate_count[phrase] + 1 for part in own):
                    continue
                persons.add(phrase)
            kept[phrase] = candidate
        containing = defaultdict(set)
        covered: Counter[str] = Counter()
        for d, first, last in self.spans:
            words, i = self.corpus[d], first
            while i <= last:
                for j in range(last, i - 1, -1):
                    phrase = plain(words.phrase(i, j))
                    if j > i and phrase in kept and phrase not in persons:
                        for form in words.forms[i : j + 1]:
                            covered[plain(form)] += 1
                            containing[plain(form)].add(phrase)
                        i = j
                        break
                i += 1
        for name in list(names):
            alone = self.counts.named[name] - covered[name]
            around = containing[name]
            shortest = [p for p in around if not any(o != p and f" {o} " in f" {p} " for o in around)]
            if alone < 2 and len(shortest) == 1:
                del names[name]
        return [*names.values(), *kept.values()]

    def _stays_whole(self, phrase: str) -> bool:
        """Whether a phrase whose words are all names is no person's name, told by its context."""
        if "." in phrase or not _CONNECTORS.isdisjoint(phrase.split()):
            return True
        votes = count_votes(self.contexts, self._places_of_phrases[phrase])
        kind = kind_of(phrase, votes, self.counts.forms).name
        if kind == "thing":
            return votes["the"] > 0.6 * votes["n"]
        return kind in ("place", "group") or (kind == "name" and leans_to_place(votes))

    def _words(self, taken: set[str]) -> list[Candidate]:
        """Common words that are rare in the background and come in bursts."""
        segments = self._segments()
        found = []
        for word, n in self.counts.forms.items():
            if not word[:1].islower() or word in taken or len(word) < 3 or "'" in word[-3:]:
                continue
            if word in FUNCTION_WORDS or word in WORLD or self.counts.named[word.capitalize()] > n:
                continue
            if n < self.limits.common_count:
                continue
            score = self.score(n, self.background.folded[word])
            burst = self._burst(n, len(segments[word]))
            if score is None or score < self.limits.common_score:
                continue
            if burst >= self.limits.burst or self._is_foreign(word, n):
                found.append(Candidate(word, word, score, burst, False))
        return found

    def _word_pairs(self) -> list[Candidate]:
        """Two common words that stand together far more often than apart, and in bursts."""
        pairs: Counter[tuple[str, str]] = Counter()
        segments = defaultdict(set)
        base = 0
        for words in self.corpus:
            forms = [plain(form) for form in words.forms]
            for i in range(1, len(forms)):
                one, other = forms[i - 1], forms[i]
                if words.before[i] == JOINED and self._is_content(one) and self._is_content(other):
                    if words.possessive[i - 1]:
                        continue
                    pairs[one, other] += 1
                    segments[one, other].add((base + i) // self._segment_words)
            base += len(forms)
        wanted = {}
        for (one, other), n in pairs.items():
            burst = self._burst(n, len(segments[one, other]))
            least = min(self.counts.forms[one], self.counts.forms[other])
            if n >= self.limits.count and burst >= self.limits.burst and n >= 0.3 * least:
                wanted[f"{one} {other}"] = n, burst
        in_background = count_phrases(self._background_texts, wanted)
        found = []
        for phrase, (n, burst) in wanted.items():
            score = self.score(n, in_background[phrase])
            if score is not None:
                found.append(Candidate(phrase, phrase, score, burst, False))
        return found

    def _is_content(self, form: str) -> bool:
        return form[:1].islower() and len(form) > 2 and form not in FUNCTION_WORDS and form.isalpha()

    def _burst(self, n: int, segments: int) -> float:
        total = max(1.0, self.counts.words / self._segment_words)
        return total * (1 - (1 - 1 / total) ** n) / max(1, segments)

    def _is_foreign(self, word: str, n: int) -> bool:
        """Whether the background would have the word if it were a common one."""
        if not self.background.folded[word] and n >= OFTEN * self.counts.words:
            return True
        large = self.background.words >= LARGE_BACKGROUND
        return large and self._compare(n, self.background.folded[word])[0] >= self.limits.common_ratio

    def _segments(self) -> dict[str, set[int]]:
        segments, base = defaultdict(set), 0
        for words in self.corpus:
            for i, form in enumerate(words.forms):
                segments[plain(form)].add((base + i) // self._segment_words)
            base += len(words)
        return segments
