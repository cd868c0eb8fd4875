"""Targets of the methods that the library's own do not cover, each over the fused losses.

    PreferenceTargets   NPO and SimNPO
    EditedTargets       UNDIAL: the base's distribution with the text's token pushed down
    OwnTargets          CE-U: the model's own distribution without the text's token
    CombinedTargets     RKLU: base and reinforced model on the same text, without a dictionary

They follow the protocol of ``whp_fast.objectives.Targets``. What is compared at a position is always its next
token in the text, so the last position of a block takes no part. Teachers are hidden states in memory, a row
for each token of the stream: the world is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from whp_kernels.losses import SELF, Identity, RowEdits, Whp, linear_combination_loss
from whp_kernels.losses.unlearning import npo_loss, simnpo_loss

from whp_fast.corpus import Blocks
from whp_fast.objectives import take_rows


@dataclass(frozen=True, eq=False)
class TextRows:
    """The positions with a next token of some blocks laid after each other.

    Attributes:
        places: in the batch, int64 [n].
        stream: in the token stream, int64 [n].
        following: the next tokens, int64 [n].
        numbers: of the blocks that have such positions, int64 [b].
        lengths: how many each of these has.
    """

    places: Tensor
    stream: Tensor
    following: Tensor
    numbers: Tensor
    lengths: tuple[int, ...]

    def pin(self) -> TextRows:
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> TextRows:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change) -> TextRows:
        tensors = (self.places, self.stream, self.following, self.numbers)
        return TextRows(*map(change, tensors), self.lengths)


class TextTargets:
    """What all share: blocks, of which every position but the last has a next token."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks

    def count(self, numbers: np.ndarray) -> int:
        """Positions with a next token."""
        return sum(max(0, len(self.blocks[int(number)]) - 1) for number in numbers)

    def prepare(self, numbers: np.ndarray) -> TextRows:
        """See ``whp_fast.objectives.Targets``."""
        places, stream, following, lengths, at = [], [], [], {}, 0
        for number in map(int, numbers):
            block = self.blocks[number]
            if len(block) > 1:
                lengths[number] = len(block) - 1
                places.append(at + np.arange(len(block) - 1))
                stream.append(number * self.blocks.context + np.arange(len(block) - 1))
                following.append(block[1:].astype(np.int64))
            at += len(block)
        arrays = [np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (places, stream, following)]
        kept = torch.tensor(list(lengths), dtype=torch.int64)
        return TextRows(*map(torch.from_numpy, arrays), kept, tuple(lengths.values()))


class PreferenceTargets(TextTargets):
    """NPO (arXiv 2404.05868) with the base's ``reference`` of each block; without one SimNPO (arXiv
    2410.07163), on the mean over a block's tokens. A block is a sequence.

    Args:
        reference: float32 [blocks], negative log-likelihood of each block under the base, or None.
        beta: see :func:`whp_kernels.losses.unlearning.npo_loss`.
        delta: SimNPO's margin.
    """

    def __init__(self, blocks: Blocks, reference: Tensor | None, *, beta: float, delta: float = 0.0):
        super().__init__(blocks)
        self.reference, self.beta, self.delta = reference, beta, delta

    def count(self, numbers: np.ndarray) -> int:
        """Blocks with something to predict: the loss is a mean over sequences."""
        return sum(len(self.blocks[int(number)]) > 1 for number in numbers)

    def loss(self, hidden, lm_head_weight, prepared, *, num_items_in_batch, compute_dtype, chunk_mib):
        nll = linear_combination_loss(
            take_rows(hidden, prepared.places),
            lm_head_weight,
            prepared.following,
            reduction="none",
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )
        if not prepared.lengths:
            return nll.sum()
        parts = nll.split(prepared.lengths)
        table = pad_sequence(parts, batch_first=True)
        if self.reference is not None:
            mean = npo_loss(table, self.reference[prepared.numbers], beta=self.beta)
        else:
            trained = pad_sequence([torch.ones_like(part, dtype=torch.bool) for part in parts], True)
            mean = simnpo_loss(table, trained, beta=self.beta, delta=self.delta)
        return mean * len(parts) / num_items_in_batch


class EditedTargets(TextTargets):
    """UNDIAL (arXiv 2402.10052): CE(softmax(v_base - strength 1_y), p), y the text's next token.

    Args:
        base: hidden states of the base at every token of the stream, [tokens, H].
        base_head: its LM head [V, H].
    """

    def __init__(self, blocks: Blocks, base: Tensor, base_head: Tensor, *, strength: float):
        super().__init__(blocks)
        self.base, self.base_head, self.strength = base, base_head.detach(), strength

    def loss(self, hidden, lm_head_weight, prepared, *, num_items_in_batch, compute_dtype, chunk_mib):
        return linear_combination_loss(
            take_rows(hidden, prepared.places),
            lm_head_weight,
            teachers=((self.base[prepared.stream], self.base_head),),
            combination=Identity(),
            row_edits=RowEdits.at_labels(prepared.following, "add", -self.strength),
            divergence="cross_entropy",
            num_items_in_batch=num_items_in_batch,
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )


class OwnTargets(TextTargets):
    """CE-U (arXiv 2503.01224): CE(softmax(sg(v) with v_y = -inf), p), v the model's own logits."""

    def loss(self, hidden, lm_head_weight, prepared, *, num_items_in_batch, compute_dtype, chunk_mib):
        return linear_combination_loss(
            take_rows(hidden, prepared.places),
            lm_head_weight,
            teachers=SELF,
            row_edits=RowEdits.at_labels(prepared.following, "ban"),
            divergence="cross_entropy",
            num_items_in_batch=num_items_in_batch,
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )


class CombinedTargets(TextTargets):
    """RKLU (arXiv 2406.01983): KL(p, softmax(v_base - alpha relu(v_reinforced - v_base))), both teachers on
    the original text.

    Args:
        teachers: (hidden states [tokens, H], LM head [V, H]) of the base and of the reinforced model.
    """

    def __init__(self, blocks: Blocks, teachers: Sequence[tuple[Tensor, Tensor]], *, alpha: float):
        super().__init__(blocks)
        self.teachers = [(states, head.detach()) for states, head in teachers]
        self.combination = Whp(alpha)

    def loss(self, hidden, lm_head_weight, prepared, *, num_items_in_batch, compute_dtype, chunk_mib):
        return linear_combination_loss(
            take_rows(hidden, prepared.places),
            lm_head_weight,
            teachers=tuple((states[prepared.stream], head) for states, head in self.teachers),
            combination=self.combination,
            divergence="reverse_kl",
            num_items_in_batch=num_items_in_batch,
            compute_dtype=compute_dtype,
            chunk_mib=chunk_mib,
        )
