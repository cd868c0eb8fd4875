"""How wrong a result is: every operation in float64, by the eager formulas, and the error that is allowed.

The error is the norm of the difference to float64, divided by the norm of the latter, and the largest of that
over the gradients; for labels the share that differs. Where the label is the teachers' choice, rows whose two
best tokens are closer than float32 can tell are left out. Exact ties stay: there the lowest index is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_cases import FORMULAS, Inputs, Model, Op, whp_target
from benchmarks.loss_measure import Outputs

NEAR_TIE = 1e-4  # logits are about 10
LOGIT_ROWS = 4096  # rows of the logits' gradient that are compared at most
HIDDEN_ROWS = 256  # rows of the hidden states' gradient, and of the head's besides those of tokens taught
CHUNK = {False: 64, True: 256}  # rows of logits in float64 at a time; True: of linear operations
CAP = 1e-4  # no baseline is taken to be worse than this, however wrong it is
FLOOR = 1e-6  # a few roundings of float32


@dataclass
class Truth:
    """An operation in float64.

    Attributes:
        loss: a float; or int64 labels [N].
        entropy: of the soft target, mean over rows; 0 for other operations.
        rows: for each gradient (or for the labels) which of its rows are compared.
        gradients: float64, those rows.
        rounding: the error of these gradients rounded once to their dtype; 0 for labels.
    """

    loss: float | Tensor
    entropy: float
    rows: list[Tensor]
    gradients: list[Tensor]
    rounding: float

    def errors(self, outputs: Outputs, *, cross_entropy: bool = False) -> tuple[float, float | None]:
        """Error of the gradients and of the loss; for labels theirs and None.

        ``cross_entropy``: the loss is the cross-entropy with the soft target, not the KL.
        """
        if outputs.gradients is None:
            kept = self.rows[0]
            return float((outputs.loss[kept] != self.loss[kept]).double().mean()), None
        found = [
            gradient if len(rows) == len(gradient) else gradient[rows]
            for gradient, rows in zip(outputs.gradients, self.rows)
        ]
        expected = self.loss + (self.entropy if cross_entropy else 0.0)
        return _largest_error(found, self.gradients), abs(float(outputs.loss) - expected) / abs(expected)


def allowed_error(rounding: float, baseline: float | None) -> float:
    """Twice the error of eager torch that computes in float32, or of one rounding to the gradient's dtype."""
    return 2 * max(rounding, min(baseline or 0.0, CAP)) + FLOOR


@torch.no_grad()
def find_truth(op: Op, inputs: Inputs) -> Truth:
    """``op`` in float64, a chunk of rows at a time."""
    n, device = len(inputs.labels), inputs.labels.device
    models = [inputs.student if op.gradient else None, *(inputs[1:3] if op.teachers else (None, None))]
    heads = [model.weight.double() if isinstance(model, Model) else None for model in models]
    rows = _spread(n, HIDDEN_ROWS if op.linear else LOGIT_ROWS, device)
    tokens = d_weight = None
    if op.linear and op.gradient:
        vocab, width = heads[0].shape
        tokens = torch.cat([_spread(vocab, HIDDEN_ROWS, device), inputs.labels[:HIDDEN_ROWS]]).unique()
        d_weight = torch.zeros((len(tokens), width), dtype=torch.float64, device=device)
    loss = entropy = 0.0
    labels, d_rows = inputs.labels.clone(), []
    undecided = torch.zeros(n, dtype=torch.bool, device=device)
    rivals = []
    for start in range(0, n, CHUNK[op.linear]):
        part = slice(start, min(start + CHUNK[op.linear], n))
        logits = [_logits(model, head, part) for model, head in zip(models, heads)]
        if op.teachers_choose:
            labels[part], undecided[part], two_best = _choice(whp_target(*logits[1:]))
            rivals.append(two_best[undecided[part]].flatten())
        if not op.gradient:
            continue
        formula = FORMULAS["label_ce" if op.teachers_choose else op.formula]
        share = (part.stop - part.start) / n  # the formulas average over the rows they are given
        with torch.enable_grad():
            leaf = logits[0].requires_grad_()
            chunk_loss = share * formula(*logits, labels[part])
            (d_logits,) = torch.autograd.grad(chunk_loss, leaf)
        loss += float(chunk_loss)
        if op.formula == "whp_soft":
            log_t = F.log_softmax(whp_target(*logits[1:]), dim=-1)
            entropy -= float((log_t.exp() * log_t).sum()) / n
        d_some = d_logits[rows[(rows >= part.start) & (rows < part.stop)] - start]
        d_rows.append(d_some @ heads[0] if op.linear else d_some)
        if op.linear:
            d_weight += d_logits[:, tokens].t() @ inputs.student.hidden[part].double()
    decided = ~undecided[rows]
    if not op.gradient:
        return Truth(labels, 0.0, [rows[decided]], [], 0.0)
    kept_rows, gradients = [rows[decided]], [torch.cat(d_rows)[decided]]
    if op.linear:
        kept = ~torch.isin(tokens, torch.cat(rivals)) if rivals else torch.ones_like(tokens, dtype=torch.bool)
        kept_rows.append(tokens[kept])
        gradients.append(d_weight[kept])
    rounded = [gradient.to(leaf.dtype) for gradient, leaf in zip(gradients, inputs.leaves)]
    return Truth(loss, entropy, kept_rows, gradients, _largest_error(rounded, gradients))


def _logits(model: Tensor | Model | None, head: Tensor | None, part: slice) -> Tensor | None:
    if model is None:
        return None
    return model[part].double() if head is None else model.hidden[part].double() @ head.t()


def _choice(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first argmax [n], whether another token is too close to it [n], and the two best tokens [n, 2]."""
    best = target.amax(dim=-1, keepdim=True)
    columns = torch.arange(target.shape[1], device=target.device)
    first = torch.where(target == best, columns, target.shape[1]).amin(dim=-1, keepdim=True)
    others = target.scatter(1, first, float("-inf"))
    second, column = others.max(dim=-1, keepdim=True)
    margin = (best - second).squeeze(1)
    return first.squeeze(1), (margin > 0) & (margin < NEAR_TIE), torch.cat([first, column], dim=1)


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most ``most`` indices below ``count``, evenly spread, the first and the last among them."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.linspace(0, count - 1, most, device=device, dtype=torch.float64).round().long()


def _largest_error(found: list[Tensor], truth: list[Tensor]) -> float:
    return max(_relative_error(value, expected) for value, expected in zip(found, truth))


def _relative_error(found: Tensor, truth: Tensor) -> float:
    difference = sum(
        float((part - expected).norm()) ** 2 for part, expected in zip(found.split(64), truth.split(64))
    )
    return difference**0.5 / float(truth.norm())
