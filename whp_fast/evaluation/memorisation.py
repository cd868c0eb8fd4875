"""Does the model still know the text word for word.

A passage of the target is cut into a prefix, which the model is given, and a continuation.

=====================  ==================================================================================
verbatim memorisation  ROUGE-L F1 of the greedy continuation and the true one (VerbMem of MUSE, Shi et al.
                       2024, arXiv 2407.06460)
exact memorisation     share of the continuation's tokens that are the model's first choice when it reads
                       the true text so far (Tirumala et al. 2022, arXiv 2205.10770)
extraction strength    1 - k / n, where k is the fewest tokens of the continuation (of n) that must be given
                       for all the rest to be the model's first choice (Carlini et al. 2021, arXiv
                       2012.07805, in the form of OpenUnlearning)
=====================  ==================================================================================

All three are from 0 to 1, and lower where the text was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from whp_fast.errors import UserError
from whp_fast.evaluation.rouge import rouge_l
from whp_fast.prompts import spaced
from whp_fast.scoring import document_ids, generated_texts, token_scores, tokens_text


@dataclass(frozen=True)
class Passage:
    """A piece of a document as tokens: BOS (if there is one) and the prefix, and what follows it."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        return [*self.prefix, *self.continuation]


def exact_memorisation(hits: Sequence[bool]) -> float:
    """The mean of the hits: bool [n], whether token i was the model's first choice. n is at least 1."""
    return float(np.mean(np.asarray(hits, dtype=bool)))


def extraction_strength(hits: Sequence[bool]) -> float:
    """1 - k / n for the shortest tail of hits that has no miss: hits[k:], k from 0 to n.

    OpenUnlearning stops at k = n - 1, so that its figure is at least 1 / n; here a miss at the end gives 0.
    """
    hits = np.asarray(hits, dtype=bool)
    misses = np.flatnonzero(~hits)
    k = misses[-1] + 1 if len(misses) else 0
    return float(1 - k / len(hits))


def cut_passages(
    tokenizer, texts: Sequence[str], *, prefix: int, continuation: int, count: int
) -> list[Passage]:
    """Passages of ``prefix`` + ``continuation`` tokens that do not overlap, evenly spaced over the texts.

    Documents are cut from their beginning; a rest that is too short is left out, so every passage is whole.

    Raises:
        UserError: no document is long enough for one.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = []
    for text in texts:
        ids = document_ids(tokenizer, text)[len(start) :]
        for i in range(0, len(ids) - prefix - continuation + 1, prefix + continuation):
            cut = i + prefix
            found.append(Passage((*start, *ids[i:cut]), tuple(ids[cut : cut + continuation])))
    if not found:
        raise UserError(
            f"text: no document has the {prefix + continuation} tokens of a passage; give longer "
            "documents, or "
            "a smaller --prefix-tokens and --continuation-tokens."
        )
    return list(spaced(found, count))


def continued(model, tokenizer, passages: Sequence[Passage], batch_size: int = 32) -> list[dict[str, Any]]:
    """Greedy continuations: ``{"prefix", "continuation", "given", "rouge_l"}`` a passage (texts and F1)."""
    longest = max(len(passage.continuation) for passage in passages)
    given = generated_texts(model, tokenizer, [p.prefix for p in passages], longest, batch_size)
    rows = []
    for passage, text in zip(passages, given, strict=True):
        true = tokens_text(tokenizer, passage.continuation)
        row = {"prefix": tokens_text(tokenizer, passage.prefix), "continuation": true, "given": text}
        rows.append(row | {"rouge_l": rouge_l(true, text).f1})
    return rows


@dataclass(frozen=True)
class PassageScores:
    """log_probs: float64 [tokens - 1], of each token of the passage but the first.  hits: bool, of the
    continuation's tokens alone, whether each was the model's first choice."""

    log_probs: np.ndarray
    hits: np.ndarray


def passage_scores(model, passages: Sequence[Passage], batch_size: int = 32) -> list[PassageScores]:
    """What the model thinks of each token when it reads the passages."""
    scores = token_scores(model, [passage.tokens for passage in passages], batch_size)
    return [
        PassageScores(score.log_probs.double().numpy(), score.greedy.numpy()[-len(passage.continuation) :])
        for passage, score in zip(passages, scores, strict=True)
    ]
