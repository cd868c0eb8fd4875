"""The matching rules of the reference code, so that its labels can be reproduced token for token.

They differ from the project's own (:mod:`whp_fast.alignment`): expressions are matched by exact token ids,
without a test for word boundaries; the first expression in dictionary order wins, not the longest; either
tokenised spelling of an expression draws its counterpart on its own; blocks know nothing of their neighbours;
and the last position of a block has no label. Letters a to l in the comments name the rules of the method's
description.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from whp_fast.alignment import Alignment
from whp_fast.alignment_kernels import draw
from whp_fast.anchors import Dictionary
from whp_fast.corpus import Blocks
from whp_fast.reasons import INSIDE, LAST, REPEATED
from whp_fast.tokens import Tokenizer


class ReferenceAligner:
    """The counterpart of :class:`whp_fast.alignment.Aligner` under the reference code's rules."""

    def __init__(self, dictionary: Dictionary, tokenizer: Tokenizer, *, seed: int = 0):
        self.dictionary = dictionary
        self.tokenizer = tokenizer
        self.seed = seed
        # first token -> {tokens of a spelling: (expression, spelling)}: (a) two spellings, (c) nested by
        # first token
        self._index: dict[int, dict[tuple[int, ...], tuple[int, int]]] = {}
        for number, expression in enumerate(dictionary.expressions):
            for spelling, tokens in enumerate(tokenizer.variants(expression)):
                if tokens:
                    self._index.setdefault(tokens[0], {})[tuple(tokens)] = (number, spelling)
        self._values = [tokenizer.variants(value) for value in dictionary.values]

    def align(
        self, blocks: Sequence[np.ndarray], *, first_block: int = 0, contiguous: bool = False
    ) -> Alignment:
        """Align a list of blocks, each on its own (``contiguous`` has no meaning here)."""
        translated: list[int] = []
        used: list[tuple[int, int]] = []
        maps, reasons = [], []
        offsets, translated_offsets, used_offsets = [0], [0], [0]
        matches = np.zeros(len(self.dictionary.entries), dtype=np.int64)
        for number, block in enumerate(blocks):
            index_map, reason = self._align_block(
                [int(t) for t in block], first_block + number, translated, used, matches
            )
            maps.append(index_map)
            reasons.append(reason)
            offsets.append(offsets[-1] + len(index_map))
            translated_offsets.append(len(translated))
            used_offsets.append(len(used))
        pairs = np.array(used, dtype=np.int32).reshape(-1, 2)
        return Alignment(
            block_offsets=np.array(offsets, dtype=np.int64),
            index_map=np.concatenate(maps) if maps else np.zeros(0, dtype=np.int32),
            reason=np.concatenate(reasons) if reasons else np.zeros(0, dtype=np.uint8),
            translated=np.array(translated, dtype=np.int32),
            translated_offsets=np.array(translated_offsets, dtype=np.int64),
            used_at=pairs[:, 0].copy(),
            used_value=pairs[:, 1].copy(),
            used_offsets=np.array(used_offsets, dtype=np.int64),
            matches=matches,
        )

    def align_stream(self, blocks: Blocks, chunk_tokens: int = 1 << 19) -> Iterator[tuple[int, Alignment]]:
        """Align all blocks of a stream in chunks: (number of the chunk's first block, its alignment)."""
        per_chunk = max(1, chunk_tokens // blocks.context)
        for first in range(0, len(blocks), per_chunk):
            last = min(first + per_chunk, len(blocks))
            yield first, self.align([blocks[i] for i in range(first, last)], first_block=first)

    def first_tokens(self) -> np.ndarray:
        """The first token of either spelling of every counterpart: int32 [n_values, 2] (rule j)."""
        return np.array(
            [[spelling[0] for spelling in pair] for pair in self._values], dtype=np.int32
        ).reshape(-1, 2)

    def _align_block(self, tokens, block, translated, used, matches):
        begin = len(translated)
        index_map: list[int] = []
        reason: list[int] = []
        seen: set[int] = set()
        position = 0
        while position < len(tokens):
            found = self._match(tokens, position)
            if found is None:
                index_map.append(len(translated) - begin)
                reason.append(0)
                translated.append(tokens[position])
                position += 1
                continue
            length, expression, spelling = found
            value = self._draw(expression, spelling, block)
            if expression in seen and index_map:  # (i) the point that predicts the expression again
                index_map[-1] = -1
                reason[-1] = REPEATED
            seen.add(expression)
            matches[expression] += 1
            used.append((len(translated) - begin, value))
            translated += self._values[value][spelling]
            # (g) only the last token of the expression reads an output, that of the last token of the
            # counterpart
            index_map += [-1] * (length - 1) + [len(translated) - begin - 1]
            reason += [INSIDE] * (length - 1) + [0]
            position += length
        if index_map and index_map[-1] >= 0:  # (l) the shift of the labels drops the last one
            index_map[-1] = -1
            reason[-1] = LAST
        return np.array(index_map, dtype=np.int32), np.array(reason, dtype=np.uint8)

    def _match(self, tokens, position):
        """(d) The first spelling in dictionary order that stands here: (length, expression, spelling)."""
        for key, (expression, spelling) in self._index.get(tokens[position], {}).items():
            if tuple(tokens[position : position + len(key)]) == key:
                return len(key), expression, spelling
        return None

    def _draw(self, expression: int, spelling: int, block: int) -> int:
        """(e) One draw per spelling and block; the spellings draw independently."""
        low, high = self.dictionary.value_offsets[expression : expression + 2]
        return int(low + draw(self.seed, block, 2 * expression + spelling, high - low))
