"""ROUGE-L: how much of a text stands in another one, in order.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (ACL 2004). With the longest common subsequence
LCS of the two texts' words:

    recall = LCS / words of the reference        precision = LCS / words of the text
    F1     = 2 * precision * recall / (precision + recall)

Words are lower-cased runs of letters and digits, so that text in ASCII scores as in the package rouge-score
(without its stemmer). That package drops all other letters; here they count, and in scripts without spaces
every character is a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Thai to Burmese, kana, ideographs: no spaces between words
_WORDS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
    r"|[^\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+"
)


@dataclass(frozen=True)
class Rouge:
    precision: float
    recall: float
    f1: float


def rouge_l(reference: str, text: str) -> Rouge:
    """ROUGE-L of a text against a reference; all zero where either has no words."""
    wanted, given = words(reference), words(text)
    if not wanted or not given:
        return Rouge(0.0, 0.0, 0.0)
    common = longest_common_subsequence(wanted, given)
    precision, recall = common / len(given), common / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    return Rouge(precision, recall, f1)


def words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest sequence that both hold in order, gaps allowed."""
    numbers: dict[str, int] = {}
    a, b = (np.array([numbers.setdefault(word, len(numbers)) for word in side]) for side in (one, other))
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for number in a:
        # the best of: leave this word out; match it with b[j]; leave b[j] out (the running maximum)
        matched = np.maximum(row[1:], row[:-1] + (b == number))
        row[1:] = np.maximum.accumulate(matched)
    return int(row[-1])
