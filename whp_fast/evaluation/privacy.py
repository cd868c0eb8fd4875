"""Can one tell that the model was trained on a text: Min-K% and PrivLeak.

    Min-K%    the mean log-probability of the k share of a text's tokens that the model finds least likely;
              high for texts it was trained on (Shi et al. 2023, arXiv 2310.16789)
    AUC       of a model: the chance that a text of the target looks *less* familiar than one of the hold-out
              by Min-K%: 0 where the target is known by heart, 1/2 where the two cannot be told apart
    PrivLeak  100 * (AUC of the unlearned - AUC of a model that never saw the target) / the latter
              (MUSE, Shi et al. 2024, arXiv 2407.06460); 0 is best, far below: still known, far above: it
              shows that something was made unlikely on purpose

The AUC has the direction of MUSE, in which a model that knows the target has a PrivLeak near -100.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARE = 0.4  # of the tokens, as in OpenUnlearning's settings; the paper of Min-K% recommends 0.2


def min_k(log_probs: Sequence[float], share: float = SHARE) -> float:
    """The mean of the lowest ``share`` of the log-probabilities, at least of one of them."""
    values = np.sort(np.asarray(log_probs, dtype=np.float64))
    return float(values[: max(1, int(len(values) * share))].mean())


def auc(target: Sequence[float], holdout: Sequence[float]) -> float:
    """P(target < holdout) + P(target = holdout) / 2 over all pairs of the two samples of scores.

    This is the area under the ROC curve of "a low score means that the text is of the target" (Mann and
    Whitney's U divided by the number of pairs).
    """
    target, holdout = np.asarray(target, np.float64), np.sort(np.asarray(holdout, np.float64))
    above = len(holdout) - np.searchsorted(holdout, target, side="right")
    equal = len(holdout) - np.searchsorted(holdout, target, side="left") - above
    return float((above + equal / 2).mean() / len(holdout))


def priv_leak(auc_unlearned: float, auc_oracle: float) -> float:
    """In percent; not a number where the oracle's AUC is 0."""
    return 100 * (auc_unlearned - auc_oracle) / auc_oracle if auc_oracle else float("nan")
