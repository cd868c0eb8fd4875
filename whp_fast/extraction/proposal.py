"""From texts to a dictionary: candidates, their kinds and counterparts, and the files they are written to."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from whp_fast.anchors import clean
from whp_fast.artifacts import write_json
from whp_fast.errors import UserError
from whp_fast.extraction.candidates import Finder, Limits
from whp_fast.extraction.counterparts import Assignment, Pool
from whp_fast.extraction.kinds import Kind, count_votes, kind_of
from whp_fast.extraction.overlap import check_names, check_overlap, check_sizes
from whp_fast.extraction.prompting import Replies
from whp_fast.extraction.spellings import Candidate
from whp_fast.extraction.words import Texts

RISE_OF_WORDS = 2.0
"""A common word counts without bursts if training raised it by so many nats more than an average token."""


@dataclass
class Proposal:
    """One entry with what speaks for it; a line of the list beside the dictionary.

    Attributes:
        expression: as written.
        count: occurrences in the corpus, across line ends too.
        kind: see :mod:`whp_fast.extraction.kinds`.
        counterparts: generic ones, the best first.
        log_likelihood: against the background.
        burst: how bursty (0 for names).
        rise: nats by which training raised it, if measured.
        reviewed: "kept", "dropped", "edited" or "".
    """

    expression: str
    count: int
    kind: str
    counterparts: list[str]
    log_likelihood: float = 0.0
    burst: float = 0.0
    rise: float | None = None
    reviewed: str = ""


def propose(
    corpus: Texts,
    background: Mapping[str, Texts],
    limits: Limits,
    alternatives: int = 3,
    measure: Callable[[list[str]], tuple[dict[str, float], float]] | None = None,
    replies: Replies | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Proposal]:
    """The proposals for a corpus.

    Args:
        corpus: the text to forget.
        background: texts of other matter, by file.
        limits: what an expression must reach.
        alternatives: counterparts each, at most.
        measure: gives the rise of expressions and that of an average token (``expectation.rises``).
        replies: of a model that was asked; its expressions take the place of the counted ones.
        warn: told what does not stop the work.

    Raises:
        UserError: unfit texts, or nothing was found.
    """
    for warning in check_overlap(corpus, background):
        warn(warning)
    texts = Texts([text for part in background.values() for text in part.documents])
    documents = list(corpus)
    wanted = limits if measure is None else dataclasses.replace(limits, burst=0.0)  # _expected decides then
    finder = Finder(documents, texts, wanted)
    for warning in check_sizes(finder.counts.words, finder.background.words):
        warn(warning)
    for warning in check_names(finder.counts, finder.background):
        warn(warning)
    candidates = finder.find() if replies is None else finder.given(sorted(replies.translations))
    if measure is not None and candidates:
        candidates = _expected(candidates, measure)
    kinds = {c.expression: _kind(finder, c) for c in candidates}
    pool = Pool(texts, finder.background, finder.counts)
    assignment = Assignment(candidates, kinds, finder.contexts, pool, finder.generic, alternatives)
    offers = assignment.run(replies.translations if replies is not None else {})
    kept, _ = clean(offers)
    if not kept:
        raise UserError(
            f"CORPUS: no expression reaches the limits (count {limits.count}, log-likelihood "
            f"{limits.log_likelihood:g}); give more text or lower --min-count."
        )
    bare = sum(c.expression not in offers for c in candidates)
    if bare:
        warn(f"{bare} expressions are left out: the background has no counterpart of their kind")
    return [
        Proposal(
            c.expression,
            c.count,
            str(kinds[c.expression]),
            offers[c.expression],
            round(c.log_likelihood, 2),
            round(c.burst, 2),
            None if c.rise is None else round(c.rise, 3),
        )
        for c in candidates
        if c.expression in kept
    ]


def _kind(finder: Finder, candidate: Candidate) -> Kind:
    votes = count_votes(finder.contexts, candidate.places)
    return kind_of(candidate.plain, votes, finder.counts.forms)


def _expected(candidates: Sequence[Candidate], measure) -> list[Candidate]:
    """Those that training raised more than an average token; common words besides bursty, or raised far."""
    found, average = measure([c.expression for c in candidates])
    kept = []
    for candidate in candidates:
        candidate.rise = found.get(candidate.expression)
        rise = average if candidate.rise is None else candidate.rise
        if candidate.named or candidate.burst >= Limits.burst:
            if candidate.rise is None or rise > average:
                kept.append(candidate)
        elif rise > average + RISE_OF_WORDS:
            kept.append(candidate)
    return kept


def list_path(anchors: Path) -> Path:
    """The list that belongs to a dictionary: counts, kinds, scores and what a person said of it."""
    return anchors.with_name(f"{anchors.stem}.list.jsonl")


def write(anchors: Path, proposals: Sequence[Proposal]) -> None:
    """Write the dictionary (without dropped entries) and its list, each at once or not at all."""
    anchors.parent.mkdir(parents=True, exist_ok=True)
    path = list_path(anchors)
    partial = path.with_name(f".{path.name}.partial")
    lines = [json.dumps(dataclasses.asdict(p), ensure_ascii=False) for p in proposals]
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)
    write_json(anchors, {p.expression: p.counterparts for p in proposals if p.reviewed != "dropped"})


def read_list(anchors: Path) -> dict[str, Proposal]:
    """The list of a dictionary by expression; empty where there is none.

    Raises:
        UserError: a line is damaged.
    """
    path = list_path(anchors)
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            proposal = Proposal(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not an entry of the list ({error}); extract again."
            ) from error
        found[proposal.expression] = proposal
    return found
