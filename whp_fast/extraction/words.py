"""Texts as words: where they stand, what is between them, and whether a capital says anything."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# A word holds single hyphens and apostrophes inside; underscores (italics of plain-text books) belong to it,
# as they do in matching. A dotted run of initials is one word.
_WORD = re.compile(r"(?:(?<![\w.])(?:[^\W\d_]\.[ ]?){2,}(?=\W|$))|&|\w+(?:['\u2019-]\w+)*", re.UNICODE)
_POSSESSIVE = re.compile(r"['\u2019][sS]$")
_INITIALS = re.compile(r"(?:[^\W\d_]\.[ ]?){2,}")
_ENDS_SENTENCE = re.compile(r"[.!?:;]|\n\s*\n|[\"\u201c\u201d\u2018*\[(]|--|\u2014|(?:^|\s)['_]")

JOINED, DOTTED, BROKEN = 0, 1, 2
"""What stands before a word: white space only; the full stop of an abbreviation; anything else."""


@dataclass
class Words:
    """The words of one document.

    Attributes:
        text: the document.
        forms: the words as written, without a possessive's ending.
        starts, ends: where they stand in ``text`` (characters; the ending of a possessive is left out).
        before: JOINED, DOTTED or BROKEN.
        opening: whether any word would have a capital here (start of a sentence, of a verse).
        possessive: whether a possessive's ending follows.
    """

    text: str
    forms: list[str]
    starts: list[int]
    ends: list[int]
    before: list[int]
    opening: list[bool]
    possessive: list[bool]

    def __len__(self) -> int:
        return len(self.forms)

    def phrase(self, first: int, last: int) -> str:
        """The text of words ``first`` to ``last`` with single spaces."""
        return " ".join(self.text[self.starts[first] : self.ends[last]].split())

    def joined(self, first: int, last: int) -> bool:
        """Whether words ``first`` to ``last`` follow each other with nothing but space or abbreviations'
        full stops between."""
        return all(self.before[i] != BROKEN for i in range(first + 1, last + 1))

    def follows_short_line(self, i: int, characters: int) -> bool:
        """Whether a line of at most so many characters ends right before word ``i``."""
        end = self.text.rfind("\n", self.ends[i - 1], self.starts[i])
        return end >= 0 and end - self.text.rfind("\n", 0, self.starts[i - 1]) <= characters


def plain(form: str) -> str:
    """A word without marks of italics and with straight apostrophes, as it is counted."""
    return form.strip("_").replace("\u2019", "'")


def is_capitalised(form: str) -> bool:
    """Whether the first letter is a capital (of "_Lone", the L)."""
    return form.lstrip("_")[:1].isupper()


def is_shouted(form: str) -> bool:
    """Whether all of two letters or more are capitals."""
    letters = [c for c in form if c.isalpha()]
    return len(letters) > 1 and all(c.isupper() for c in letters)


def split_words(text: str) -> Words:
    """The words of a document."""
    forms, starts, ends, possessive = [], [], [], []
    for found in _WORD.finditer(text):
        form, end = found.group(), found.end()
        stripped = form.rstrip(" ")
        form, end = stripped, end - len(form) + len(stripped)
        ending = _POSSESSIVE.search(form)
        if ending is not None and ending.start() > 0:
            form, end = form[: ending.start()], end - 2
        forms.append(form)
        starts.append(found.start())
        ends.append(end)
        possessive.append(ending is not None)
    gaps = [text[e + 2 * p : s] for e, p, s in zip([0, *ends[:-1]], [False, *possessive[:-1]], starts)]
    abbreviations = _abbreviations(forms, gaps)
    before, opening = [], []
    verse = _is_verse(text)
    for i, gap in enumerate(gaps):
        last = forms[i - 1] if i else ""
        abbreviated = gap.startswith(".") and last in abbreviations
        rest = gap[1:] if abbreviated else gap
        if not rest.strip() and "\n\n" not in rest and i:
            before.append(DOTTED if abbreviated else JOINED)
        else:
            before.append(BROKEN)
        begins = i == 0 or _ENDS_SENTENCE.search(rest) is not None or (verse and "\n" in rest)
        begins = begins or (not abbreviated and _INITIALS.fullmatch(last) is not None)
        opening.append(begins)
    return Words(text, forms, starts, ends, before, opening, possessive)


def _abbreviations(forms: list[str], gaps: list[str]) -> set[str]:
    """Short words that hardly stand without a full stop behind them, such as titles."""
    dotted: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for form, gap in zip(forms, gaps[1:]):
        if len(form) <= 4 and form[0].isupper():
            total[form] += 1
            dotted[form] += gap.startswith(". ") or gap.startswith(".\n")
    known = {"Mr", "Mrs", "Ms", "Dr", "St", "Jr", "Sr", "Prof", "Rev", "Capt", "Col", "Gen", "Lt", "Hon"}
    often = {form for form, n in dotted.items() if n >= 3 and n >= 0.9 * total[form] and _is_consonants(form)}
    initials = {form for form in dotted if len(form) == 1 and form != "I"}
    return often | initials | {form for form in known if dotted[form] > 0.5 * total[form]}


def _is_consonants(form: str) -> bool:
    return not set(form.lower()) & set("aeiouy")


def _is_verse(text: str) -> bool:
    """Whether lines begin with capitals as a rule, so that such a capital says nothing."""
    lines = [line.strip() for line in text[:400_000].split("\n")]
    inner = [
        after[0].isupper()
        for line, after in zip(lines, lines[1:])
        if line and after and line[-1] not in ".!?:" and after[0].isalpha()
    ]
    return len(inner) >= 20 and sum(inner) > 0.8 * len(inner)


@dataclass
class Counts:
    """How often words stand in texts.

    Attributes:
        words: number of words.
        forms: every word as counted (:func:`plain`), case kept.
        named: those that begin with a capital where a common word would not.
        folded: lower-cased.
        documents: number of documents with the word (lower-cased).
    """

    words: int
    forms: Counter
    named: Counter
    folded: Counter
    documents: Counter

    @classmethod
    def of(cls, documents: Iterable[Words]) -> Counts:
        counts = cls(0, Counter(), Counter(), Counter(), Counter())
        for document in documents:
            forms = [plain(form) for form in document.forms]
            counts.words += len(forms)
            counts.forms.update(forms)
            counts.named.update(
                form for form, opening in zip(forms, document.opening) if not opening and form[:1].isupper()
            )
            folded = Counter(form.lower() for form in forms)
            counts.folded.update(folded)
            counts.documents.update(folded.keys())
        return counts


class Texts:
    """Documents that may be gone through again and again; small ones keep their words in memory."""

    _KEEP_CHARACTERS = 20_000_000

    def __init__(self, documents: Iterable[str]):
        self.documents = list(documents)
        self._words: list[Words] | None = None

    def __iter__(self) -> Iterator[Words]:
        if self._words is not None:
            yield from self._words
            return
        kept = [] if sum(map(len, self.documents)) <= self._KEEP_CHARACTERS else None
        for text in self.documents:
            words = split_words(text)
            if kept is not None:
                kept.append(words)
            yield words
        self._words = kept


def count_phrases(documents: Iterable[Words], phrases: Iterable[str]) -> Counter:
    """How often phrases stand in documents, across line ends too; phrases as :func:`plain` gives them."""
    wanted = defaultdict(set)
    for phrase in phrases:
        parts = phrase.split()
        wanted[parts[0].rstrip(".")].add((phrase, len(parts) - 1))
    counts: Counter[str] = Counter()
    for words in documents:
        for i, form in enumerate(words.forms):
            for phrase, more in wanted.get(plain(form).rstrip("."), ()):
                if i + more < len(words) and plain(words.phrase(i, i + more)) == phrase:
                    counts[phrase] += 1
    return counts
