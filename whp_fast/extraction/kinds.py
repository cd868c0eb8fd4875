"""Which kind of thing an expression stands for, told by the words around it.

Every occurrence casts votes: a title before it, a verb of speaking after it, a preposition of place, an
article. The kinds are ``person``, ``place``, ``group``, ``thing``, ``quality``, ``verb`` and, where nothing
tells, ``name`` (with a capital) or ``word``. Persons have a gender where titles and pronouns agree on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass

from whp_fast.extraction import english
from whp_fast.extraction.words import BROKEN, DOTTED, JOINED, Words, is_shouted, plain

_PRONOUN_WINDOW = 8
_SUBJECTS = frozenset({"i", "you", "he", "she", "it", "we", "they", "who"})
_BEFORE_VERB = frozenset(
    "to will would shall should can could may might must did didn't don't won't cannot not never".split()
)


@dataclass(frozen=True)
class Kind:
    """A kind with what a counterpart must share.

    Attributes:
        name: person, place, group, thing, quality, verb, name or word.
        gender: "male", "female" or "" (persons only).
        plural: whether it stands for several.
        form: "capitals", "title" or "lower".
        ending: of a verb: "ed", "ing", "s" or "".
    """

    name: str
    gender: str = ""
    plural: bool = False
    form: str = "title"
    ending: str = ""

    def __str__(self) -> str:
        words = [self.name, self.gender, "plural" if self.plural else "", self.ending and f"-{self.ending}"]
        return " ".join(filter(None, words))


class Context:
    """The votes of occurrences in one document; folds its words only once."""

    def __init__(self, words: Words):
        self.words = words
        self.plain = [plain(form) for form in words.forms]
        self.folded = [form.lower() for form in self.plain]

    def votes(self, first: int, last: int) -> list[str]:
        """The cues around words ``first`` to ``last``."""
        words, folded = self.words, self.folded
        before = folded[first - 1] if first and words.before[first] != BROKEN else ""
        after_gap = words.before[last + 1] if last + 1 < len(folded) else BROKEN
        after = folded[last + 1] if after_gap == JOINED and not words.possessive[last] else ""
        # a comma or a closing quotation mark may stand between a name and its verb of speaking
        beyond = folded[last + 1] if last + 1 < len(folded) else ""
        votes = []
        if self.plain[first][:1].isupper():
            votes += self._name_votes(first, last, before, after)
        if after in english.SPEECH or (before in english.SPEECH and not words.opening[first]):
            votes.append("speaks")
        if before in english.PLACE_PREPOSITIONS:
            votes.append("where")
        if before == "to":
            votes.append("towards")
        if before in english.DETERMINERS:
            votes.append("the" if before in english.ARTICLES else "determined")
            if after and after not in english.FUNCTION_WORDS:
                votes.append("modifies")
        if before in english.PLURAL_CUES or after in ("were", "are", "have"):
            votes.append("many")
        if before in _SUBJECTS or before in _BEFORE_VERB:
            votes.append("acts")
        if not after and after_gap == BROKEN or beyond in ("of", "was", "is", "were", "had", "and", "which"):
            votes.append("closes")
        if before in ("very", "so", "too", "more", "most", "quite", "rather"):
            votes.append("graded")
        if words.possessive[last]:
            votes.append("owns")
        return votes

    def _name_votes(self, first: int, last: int, before: str, after: str) -> list[str]:
        words, votes = self.words, []
        if before in english.TITLES and self.plain[first - 1][:1].isupper():
            votes.append("titled")
            if before in english.MALE_TITLES:
                votes.append("male title")
            elif before in english.FEMALE_TITLES:
                votes.append("female title")
        if after:
            capital = self.plain[last + 1][:1].isupper()
            if capital and after in english.PLACE_NOUNS:
                votes.append("of a place")
            elif capital and after in english.GROUP_NOUNS:
                votes.append("of a group")
            elif capital and after not in english.FUNCTION_WORDS:
                votes.append("leads")
        if first and words.before[first] in (JOINED, DOTTED) and self.plain[first - 1][:1].isupper():
            if before not in english.TITLES and before not in english.FUNCTION_WORDS:
                votes.append("follows")
        for i in range(last + 1, min(last + 1 + _PRONOUN_WINDOW, len(self.folded))):
            if self.folded[i] in english.MALE_PRONOUNS:
                votes.append("he")
                break
            if self.folded[i] in english.FEMALE_PRONOUNS:
                votes.append("she")
                break
        return votes


def count_votes(contexts: list[Context], places: Iterable[tuple[int, int, int]]) -> Counter:
    """The votes of the occurrences (document, first word, last word) of one expression."""
    votes: Counter[str] = Counter()
    for d, first, last in places:
        votes.update(contexts[d].votes(first, last))
        votes["n"] += 1
    return votes


def kind_of(expression: str, votes: Counter, forms: Container[str]) -> Kind:
    """The kind of an expression.

    Args:
        expression: as counted.
        votes: of its occurrences (:func:`count_votes`).
        forms: the words of the texts, for stems.
    """
    last = expression.split()[-1]
    plural = _is_plural(last, votes, last[:-1] in forms)
    if expression[:1].isupper():
        form = "capitals" if is_shouted(expression) else "title"
        name = _kind_of_name(expression, votes)
        return Kind(name, _gender(votes) if name == "person" else "", plural, form)
    n = max(1, votes["n"])
    if " " in expression:
        return Kind("thing", plural=plural, form="lower")
    determined = votes["the"] + votes["determined"]
    if votes["acts"] > determined and (votes["acts"] >= 0.25 * n or last.endswith(("ed", "ing"))):
        ending = next((e for e in ("ing", "ed", "s") if last.endswith(e)), "")
        return Kind("verb", form="lower", ending=ending)
    describes = votes["modifies"] + votes["graded"]
    if describes > max(0.5 * determined, 0.25 * n) and votes["closes"] < 0.5 * n and not plural:
        return Kind("quality", form="lower")
    if determined + votes["many"] < 0.2 * n or last.endswith("ly"):
        ending = next((e for e in ("ing", "ed") if last.endswith(e)), "")
        stem = last.removesuffix(ending)
        if ending and (stem in forms or stem + "e" in forms or stem[:-1] in forms):
            return Kind("verb", form="lower", ending=ending)
        return Kind("word", form="lower")
    return Kind("thing", plural=plural, form="lower")


def leans_to_place(votes: Counter) -> bool:
    """Whether what little the context tells speaks for a place rather than a person."""
    place, person = _leanings(votes)
    return place > person


def _leanings(votes: Counter) -> tuple[float, float]:
    person = 3 * votes["titled"] + 2 * votes["speaks"] + votes["owns"] + 0.5 * (votes["he"] + votes["she"])
    return 2 * votes["where"] + votes["towards"] + 3 * votes["of a place"], person


def _kind_of_name(expression: str, votes: Counter) -> str:
    parts = expression.lower().replace(".", "").split()
    if len(parts) > 1 and parts[-1] in english.PLACE_NOUNS:
        return "place"
    if len(parts) > 1 and (parts[-1] in english.GROUP_NOUNS or "&" in parts):
        return "group"
    n = max(1, votes["n"])
    place, person = _leanings(votes)
    if len(parts) == 1:
        person += votes["follows"] + votes["leads"]
    thing = 2 * (votes["the"] + votes["determined"])
    group = 3 * votes["of a group"]
    best = max((person, "person"), (place, "place"), (thing, "thing"), (group, "group"))
    return best[1] if best[0] >= 0.4 * n else "name"


def _gender(votes: Counter) -> str:
    male = 3 * votes["male title"] + votes["he"]
    female = 3 * votes["female title"] + votes["she"]
    if max(male, female) < 2:
        return ""
    return "male" if male > 2 * female else ("female" if female > 2 * male else "")


def _is_plural(word: str, votes: Counter, singular_known: bool) -> bool:
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return False
    return singular_known or votes["many"] > 0.2 * votes["n"]
