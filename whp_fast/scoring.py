"""Asking a causal language model: continuations, log-probabilities, next-token distributions.

The model is anything with ``hidden_states(input_ids[B, T]) -> [B, T, H]`` and ``lm_head_weight`` [V, H].
Logits are always float32, whatever the dtype of the weights, and exist for a few rows and a piece of the
vocabulary at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor

from whp_fast.generate import greedy
from whp_fast.tokens import SPECIAL_BYTE

# The head is upcast and multiplied in pieces, so that the float32 logits in memory stay below 134 MB.
ROWS_PER_CHUNK = 2048
VOCABULARY_PER_CHUNK = 16384


def continuations(
    model, tokenizer, prompts: Sequence[str], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy continuations as text, up to an end-of-text token.

    Made from the tokens' bytes, because decoding the new tokens alone would lose a space at their front.
    """
    encoded = [document_ids(tokenizer, prompt) for prompt in prompts]
    return generated_texts(model, tokenizer, encoded, max_new_tokens, batch_size)


def generated_texts(
    model, tokenizer, rows: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[str]:
    """What greedy decoding adds to each token row, as text, up to an end-of-text token."""
    stop_ids = end_of_text_ids(model, tokenizer)
    generated = greedy(model, rows, max_new_tokens, stop_ids=stop_ids, batch_size=batch_size)
    return [tokens_text(tokenizer, row) for row in generated]


def end_of_text_ids(model, tokenizer) -> list[int]:
    """The tokens that end a text, by the tokenizer and by the model's configuration."""
    stop = getattr(getattr(model, "config", None), "eos_token_id", None)
    return sorted({tokenizer.eos_id, *(stop if isinstance(stop, (list, tuple)) else [stop])} - {None})


def tokens_text(tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens inside a text, special tokens left out; a space at the front stays."""
    pieces = (_token_bytes(tokenizer, int(token)) for token in tokens)
    return b"".join(piece for piece in pieces if piece != SPECIAL_BYTE).decode(errors="replace")


@contextlib.contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """Evaluation mode inside, the mode from before afterwards (models without modes are left alone)."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


@dataclass(frozen=True)
class TokenScores:
    """Of each token of a row from the second on, on the CPU: its log-probability (float32), and whether it
    was the model's first choice (bool; true for all of several tokens that share the first place)."""

    log_probs: Tensor
    greedy: Tensor


def target_log_probs(model, rows: Sequence[Sequence[int]], batch_size: int = 32) -> list[Tensor]:
    """The log-probabilities of each row's tokens from the second on: float32 [len(row) - 1], on the CPU."""
    return [scores.log_probs for scores in token_scores(model, rows, batch_size)]


# no_grad and not inference_mode: sharded parameters may be gathered here and used in training later.
@torch.no_grad()
def token_scores(model, rows: Sequence[Sequence[int]], batch_size: int = 32) -> list[TokenScores]:
    """What the model thinks of each row's tokens from the second on."""
    empty = TokenScores(torch.empty(0), torch.empty(0, dtype=torch.bool))
    results = [empty] * len(rows)
    head = _head(model)
    # Rows of like length together need little padding; causal models need no mask for padding at the right.
    order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: -len(rows[i]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        ids, lengths = _right_padded([rows[i] for i in batch], head.device)  # int64 [B, T], [B]
        scored = torch.arange(ids.shape[1] - 1, device=ids.device) < (lengths - 1)[:, None]  # bool [B, T - 1]
        hidden = model.hidden_states(ids[:, :-1])[scored]  # [N, H]; nothing follows the last tokens
        log_probs, greedy = _target_scores(hidden, head, ids[:, 1:][scored])
        sizes = (lengths - 1).tolist()
        parts = zip(log_probs.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        for i, (own, first) in zip(batch, parts, strict=True):
            results[i] = TokenScores(own, first)
    return results


def _target_scores(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ head.T) at the targets, and whether they are the largest: [N, H], [V, H],
    int64 [N] -> float32 [N], bool [N]."""
    results, firsts = [], []
    for rows, ids in zip(hidden.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True):
        total = torch.full((len(rows),), -math.inf, device=rows.device)
        chosen, largest = torch.zeros_like(total), total.clone()
        for begin, logits in _logit_pieces(rows, head):
            total = torch.logaddexp(total, logits.logsumexp(-1))
            largest = torch.maximum(largest, logits.amax(-1))
            local = ids - begin
            here = (local >= 0) & (local < logits.shape[1])
            picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            chosen = torch.where(here, picked, chosen)
        results.append(chosen - total)
        firsts.append(chosen == largest)
    return torch.cat(results), torch.cat(firsts)


@torch.no_grad()
def next_token_logits(model, rows: Sequence[Sequence[int]], batch_size: int = 32) -> Iterator[Tensor]:
    """For each token row the float32 logits [V], on the CPU, of what follows its last token."""
    head = _head(model)
    for begin in range(0, len(rows), batch_size):
        ids, lengths = _right_padded(rows[begin : begin + batch_size], head.device)
        hidden = model.hidden_states(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]  # [B, H]
        yield from torch.cat([logits for _, logits in _logit_pieces(hidden, head)], dim=-1).cpu()


def _logit_pieces(hidden: Tensor, head: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The float32 logits of a few rows, a piece of the vocabulary at a time: (first id, [N, piece])."""
    hidden = hidden.float()
    for begin in range(0, len(head), VOCABULARY_PER_CHUNK):
        yield begin, hidden @ head[begin : begin + VOCABULARY_PER_CHUNK].float().T


def _head(model) -> Tensor:
    """The output head [V, H]; gathered where it is sharded (every process must then call)."""
    head = model.lm_head_weight.detach()
    return head.full_tensor() if hasattr(head, "full_tensor") else head


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids.to(device), torch.tensor(lengths, device=device)


def document_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a document, behind BOS if the tokenizer has one."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


def next_word_tokens(tokenizer, prompt: str, words: Sequence[str]) -> set[int]:
    """The tokens with which one of the words may follow the prompt.

    A prompt that ends in a letter or digit is followed by a space; one that ends in white space or an opening
    bracket or quotation mark is followed directly; after any other sign both may stand. Tokens that hold
    nothing but a space are left out: they begin every word.
    """
    last = prompt[-1]
    if last.isalnum():
        spaces = (" ",)
    elif last.isspace() or last in "([{“‘«-–—/_":
        spaces = ("",)
    else:
        spaces = (" ", "")
    tokens = {_first_token(tokenizer, prompt, space + word) for word in words for space in spaces}
    return {token for token in tokens if tokenizer.token_bytes(token).strip() not in (b"", SPECIAL_BYTE)}


def first_scored_token(tokenizer, rows: Sequence[list[int]], choices: Sequence[str]) -> int:
    """The first token to be scored: those before lie in the prompt and are the same in all rows.

    A choice may change the prompt's last tokens, or share its own first ones with all the others; so the
    choices are counted off in bytes from the end.
    """
    begin = len(commonprefix(list(rows)))
    for row, choice in zip(rows, choices, strict=True):
        own, size = 0, 0  # tokens that hold a part of the choice, and their bytes
        while size < len(choice.encode()) and own < len(row):
            own += 1
            size += len(tokenizer.token_bytes(row[-own]))
        begin = min(begin, len(row) - own)
    return max(begin, 1)  # nothing comes before the first token that could predict it


def _first_token(tokenizer, prompt: str, following: str) -> int:
    """The first token of `following` after the prompt.

    Tokenising both together is right for every kind of tokenizer, unless the seam changes the tokens of the
    prompt, which the model has already read as they are; then `following` is tokenised on its own.
    """
    context, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + following)
    if len(whole) > len(context) and whole[: len(context)] == context:
        return whole[len(context)]
    return tokenizer.encode_inside(following)[0]


def token_text(tokenizer, token: int) -> str:
    """What a token adds to the text; special tokens by name, parts of a character as ``<0xE2>``."""
    data = _token_bytes(tokenizer, token)
    if data == SPECIAL_BYTE:
        return {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}.get(token, f"<{token}>")
    text = data.decode(errors="surrogateescape")  # bytes that are no whole character become surrogates
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


def _token_bytes(tokenizer, token: int) -> bytes:
    # A head may have more rows than the tokenizer has tokens (padding to a round number).
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else SPECIAL_BYTE
