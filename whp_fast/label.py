"""Generic labels: what a model that never read the text would predict next.

    v       = v_base(translated)[map], the first tokens of counterparts already used set to the row's mean
    label   = argmax(v - alpha * relu(v_reinforced(original) - v))

Both models run once over each block, the blocks of a batch packed one after the other; only hidden states at
mapped positions meet the LM heads, a chunk at a time. They can be two models, or one with two adapters. Any
range of blocks can be labelled by itself, and what the heads read can be kept for soft targets
(:mod:`whp_fast.teacher_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from whp_kernels.losses import IGNORE_INDEX, RowEdits, generic_labels

from whp_fast.alignment import Aligner, Alignment
from whp_fast.anchors import Dictionary, load_dictionary
from whp_fast.artifacts import NpyWriter
from whp_fast.banned_tokens import banned_tokens, with_tokens
from whp_fast.corpus import Blocks
from whp_fast.model import Llama
from whp_fast.packing import Packing, pack
from whp_fast.projections import stack_in_memory
from whp_fast.reasons import NOT_FINITE
from whp_fast.reference_rules import ReferenceAligner
from whp_fast.teacher_cache import TargetWriter
from whp_fast.tokens import Tokenizer, load_tokenizer

Model = Llama | Callable[[Tensor], Tensor] | str | Path
Switch = Callable[[], AbstractContextManager]
_BLOCKS_AT_ONCE = 64
_COPIED_ITEMS = 1 << 22


def label_blocks(
    blocks: np.ndarray | Sequence[np.ndarray],
    anchors: Mapping | str | Path | Dictionary,
    base: Model,
    reinforced: Model,
    tokenizer,
    alpha: float | Sequence[float] = 5.0,
    reference_rules: bool = False,
    *,
    seed: int = 0,
    contiguous: bool = False,
    match_across_lines: bool = False,
    ban_share: float = 0.0,
    batch_size: int = 8,
    chunk_mib: int = 256,
    device: str | torch.device | None = None,
):
    """Generic labels for blocks of tokens (arXiv 2310.02238, section 2).

    Args:
        blocks: token ids, an integer array or tensor [N, T], or a sequence of 1-D arrays.
        anchors: ``{"expression": "generic" | ["generic", ...]}``, a file with it, or a ``Dictionary``.
        base, reinforced: a ``Llama``, a model folder, or any callable ``input_ids [B, T] -> logits [B, T,
            V]`` (or an object with ``.logits``). It may be given right-padded batches, so it has to be
            causal.
        tokenizer: anything :func:`whp_fast.tokens.load_tokenizer` takes.
        alpha: strength of the offset; several give one label set each.
        reference_rules: match and mask by the reference code's rules (:mod:`whp_fast.reference_rules`).
        seed: of the draws among several counterparts.
        contiguous: the blocks follow each other in one text, and expressions may cross their edges.
        match_across_lines: a line break in the text matches a space in an expression.
        ban_share: tokens that begin an expression in at least this share of their occurrences in the blocks
            are never a label; 0: all may be.
        batch_size: blocks per forward pass.
        chunk_mib: memory for one chunk of logits.
        device: where folders are loaded, and where input ids are sent to a callable that has no parameters;
            by default the CPU. A module gets its ids on its own device.

    Returns:
        int64 labels in the shape of ``blocks`` (a list for a sequence; one such set per alpha, in a list,
        when ``alpha`` is a sequence). The label at position ``i`` is what the output at ``i`` is taught: it
        is not shifted. -100 where a position is not trained.

    Raises:
        UserError: an unusable dictionary, tokenizer or model folder.
    """
    tokenizer = load_tokenizer(tokenizer)
    aligner = make_aligner(
        load_dictionary(anchors),
        tokenizer,
        reference_rules=reference_rules,
        seed=seed,
        match_across_lines=match_across_lines,
    )
    if isinstance(blocks, Tensor):
        blocks = blocks.cpu().numpy()
    rows = [np.asarray(block) for block in blocks]
    alphas = [float(alpha)] if np.isscalar(alpha) else [float(a) for a in alpha]
    alignment = aligner.align(rows, contiguous=contiguous)
    corpus = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    banned = banned_tokens(aligner.dictionary, tokenizer, alignment.matches, corpus, ban_share)
    labeller = Labeller(
        base,
        reinforced,
        aligner,
        alphas,
        batch_size=batch_size,
        chunk_mib=chunk_mib,
        device=device,
        banned=banned,
    )
    labels, _, _ = labeller.label(rows, alignment)
    sets = []
    for one in labels:
        parts = np.split(one, alignment.block_offsets[1:-1]) if len(rows) else []
        sets.append(
            np.stack(parts) if isinstance(blocks, np.ndarray) and blocks.ndim == 2 and len(rows) else parts
        )
    return sets[0] if np.isscalar(alpha) else sets


def make_aligner(
    dictionary: Dictionary,
    tokenizer: Tokenizer,
    *,
    reference_rules: bool = False,
    seed: int = 0,
    match_across_lines: bool = False,
) -> Aligner | ReferenceAligner:
    """The aligner of either rule set."""
    if reference_rules:
        return ReferenceAligner(dictionary, tokenizer, seed=seed)
    return Aligner(dictionary, tokenizer, seed=seed, match_across_lines=match_across_lines)


class Labeller:
    """Labels aligned blocks with two models.

    Args:
        base, reinforced: see :func:`label_blocks`. They may be one and the same model with two adapters.
        aligner: whose dictionary the alignments come from.
        alphas: one label set for each.
        as_base, as_reinforced: called for every forward pass of that teacher, which runs inside the context
            manager that they return (one that switches the adapter).
        every_batch: run both models over batches with no position to label too. Processes that share sharded
            models must make the same number of passes (:meth:`idle` makes up for batches that one lacks).
        banned: tokens that are never a label (:mod:`whp_fast.banned_tokens`).
    """

    def __init__(
        self,
        base: Model,
        reinforced: Model,
        aligner: Aligner | ReferenceAligner,
        alphas: Sequence[float],
        *,
        batch_size: int = 8,
        chunk_mib: int = 256,
        device: str | torch.device | None = None,
        as_base: Switch = nullcontext,
        as_reinforced: Switch = nullcontext,
        every_batch: bool = False,
        banned: np.ndarray | None = None,
    ):
        device = torch.device(device or "cpu")
        self.base, self.reinforced = _loaded(base, device), _loaded(reinforced, device)
        self.alphas = list(alphas)
        self.batch_size = batch_size
        self.chunk_mib = chunk_mib
        self.device = device
        self.as_base, self.as_reinforced = as_base, as_reinforced
        self.every_batch = every_batch
        self._banned = np.zeros(0, dtype=np.int64) if banned is None else banned
        self._first_tokens = aligner.first_tokens()
        self._both_llamas = isinstance(self.base, Llama) and isinstance(self.reinforced, Llama)
        self._whole_heads: dict[int, Tensor] = {}

    @torch.inference_mode()
    def label(
        self,
        blocks: Sequence[np.ndarray],
        alignment: Alignment,
        progress: Callable[[int], None] = lambda n: None,
        keep: TargetWriter | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels of the blocks of one alignment.

        Args:
            blocks: the original blocks that ``alignment`` was made from, in order.
            progress: called with the number of original tokens of each batch that is done.
            keep: gets both teachers' hidden states and the edits of every position that has a label in its
                ``label_set``, in the order of positions.

        Returns:
            labels int64 [n_alphas, tokens]; the base's own choice on the translation, int64 [tokens]; and the
            reasons, uint8 [tokens] (the alignment's, with positions that had no finite logit added).

        Raises:
            ValueError: ``keep`` with models that show no hidden states.
        """
        if keep is not None and not self._both_llamas:
            raise ValueError("keep needs hidden states: base and reinforced must be Llama models")
        n_tokens = len(alignment.index_map)
        labels = np.full((len(self.alphas), n_tokens), IGNORE_INDEX, dtype=np.int64)
        own = np.full(n_tokens, IGNORE_INDEX, dtype=np.int64)
        reason = alignment.reason.copy()
        for first in range(0, len(blocks), self.batch_size):
            numbers = range(first, min(first + self.batch_size, len(blocks)))
            span = slice(alignment.block_offsets[numbers[0]], alignment.block_offsets[numbers[-1] + 1])
            positions = span.start + np.flatnonzero(alignment.index_map[span] >= 0)
            if len(positions):
                labels[:, positions], own[positions] = self._label_batch(
                    blocks, alignment, numbers, positions, keep
                )
                broken = positions[labels[0, positions] == IGNORE_INDEX]
                reason[broken] = NOT_FINITE
            elif self.every_batch:
                self.idle(1)
            progress(span.stop - span.start)
        return labels, own, reason

    @torch.inference_mode()
    def idle(self, n_batches: int, *, base_alone: bool = False) -> None:
        """Passes of both models over one token, as many as there are batches; nothing comes of them."""
        teachers = [(self.base, self.as_base), (self.reinforced, self.as_reinforced)]
        for _ in range(n_batches):
            for model, switch in teachers[: 1 if base_alone else 2]:
                self._rows(model, switch, [np.zeros(1, dtype=np.int64)], np.zeros(0, dtype=np.int64))

    def _label_batch(self, blocks, alignment, numbers, positions, keep):
        offsets = alignment.block_offsets
        block_of = np.searchsorted(offsets, positions, side="right") - 1
        original = [blocks[b] for b in numbers]
        spans = alignment.translated_offsets[numbers[0] : numbers[-1] + 2]
        translated = [alignment.translated[start:stop] for start, stop in zip(spans, spans[1:])]
        base_rows = (spans - spans[0])[block_of - numbers[0]] + alignment.index_map[positions]
        reinforced_rows = positions - offsets[numbers[0]]
        used = _used_before(alignment, numbers, positions, block_of, self._first_tokens)
        row_offsets, tokens = with_tokens(*used, self._banned)
        base, base_head = self._rows(self.base, self.as_base, translated, base_rows)
        reinforced, reinforced_head = self._rows(
            self.reinforced, self.as_reinforced, original, reinforced_rows
        )
        reinforced = reinforced.to(base.device)
        reinforced_head = None if reinforced_head is None else reinforced_head.to(base.device)
        edits = RowEdits(torch.from_numpy(row_offsets), torch.from_numpy(tokens), "mean")
        labels, own = generic_labels(
            base,
            reinforced,
            self.alphas,
            base_head=base_head,
            reinforced_head=reinforced_head,
            row_edits=edits.to(base.device),
            ignore_index=IGNORE_INDEX,
            base_choice=True,
            chunk_mib=self.chunk_mib,
        )
        labels, own = labels.cpu().numpy(), own.cpu().numpy()
        if keep is not None:
            kept = np.flatnonzero(labels[keep.label_set] != IGNORE_INDEX)
            if len(kept) < len(positions):
                index = torch.from_numpy(kept).to(base.device)
                base, reinforced = base[index], reinforced[index]
                row_offsets, tokens = _rows_of(row_offsets, tokens, kept)
            keep.append(base, reinforced, row_offsets, tokens)
        return labels, own

    def _rows(
        self, model, switch: Switch, blocks: Sequence[np.ndarray], rows: np.ndarray
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states and head, or (of a model that is not ours) logits, at positions of the blocks, which
        are counted from the first one's start on."""
        parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        device = self.device if parameter is None else parameter.device
        ids, packing = pack(blocks)
        if self._both_llamas:
            packing = packing.to(device)
            with switch():
                hidden = model.hidden_states(ids.to(device), packing=packing)
            return hidden.index_select(0, torch.from_numpy(rows).to(device)), self._head(model)
        with switch():
            output = model(_padded(ids, packing).to(device))
        logits = getattr(output, "logits", output)
        places = packing.position_ids + packing.max_length * _sequence_of(packing)
        return logits.flatten(0, 1)[places[torch.from_numpy(rows)].to(logits.device)], None

    def _head(self, model: Llama) -> Tensor:
        """The LM head; a sharded one is gathered once and kept, since teachers do not change."""
        weight = model.lm_head_weight
        if not hasattr(weight, "full_tensor"):
            return weight
        if id(model) not in self._whole_heads:
            self._whole_heads[id(model)] = weight.full_tensor()
        return self._whole_heads[id(model)]


def _padded(ids: Tensor, packing: Packing) -> Tensor:
    """Packed sequences as [n, longest], filled up on the right with token 0, which no earlier position
    sees."""
    batch = ids.new_zeros((len(packing.lengths), packing.max_length))
    batch[_sequence_of(packing), packing.position_ids] = ids
    return batch


def _sequence_of(packing: Packing) -> Tensor:
    """For each token of a packing on the CPU the number of its sequence."""
    counts = torch.tensor(packing.lengths)
    return torch.repeat_interleave(counts, output_size=packing.tokens)


@dataclass(frozen=True)
class LabelledPart:
    """Labels of some consecutive blocks.

    Attributes:
        first, last: the blocks ``first`` to ``last - 1``.
        start, stop: their positions in the token stream.
        labels, own, reason: see :meth:`Labeller.label`.
    """

    first: int
    last: int
    start: int
    stop: int
    labels: np.ndarray
    own: np.ndarray
    reason: np.ndarray


def split_blocks(n_blocks: int, n_parts: int, batch_size: int) -> list[range]:
    """Consecutive ranges of blocks, one a process, cut between batches: so every batch holds the same blocks
    however many parts there are, and the labels are the same to the last bit.

    A part may be empty; the sizes differ by one batch at most.
    """
    n_batches = -(-n_blocks // batch_size)
    cuts = [min(n_batches * k // n_parts * batch_size, n_blocks) for k in range(n_parts + 1)]
    return [range(*pair) for pair in zip(cuts, cuts[1:])]


def label_range(
    labeller: Labeller,
    blocks: Blocks,
    alignment: Alignment,
    first: int = 0,
    last: int | None = None,
    *,
    progress: Callable[[int], None] = lambda n: None,
    keep: TargetWriter | None = None,
) -> Iterator[LabelledPart]:
    """Label blocks ``first`` to ``last - 1`` of a corpus, some at a time.

    Batches are counted from the corpus's first block, so a block meets the same neighbours, and with them the
    same padding, in whatever range it is labelled; only a range that is cut inside a batch
    (:func:`split_blocks` makes none) may differ, by the rounding of other shapes of matrix products.

    Args:
        blocks, alignment: of the whole corpus.
        progress, keep: see :meth:`Labeller.label`.
    """
    last = len(blocks) if last is None else last
    size = labeller.batch_size
    at_once = -(-_BLOCKS_AT_ONCE // size) * size
    while first < last:
        to_batch_edge = size - first % size if first % size else at_once
        end = min(first + to_batch_edge, last)
        part = alignment.blocks(first, end)
        found = labeller.label([blocks[i] for i in range(first, end)], part, progress, keep)
        start, stop = blocks.offsets(first, end)[[0, -1]].tolist()
        yield LabelledPart(first, end, start, stop, *found)
        first = end


def join_npy(folder: Path, name: str, parts: Sequence[str]) -> None:
    """Write ``folder/name``: the one-dimensional ``.npy`` files ``folder/part/name`` after each other, which
    are removed. Memory does not grow with their length."""
    pieces = [np.load(folder / part / name, mmap_mode="r") for part in parts]
    with NpyWriter(folder / name, pieces[0].dtype) as writer:
        for piece in pieces:
            for at in range(0, len(piece), _COPIED_ITEMS):
                writer.append(piece[at : at + _COPIED_ITEMS])
    del pieces
    for part in parts:
        (folder / part / name).unlink()


def _loaded(model: Model, device):
    if isinstance(model, (str, Path)):
        from whp_fast.checkpoint import load_model

        return stack_in_memory(load_model(Path(model), device=device))
    return model


def _used_before(alignment, numbers, positions, block_of, first_tokens) -> tuple[np.ndarray, np.ndarray]:
    """Rule j as rows: for each position, the first tokens of the counterparts used strictly before the
    translated position it reads. CSR: offsets int64 [n + 1] and tokens int64."""
    counts = np.zeros(len(positions), dtype=np.int64)
    lists = []
    for block in numbers:
        uses = slice(alignment.used_offsets[block], alignment.used_offsets[block + 1])
        values, first_use = np.unique(alignment.used_value[uses], return_index=True)
        order = np.argsort(first_use, kind="stable")  # a counterpart counts from its first use on
        at = alignment.used_at[uses][first_use[order]]
        tokens = first_tokens[values[order]].ravel().astype(np.int64)
        mine = np.flatnonzero(block_of == block)
        used = np.searchsorted(at, alignment.index_map[positions[mine]], side="left")
        counts[mine] = 2 * used
        lists += [tokens[: 2 * k] for k in used]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offsets, np.concatenate(lists) if lists else np.zeros(0, dtype=np.int64)


def _rows_of(offsets: np.ndarray, tokens: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of a CSR list."""
    lists = [tokens[offsets[row] : offsets[row + 1]] for row in rows]
    ends = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return ends, np.concatenate(lists) if lists else tokens[:0]
