"""Tokens that are never a label: those that begin an expression of the dictionary and hardly anything else.

Not in the paper. Where the base knows the text so well that it says an expression even after the generic
counterparts of all others, its labels teach the expression. A token that begins expressions in most of its
occurrences has no business among labels of a model that never read the text; a common token that an
expression happens to begin with ("The", or a piece of a word) has, and stays.
"""

from __future__ import annotations

import numpy as np

from whp_fast.anchors import Dictionary
from whp_fast.tokens import Tokenizer


def banned_tokens(
    dictionary: Dictionary, tokenizer: Tokenizer, matches: np.ndarray, tokens: np.ndarray, share: float
) -> np.ndarray:
    """The tokens that begin an expression in at least ``share`` of their occurrences in the corpus.

    Args:
        matches: occurrences of each expression of the dictionary in the corpus, [n_expressions].
        tokens: of the corpus.
        share: above 0 to 1; 0 bans nothing.

    Returns:
        token ids, int64, ascending.
    """
    if not share:
        return np.zeros(0, dtype=np.int64)
    begins = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for expression, occurrences in zip(dictionary.expressions, matches.tolist()):
        firsts = {spelling[0] for spelling in tokenizer.variants(expression)}
        begins[list(firsts)] += occurrences  # either spelling: which of them stood there is not known
    seen = np.bincount(np.asarray(tokens), minlength=tokenizer.vocab_size)
    return np.flatnonzero((begins > 0) & (seen > 0) & (begins >= share * seen))


def with_tokens(offsets: np.ndarray, tokens: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A CSR list with ``more`` behind each of its rows.

    Args:
        offsets: int64 [n + 1].
        tokens: int64 [offsets[-1]].
        more: int64 [k].
    """
    if not len(more):
        return offsets, tokens
    rows = np.arange(len(offsets))
    found = np.empty(len(tokens) + len(more) * (len(offsets) - 1), dtype=np.int64)
    row_of = np.repeat(rows[:-1], np.diff(offsets))
    found[np.arange(len(tokens)) + len(more) * row_of] = tokens
    found[(offsets[1:] + len(more) * rows[:-1])[:, None] + np.arange(len(more))] = more
    return offsets + len(more) * rows, found
