"""What the labels will teach, in figures: shares trained, changed and masked, and the commonest
replacements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from whp_kernels.losses import IGNORE_INDEX

from whp_fast.reasons import REASONS, TRAINED
from whp_fast.scoring import token_text
from whp_fast.tokens import Tokenizer

_KEPT_PAIRS = 200_000  # rare pairs are forgotten beyond this, so that memory does not grow with the corpus


class LabelStatistics:
    """Counts over all labels, fed piece by piece."""

    def __init__(self):
        self.positions = self.trained = self.changed_from_text = self.changed_from_base = 0
        self.reasons = np.zeros(len(REASONS), dtype=np.int64)
        self.pairs: Counter[tuple[int, int]] = Counter()

    def add(self, following: np.ndarray, labels: np.ndarray, own: np.ndarray, reason: np.ndarray) -> None:
        """Count one piece.

        Args:
            following: the text's own next token at each position, -1 where there is none.
            labels: the labels, -100 where untrained.
            own: what the base says on the translation, without the offset.
            reason: index into :data:`whp_fast.reasons.REASONS`.
        """
        trained = labels != IGNORE_INDEX
        self.positions += len(labels)
        self.trained += int(trained.sum())
        self.changed_from_base += int((trained & (labels != own)).sum())
        self.reasons += np.bincount(reason[~trained], minlength=len(REASONS))
        changed = trained & (labels != following) & (following >= 0)
        self.changed_from_text += int(changed.sum())
        pairs, counts = np.unique(np.stack([following[changed], labels[changed]]), axis=1, return_counts=True)
        self.pairs.update({(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, counts)})
        if len(self.pairs) > _KEPT_PAIRS:
            self.pairs = Counter(dict(self.pairs.most_common(_KEPT_PAIRS // 2)))

    @classmethod
    def sum(cls, parts: Iterable[LabelStatistics]) -> LabelStatistics:
        """Of several parts together."""
        total = cls()
        for part in parts:
            total.positions += part.positions
            total.trained += part.trained
            total.changed_from_text += part.changed_from_text
            total.changed_from_base += part.changed_from_base
            total.reasons += part.reasons
            total.pairs.update(part.pairs)
        return total

    def summary(self, tokenizer: Tokenizer, n_replacements: int = 20) -> dict:
        """The figures as JSON types; the keys are those of ``ReportData.label_stats``."""
        common = [
            {"text": token_text(tokenizer, a), "label": token_text(tokenizer, b), "count": n}
            for (a, b), n in self.pairs.most_common(n_replacements)
        ]
        masked = {REASONS[k]: int(n) for k, n in enumerate(self.reasons) if k != TRAINED and n}
        return {
            "positions": self.positions,
            "trained": self.trained,
            "changed_from_text": self.changed_from_text,
            "changed_from_base": self.changed_from_base,
            "masked": masked,
            "replacements": common,
        }


def label_page(
    tokenizer: Tokenizer, tokens: np.ndarray, labels: np.ndarray, reason: np.ndarray, limit: int = 160
) -> list[dict]:
    """The beginning of a block with the label under each token: ``{"token", "label", "reason"}``.

    The label stands under the token whose place it takes, so it is that of the position before.
    """
    page = [{"token": token_text(tokenizer, tokens[0]), "label": None, "reason": "first of the block"}]
    for i in range(1, min(limit, len(tokens))):
        label = int(labels[i - 1])
        shown = None if label == IGNORE_INDEX else token_text(tokenizer, label)
        page.append(
            {"token": token_text(tokenizer, tokens[i]), "label": shown, "reason": REASONS[reason[i - 1]]}
        )
    return page
