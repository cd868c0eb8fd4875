"""Greedy decoding and sampling with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from whp_fast.attention_dense import dense_attention
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig


def greedy(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    batch_size: int = 32,
) -> list[list[int]]:
    """The continuation of each prompt by the most likely next token, again and again.

    Prompts of like length share a batch. They are padded on the right and every row keeps its own place, so a
    row computes what it would compute alone (up to the rounding of matrix products of another size). The mode
    of the model is left as it is: nothing in these models differs between training and evaluation.

    Args:
        model: run as it is, under the autocast of the caller if there is one.
        prompts: token ids, with BOS where the model wants one; none empty.
        max_new_tokens: at most so many new tokens a prompt.
        stop_ids: a row ends with the first of these, which is part of the result.
        batch_size: rows at a time.

    Returns:
        For each prompt, in the order given, the new tokens only.

    Raises:
        ValueError: an empty prompt, or a negative max_new_tokens or a batch_size below 1.
    """
    return _generate(model, prompts, max_new_tokens, stop_ids, batch_size, lambda logits: logits.argmax(-1))


def sample(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    stop_ids: Iterable[int] = (),
    batch_size: int = 32,
) -> list[list[int]]:
    """A continuation of each prompt, its tokens drawn from softmax(logits / temperature).

    As ``greedy``, but for: temperature above 0; generator on the model's device. The same generator state,
    order of prompts and batch_size give the same continuations.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but it must be above 0")

    def choose(logits: torch.Tensor) -> torch.Tensor:
        probabilities = (logits.float() / temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return _generate(model, prompts, max_new_tokens, stop_ids, batch_size, choose)


def _generate(model, prompts, max_new_tokens, stop_ids, batch_size, choose) -> list[list[int]]:
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty, and there is nothing to continue; begin it with BOS")
    if max_new_tokens < 0 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}: at least 0 and 1")
    stops = sorted(set(stop_ids))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens == 0:
        return results
    with torch.inference_mode():
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            for row, new in zip(
                rows, _generate_batch(model, [prompts[i] for i in rows], max_new_tokens, stops, choose)
            ):
                results[row] = new
    return results


def _generate_batch(
    model: Llama,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stops: list[int],
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> list[list[int]]:
    """``choose``: logits [B, V] -> tokens [B] int64."""
    device = model.lm_head_weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    stop = torch.tensor(stops, device=device, dtype=torch.int64)
    rows = torch.arange(len(prompts), device=device)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens - 1)

    hidden = model.hidden_states(padded, cache)[rows, lengths - 1]  # the last real token of each row
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    new: list[torch.Tensor] = []
    while True:
        token = choose(F.linear(hidden, model.lm_head_weight))
        new.append(token)
        done |= torch.isin(token, stop)
        if len(new) == max_new_tokens or (stops and bool(done.all())):
            break
        places = lengths + len(new) - 1
        hidden = model.hidden_states(token[:, None], cache, places[:, None])[:, 0]

    # Rows that were done ran on with the others; what they said after their stop is cut off.
    return [_until_stop(row, stops) for row in torch.stack(new, 1).tolist()]


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1]
    return tokens


class KVCache:
    """Keys and values of the tokens a model has seen, for ``Llama.hidden_states``; used for generation.

    The slot of a token is its place in its own row, so right-padded prompts need no shifting: the first new
    token of a short row overwrites the first padding slot, and no row looks beyond its own place.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int) -> None:
        """Room for ``batch_size`` rows of ``capacity`` tokens; memory is taken at the first write."""
        self.batch_size = batch_size
        self.capacity = capacity
        self.length = 0
        """Slots in use in the longest row."""
        self._windows = [config.window_of_layer(i) for i in range(config.num_hidden_layers)]
        self._keys: list[torch.Tensor | None] = [None] * config.num_hidden_layers
        self._values: list[torch.Tensor | None] = [None] * config.num_hidden_layers
        self._places: torch.Tensor | None = None  # [B], where this step writes; None during the first call
        self._visible: dict[int | None, torch.Tensor] = {}  # window -> [B, length] bool

    def advance(self, tokens: int, position_ids: torch.Tensor | None) -> None:
        """Makes room for ``tokens`` more; ``position_ids`` [B, 1] are their places in a step."""
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens a row, and {self.length + tokens} are needed"
            )
        self.length += tokens
        if position_ids is None:
            return
        self._places = position_ids.expand(self.batch_size, 1).squeeze(1)
        slots = torch.arange(self.length, device=position_ids.device)
        for window in set(self._windows):
            visible = slots <= self._places[:, None]
            if window is not None:
                visible &= slots > self._places[:, None] - window
            self._visible[window] = visible

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k and v [B, kv_heads, T, D] and returns the attention of q [B, heads, T, D] over what is
        stored."""
        if self._keys[layer] is None:
            room = (self.batch_size, k.shape[1], self.capacity, k.shape[3])
            # Zeros and not empty: a masked slot still meets a weight of zero, and 0 * NaN is NaN.
            self._keys[layer], self._values[layer] = k.new_zeros(room), v.new_zeros(room)
        keys, values = self._keys[layer], self._values[layer]
        window = self._windows[layer]
        if self._places is None:
            keys[:, :, : self.length] = k
            values[:, :, : self.length] = v
            return dense_attention(q, k, v, window=window)
        rows = torch.arange(self.batch_size, device=k.device)
        keys[rows, :, self._places] = k[:, :, 0]
        values[rows, :, self._places] = v[:, :, 0]
        used = slice(0, self.length)
        return dense_attention(
            q, keys[:, :, used], values[:, :, used], causal=False, key_mask=self._visible[window]
        )
