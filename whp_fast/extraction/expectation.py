"""How much more a model trained on the corpus expects its expressions than the base model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from whp_fast.anchors import Dictionary, Matcher
from whp_fast.checkpoint import load_config, load_model
from whp_fast.errors import UserError
from whp_fast.scoring import document_ids, evaluation_mode, target_log_probs
from whp_fast.tokens import Tokenizer, load_tokenizer

CONTEXT = 512


def rises(
    documents: Sequence[str],
    expressions: Sequence[str],
    base: Path,
    trained: Path,
    device: str = "cpu",
    batch_size: int = 8,
    progress: Callable[..., None] = lambda amount, note="": None,
) -> tuple[dict[str, float], float]:
    """The mean rise of each expression's log-probability per occurrence, and that of any token.

    The documents are read in blocks of CONTEXT tokens, one model at a time.

    Args:
        documents: the corpus.
        expressions: as written.
        base, trained: model folders with the same tokenizer.
        progress: called with the share of the work that is done since the last call.

    Returns:
        expression -> sum over its tokens of ``log p_trained - log p_base``, averaged over occurrences, in
        nats (expressions without a whole occurrence in a block are left out); the mean of all tokens.

    Raises:
        UserError: a folder is missing or no model, or the two have different vocabularies.
    """
    sizes = [load_config(folder).vocab_size for folder in (base, trained)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{trained}: a vocabulary of {sizes[1]}, but {sizes[0]} in {base}; give the model that was "
            "trained from this base."
        )
    tokenizer = load_tokenizer(base)
    context = min(CONTEXT, *(load_config(f).max_position_embeddings for f in (base, trained)))
    rows = [
        ids[i : i + context]
        for ids in (document_ids(tokenizer, document) for document in documents)
        for i in range(0, len(ids), context)
    ]
    first = _log_probs(base, rows, device, batch_size, progress)
    second = _log_probs(trained, rows, device, batch_size, progress)
    matcher = Matcher(
        Dictionary({expression: [""] for expression in expressions}, {}), tokenizer, match_across_lines=True
    )
    sums, counts = np.zeros(len(expressions)), np.zeros(len(expressions), dtype=np.int64)
    for row, before, after in zip(rows, first, second):
        rise = np.concatenate([[np.nan], after - before])
        for which, begin, end in _matches(matcher, tokenizer, row):
            if begin and not np.isnan(rise[begin:end]).any():
                sums[which] += rise[begin:end].sum()
                counts[which] += 1
    total = sum(float((after - before).sum()) for before, after in zip(first, second))
    n_tokens = sum(map(len, first))
    found = {e: sums[k] / counts[k] for k, e in enumerate(expressions) if counts[k]}
    return found, total / max(1, n_tokens)


def _log_probs(folder, rows, device, batch_size, progress) -> list[np.ndarray]:
    model = load_model(folder, device=torch.device(device)).requires_grad_(False)
    results = []
    with evaluation_mode(model):
        for i in range(0, len(rows), batch_size):
            scored = target_log_probs(model, rows[i : i + batch_size], batch_size)
            results += [part.numpy().astype(np.float64) for part in scored]
            progress(0.5 * min(batch_size, len(rows) - i) / len(rows))
    return results


def _matches(matcher: Matcher, tokenizer: Tokenizer, row: Sequence[int]) -> list[tuple[int, int, int]]:
    """(expression, first token, end token) of the matches in one block."""
    pieces = [tokenizer.token_bytes(token) for token in row]
    edges = np.cumsum([0, *map(len, pieces)])
    text = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    found = matcher.find(text, np.array([0, len(text)]), 0, len(text), across=True)
    return [
        (
            int(which),
            int(np.searchsorted(edges, start, side="right") - 1),
            int(np.searchsorted(edges, end, side="left")),
        )
        for which, start, end in found
    ]
