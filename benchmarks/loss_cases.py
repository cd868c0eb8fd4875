"""What ``benchmarks.loss`` measures: the operations, their formulas in eager torch, and their inputs.

The formulas are what somebody would write without a library. They are measured themselves, compiled by
torch.compile, and run in float64 they are what every result is compared with: nothing of the library judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 5.0
LN_2 = math.log(2)
SEED = 20240


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        formula: its name among ``FORMULAS``; the linear operations compute the logits before it.
        divergence: what the library calls it; None for ``generic_labels``.
        products: matrix products that cannot be avoided (logits of each model, gradients of hidden states
            and head); 0 from logits.
    """

    name: str
    title: str
    formula: str
    divergence: str | None
    teachers: bool = True
    products: int = 0

    @property
    def linear(self) -> bool:
        return self.products > 0

    @property
    def gradient(self) -> bool:
        return self.divergence is not None

    @property
    def teachers_choose(self) -> bool:
        """Whether the label is the teachers' argmax."""
        return self.formula in ("whp_hard", "generic_labels")


_T = "t = v_b − 5·relu(v_r − v_b)"
OPS = {
    op.name: op
    for op in (
        Op("whp_soft", f"WHP, soft: KL(p_t, p_s), {_T}", "whp_soft", "forward_kl"),
        Op("whp_hard", f"WHP, hard: CE(argmax t, s), {_T}", "whp_hard", "hard"),
        Op("label_ce", "Cross-entropy: CE(y, s)", "label_ce", "label", teachers=False),
        Op("rklu", f"RKLU: KL(p_s, p_t), {_T}", "rklu", "reverse_kl"),
        Op("jsd", f"JSD: KL(p_t, m)/2 + KL(p_s, m)/2, {_T}", "jsd", "jsd"),
        Op("generic_labels", f"Generic labels: argmax t, {_T}", "generic_labels", None),
        Op("linear_whp_soft", "WHP, soft, from hidden states", "whp_soft", "forward_kl", products=5),
        Op("linear_whp_hard", "WHP, hard, from hidden states", "whp_hard", "hard", products=5),
        Op("linear_ce", "Cross-entropy from hidden states", "label_ce", "label", teachers=False, products=3),
        Op("linear_labels", "Generic labels from hidden states", "generic_labels", None, products=2),
    )
}


# ------------------------------------------------------------------------------- the formulas, in eager torch


def whp_target(base: Tensor, reinforced: Tensor) -> Tensor:
    return base - ALPHA * F.relu(reinforced - base)


def whp_soft(student, base, reinforced, labels):
    log_t = F.log_softmax(whp_target(base, reinforced), dim=-1)
    return F.kl_div(F.log_softmax(student, dim=-1), log_t, log_target=True, reduction="batchmean")


def whp_hard(student, base, reinforced, labels):
    return F.cross_entropy(student, whp_target(base, reinforced).argmax(dim=-1))


def label_ce(student, base, reinforced, labels):
    return F.cross_entropy(student, labels)


def rklu(student, base, reinforced, labels):
    log_t = F.log_softmax(whp_target(base, reinforced), dim=-1)
    return F.kl_div(log_t, F.log_softmax(student, dim=-1), log_target=True, reduction="batchmean")


def jsd(student, base, reinforced, labels):
    log_t = F.log_softmax(whp_target(base, reinforced), dim=-1)
    log_s = F.log_softmax(student, dim=-1)
    log_m = torch.logaddexp(log_t, log_s) - LN_2
    of_target = F.kl_div(log_m, log_t, log_target=True, reduction="batchmean")
    return (of_target + F.kl_div(log_m, log_s, log_target=True, reduction="batchmean")) / 2


def labels_of_teachers(student, base, reinforced, labels):
    return whp_target(base, reinforced).argmax(dim=-1)


FORMULAS = {
    "whp_soft": whp_soft,
    "whp_hard": whp_hard,
    "label_ce": label_ce,
    "rklu": rklu,
    "jsd": jsd,
    "generic_labels": labels_of_teachers,
}


# ----------------------------------------------------------------------------------------------------- inputs


class Model(NamedTuple):
    """Hidden states [N, H] and LM head [V, H]."""

    hidden: Tensor
    weight: Tensor


class Inputs(NamedTuple):
    """``labels`` int64 [N]; the others are logits [N, V], or :class:`Model` for the linear operations."""

    student: Tensor | Model
    base: Tensor | Model
    reinforced: Tensor | Model
    labels: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors whose gradient is asked for."""
        return self.student if isinstance(self.student, Model) else (self.student,)


@dataclass(frozen=True)
class Sizes:
    tokens: int
    vocab: int
    hidden: int | None = None  # None: from logits

    def __str__(self) -> str:
        return f"{self.tokens} × {self.vocab}" + (f", H = {self.hidden}" if self.hidden else "")


def make_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Three models that agree more or less, some sure of a token and some not; the same after each call."""
    torch.manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, device=device)

    tokens, vocab, hidden = sizes.tokens, sizes.vocab, sizes.hidden
    labels = torch.randint(vocab, (tokens,), device=device)
    sure = torch.rand(tokens, device=device)
    if hidden is None:
        base = 2.5 * normal(tokens, vocab)
        base[torch.arange(tokens, device=device), labels] += 10 * sure
        models = [base + 0.5 * normal(tokens, vocab), base, base + normal(tokens, vocab)]
        return Inputs(*(logits.to(dtype) for logits in models), labels)
    scale = 2.5 / hidden**0.5
    weight = scale * normal(vocab, hidden)
    states = normal(tokens, hidden) + 4 * sure.unsqueeze(1) * F.normalize(weight[labels], dim=1)
    models = [Model(states.to(dtype), weight.to(dtype))]
    for _ in range(2):
        near = states + 0.2 * normal(tokens, hidden), weight + 0.2 * scale * normal(vocab, hidden)
        models.append(Model(*(values.to(dtype) for values in near)))
    return Inputs(*models, labels)
