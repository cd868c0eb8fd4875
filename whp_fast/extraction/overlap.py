"""Are the texts fit to be compared? Sizes, and a background that holds the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from whp_fast.errors import UserError
from whp_fast.extraction.english import FUNCTION_WORDS, TITLES, WORLD
from whp_fast.extraction.words import Counts, Texts, plain

LEAST_CORPUS_WORDS = 200
LEAST_BACKGROUND_WORDS = 2000
SHINGLE_WORDS = 13
REFUSED_SHARE, NOTED_SHARE = 0.05, 0.005
MOST_TOLD = 5  # files
_WORTH_NAMING = 20


def check_sizes(corpus_words: int, background_words: int) -> list[str]:
    """Warnings about sizes.

    Raises:
        UserError: too little text to count anything.
    """
    if corpus_words < LEAST_CORPUS_WORDS:
        raise UserError(
            f"CORPUS: {corpus_words} words are too few to find expressions in; give at least "
            f"{LEAST_CORPUS_WORDS}."
        )
    if background_words < LEAST_BACKGROUND_WORDS:
        raise UserError(
            f"--background: {background_words} words are too few to tell what is common; give at least "
            f"{LEAST_BACKGROUND_WORDS}, better as many as the corpus has ({corpus_words})."
        )
    if background_words < corpus_words:
        return [
            f"the background ({background_words} words) is smaller than the corpus ({corpus_words}); common "
            "words it lacks will be proposed"
        ]
    return []


def check_overlap(corpus: Texts, background: Mapping[str, Texts]) -> list[str]:
    """Warnings about background files that share passages with the corpus.

    Passages are runs of SHINGLE_WORDS words, compared without case and punctuation, so that another edition
    of the same text is found too.

    Raises:
        UserError: a file, or all together, hold REFUSED_SHARE of the corpus or more: its expressions would
            look common.
    """
    own = np.unique(_shingles(corpus))
    anywhere = np.zeros(len(own), dtype=bool)
    noted: dict[str, float] = {}
    for name, texts in background.items():
        here = np.isin(own, np.unique(_shingles(texts)), assume_unique=True)
        anywhere |= here
        shared = float(here.mean()) if len(own) else 0.0
        if shared >= REFUSED_SHARE:
            raise UserError(
                f"{name}: holds {100 * shared:.0f} % of the corpus ({SHINGLE_WORDS} words in a row), so that "
                "its expressions would look common; take this text out of the background."
            )
        if shared >= NOTED_SHARE:
            noted[name] = shared
    if len(own) and anywhere.mean() >= REFUSED_SHARE:
        most = max(noted, key=noted.__getitem__, default="")
        raise UserError(
            f"--background: its files together hold {100 * anywhere.mean():.0f} % of the corpus "
            f"({SHINGLE_WORDS} words in a row{', most of it in ' + most if most else ''}), so that its "
            "expressions would look common; take these texts out of the background."
        )
    told = sorted(noted, key=noted.__getitem__, reverse=True)
    warnings = [
        f"{name} holds {100 * noted[name]:.1f} % of the corpus word for word" for name in told[:MOST_TOLD]
    ]
    if len(told) > MOST_TOLD:
        warnings.append(f"so do {len(told) - MOST_TOLD} more files of the background, less of it each")
    return warnings


def check_names(corpus: Counts, background: Counts) -> list[str]:
    """A warning where the background tells of the same people and places, as a sequel does."""
    general = FUNCTION_WORDS | WORLD | TITLES
    names = [
        word
        for word, n in sorted(corpus.named.items(), key=lambda item: (-item[1], item[0]))
        if n > 2 * corpus.forms[word.lower()] and word.lower() not in general and len(word) > 2
    ][:_WORTH_NAMING]
    share = background.words / max(1, corpus.words)
    common = [word for word in names if background.named[word] > 0.3 * share * corpus.named[word]]
    if len(names) < _WORTH_NAMING or len(common) < len(names) / 2:
        return []
    return [
        f"the background often has {len(common)} of the corpus's {len(names)} most frequent names "
        f"({', '.join(common[:4])}); a text about the same people hides them"
    ]


def _shingles(texts: Iterable) -> np.ndarray:
    """uint64 hashes of the runs of SHINGLE_WORDS words of each document."""
    hashes: dict[str, int] = {}
    found = [np.zeros(0, dtype=np.uint64)]
    for words in texts:
        row = np.empty(len(words), dtype=np.uint64)
        for i, form in enumerate(words.forms):
            folded = plain(form).lower()
            if folded not in hashes:
                digest = hashlib.blake2b(folded.encode(), digest_size=8).digest()
                hashes[folded] = int.from_bytes(digest, "little")
            row[i] = hashes[folded]
        runs = len(row) - SHINGLE_WORDS + 1
        if runs > 0:
            mixed = np.zeros(runs, dtype=np.uint64)
            for k in range(SHINGLE_WORDS):
                mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + row[k : k + runs]
            found.append(mixed)
    return np.concatenate(found)
