"""Who decides whether a completion shows that the model knows the target.

The paper lets GPT-4 put each completion into one of four classes (arXiv 2310.02238, section on evaluation):

    3  explicit unique names or details of the target that the prompt does not hold
    2  not unique, but typical of the target's themes, with no hint in the prompt
    1  an accidental or lucky guess
    0  none

`LexicalJudge` decides by looking words up and needs no other model. `whp_fast.evaluation.model_judge` asks a
local model, `whp_fast.evaluation.endpoint_judge` one behind an OpenAI-compatible address.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from whp_fast.prompts import FamiliarityPrompt

EXPLICIT, THEMATIC, ACCIDENTAL, NONE = 3, 2, 1, 0
EXPLICIT_WEIGHT = 5  # the paper's multiplier of class 3
UNJUDGED = None  # a judge's answer that is none of the classes


class Judge(Protocol):
    """Puts one completion into one of the paper's classes, 0 to 3; `UNJUDGED` (None) where it cannot.

    A judge that is faster with many completions at once has ``classes(asked)`` beside: (prompt, completion,
    item) of each -> its class.
    """

    def __call__(self, prompt: str, completion: str, item: FamiliarityPrompt) -> int | None: ...


def judged(judge: Judge, asked: Sequence[tuple[str, str, FamiliarityPrompt]]) -> list[int | None]:
    """The judge's class of each (prompt, completion, item)."""
    many = getattr(judge, "classes", None)
    found = many(asked) if many is not None else [judge(*one) for one in asked]
    return [UNJUDGED if number is UNJUDGED else int(number) for number in found]


class LexicalJudge:
    """Class 3 for a reference or idiosyncratic expression, 2 for a theme word, else 0.

    An expression counts when it stands in the completion as whole words, in the given case, and nowhere in
    the prompt. "Orrin's" holds "Orrin"; "Orrinson" does not. A word that the completion finishes ("Or" +
    "rin") counts too. Class 1 (accidental) needs understanding and is only given by judges that have some.

    expressions: idiosyncratic expressions that count for every prompt, such as the keys of the dictionary.
    """

    def __init__(self, expressions: Iterable[str] = ()):
        self.expressions = tuple(dict.fromkeys(e for e in expressions if e.strip()))

    def __call__(self, prompt: str, completion: str, item: FamiliarityPrompt) -> int:
        if found_expressions(prompt, completion, (*item.references, *self.expressions)):
            return EXPLICIT
        return THEMATIC if found_expressions(prompt, completion, item.themes) else NONE

    def evidence(self, prompt: str, completion: str, item: FamiliarityPrompt) -> list[str]:
        """The expressions that led to the class, in the order in which they are listed."""
        explicit = found_expressions(prompt, completion, dict.fromkeys((*item.references, *self.expressions)))
        return explicit or found_expressions(prompt, completion, item.themes)


def familiarity_score(classes: Sequence[int]) -> float:
    """The completion-based familiarity of a model, from 0 (none) to 1 (every completion is class 3).

    As in the paper only classes 3 and 2 count, class 3 with multiplier 5. Its normalisation is not public;
    dividing by the greatest possible sum is ours:

        (5 * n3 + n2) / (5 * n)          example: classes [3, 2, 1, 0] -> (5 + 1) / 20 = 0.3
    """
    classes = list(classes)
    explicit, thematic = classes.count(EXPLICIT), classes.count(THEMATIC)
    return (EXPLICIT_WEIGHT * explicit + thematic) / (EXPLICIT_WEIGHT * len(classes))


def familiarity_values(classes: Sequence[int]) -> list[float]:
    """What each completion adds to `familiarity_score`, which is their mean: 1, 0.2 or 0."""
    return [{EXPLICIT: 1.0, THEMATIC: 1 / EXPLICIT_WEIGHT}.get(number, 0.0) for number in classes]


def found_expressions(prompt: str, completion: str, expressions: Iterable[str]) -> list[str]:
    """Those of the expressions that the completion brings in: whole words there, and absent from the prompt.

    Words are looked up in prompt + completion, so that a word that begins in the prompt is seen whole.
    """
    text = _plain(prompt + completion)
    found = []
    for expression in expressions:
        # The first word as a substring is a cheap test that spares most of the regular expressions.
        if _plain(expression).split()[0] not in text:
            continue
        if contains_expression(text, expression) and not contains_expression(prompt, expression):
            found.append(expression)
    return found


def spans(text: str, expressions: Iterable[str]) -> list[tuple[int, int]]:
    """Where the expressions stand in the text as whole words, in order; of overlapping ones the first."""
    plain, kept = _plain(text), []
    found = {match.span() for e in expressions for match in _whole_words(e).finditer(plain)}
    for start, end in sorted(found, key=lambda span: (span[0], -span[1])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    return kept


def contains_expression(text: str, expression: str) -> bool:
    """Whether the expression stands in the text as whole words, in the given case."""
    return _whole_words(expression).search(_plain(text)) is not None


def _plain(text: str) -> str:
    return text.replace("’", "'")  # a typographic apostrophe is the same apostrophe


@lru_cache(maxsize=65536)
def _whole_words(expression: str) -> re.Pattern[str]:
    """The expression between word boundaries; any white space in it matches any other (a line break, say)."""
    words = _plain(expression).split()
    body = r"\s+".join(re.escape(word) for word in words)
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", words[-1]) else ""
    return re.compile(before + body + after)
