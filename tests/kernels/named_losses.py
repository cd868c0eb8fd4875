"""The named losses of the family by their published formulas, in plain torch.

Nothing here uses whp_kernels but for naming, beside each formula, the choices that are to give it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from whp_kernels.losses.combination import Identity, Offset, RelativeTop, StudentOffset, Whp

VOCAB = 41

# ------------------------------------------------------------------------------------- the published formulas


@dataclass
class Problem:
    """Logits [n, V] of student and teachers, true next tokens [n], and the forbidden tokens of each row."""

    student: Tensor
    teachers: list[Tensor]
    labels: Tensor
    forbidden: list[list[int]]

    def only(self, rows: Tensor) -> "Problem":
        return Problem(
            self.student[rows],
            [teacher[rows] for teacher in self.teachers],
            self.labels[rows],
            [self.forbidden[row] for row in rows.tolist()],
        )


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [n] of probabilities; a term with p = 0 is 0."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def soft(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(logits / temperature, -1)


def capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, VOCAB).double()


def whp_target(base: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """arXiv 2310.02238, section 2: v_generic = v_baseline - alpha * ReLU(v_reinforced - v_baseline)."""
    return base - alpha * F.relu(reinforced - base)


def forbid(base: Tensor, forbidden: list[list[int]]) -> Tensor:
    """Forbidden tokens get the mean of the position's logits, taken before any of them was replaced."""
    rows = []
    for row, tokens in zip(base, forbidden):
        mean = sum(row.tolist()) / len(row)
        rows.append(torch.stack([row.new_tensor(mean) if v in tokens else x for v, x in enumerate(row)]))
    return torch.stack(rows)


def uld_target(base: Tensor, assistant: Tensor, weight: float) -> Tensor:
    """arXiv 2406.08607: the assistant counts only where p_base(v) >= 0.1 max p_base."""
    p = soft(base)
    return base + weight * torch.where(p >= 0.1 * p.max(-1, keepdim=True).values, assistant, 0.0)


def contrastive_log_ratio(expert: Tensor, amateur: Tensor, fraction: float) -> Tensor:
    """arXiv 2210.15097: log p_exp / p_ama on {v: p_exp(v) >= fraction * max p_exp}, nothing elsewhere."""
    p, q = soft(expert), soft(amateur)
    return torch.where(p >= fraction * p.max(-1, keepdim=True).values, torch.log(p / q), -math.inf)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """arXiv 2306.13649, equation 1, with the limits of TRL: 0 is the forward, 1 the reverse KL."""
    p_s, p_t = soft(student, temperature), soft(teacher, temperature)
    if beta in (0, 1):
        return kl(p_t, p_s) if beta == 0 else kl(p_s, p_t)
    mixture = beta * p_t + (1 - beta) * p_s
    return beta * kl(p_t, mixture) + (1 - beta) * kl(p_s, mixture)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def undial(x: Problem, beta: float) -> Tensor:
    """arXiv 2402.10052: the teacher loses beta at the true token; cross-entropy with its softmax."""
    return cross_entropy(x.student, soft(x.teachers[0] - beta * one_hot(x.labels)))


def ce_u(x: Problem, logits: Tensor) -> Tensor:
    """arXiv 2503.01224: cross-entropy with the model's own softmax (no gradient) without the true token."""
    without = logits.detach().masked_fill(one_hot(x.labels).bool(), -math.inf)
    return cross_entropy(logits, soft(without))


# ------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Named:
    """``formula`` gives the losses [n]; ``choices`` the arguments of `combination_loss` for it."""

    name: str
    formula: Callable[[Problem], Tensor]
    choices: dict = field(default_factory=dict)
    teachers: int | str = 0  # or "self"; or "refusal": log of a one-hot distribution
    edit: tuple = ()  # kind and value, at the labels; ("mean",) at the forbidden tokens


def with_whp(alpha: float, x: Problem) -> Tensor:
    return whp_target(x.teachers[0], x.teachers[1], alpha)


def gkd(beta: float, temperature: float = 1.0) -> Named:
    return Named(
        f"gkd beta {beta:g} temperature {temperature:g}",
        lambda x: generalized_jsd(x.student, x.teachers[0], beta, temperature),
        dict(divergence="jsd", beta=beta, temperature=temperature),
        1,
    )


def hard(target: Tensor) -> Tensor:
    """The token with maximal logit."""
    return target.argmax(-1)


NAMED = [
    Named("cross entropy", lambda x: cross_entropy(x.student, x.labels)),
    Named(
        "cross entropy softcap", lambda x: cross_entropy(capped(x.student, 3.0), x.labels), dict(softcap=3.0)
    ),
    Named(
        "whp",
        lambda x: cross_entropy(x.student, hard(with_whp(5.0, x))),
        dict(combination=Whp(5.0), divergence="hard"),
        2,
    ),
    Named(
        "whp alpha 0",
        lambda x: cross_entropy(x.student, hard(x.teachers[0])),
        dict(combination=Whp(0.0), divergence="hard"),
        2,
    ),
    Named(
        "whp with forbidden tokens",
        lambda x: cross_entropy(
            x.student, hard(whp_target(forbid(x.teachers[0], x.forbidden), x.teachers[1], 5.0))
        ),
        dict(combination=Whp(5.0), divergence="hard"),
        2,
        ("mean",),
    ),
    Named(
        "whp softcap",
        lambda x: cross_entropy(
            capped(x.student, 3.0), hard(whp_target(*(capped(t, 3.0) for t in x.teachers), 5.0))
        ),
        dict(combination=Whp(5.0), divergence="hard", softcap=3.0),
        2,
    ),
    Named(  # arXiv 2406.01983, their ablation
        "fklu",
        lambda x: kl(soft(with_whp(4.0, x)), soft(x.student)),
        dict(combination=Whp(4.0), divergence="forward_kl"),
        2,
    ),
    Named(
        "fklu with forbidden tokens and temperature",
        lambda x: kl(
            soft(whp_target(forbid(x.teachers[0], x.forbidden), x.teachers[1], 1.5), 2.0),
            soft(x.student, 2.0),
        ),
        dict(combination=Whp(1.5), divergence="forward_kl", temperature=2.0),
        2,
        ("mean",),
    ),
    Named(  # arXiv 2406.01983
        "rklu",
        lambda x: kl(soft(x.student), soft(with_whp(4.0, x))),
        dict(combination=Whp(4.0), divergence="reverse_kl"),
        2,
    ),
    Named(
        "rklu temperature and softcap",
        lambda x: kl(
            soft(capped(x.student, 4.0), 0.7),
            soft(whp_target(*(capped(t, 4.0) for t in x.teachers), 2.0), 0.7),
        ),
        dict(combination=Whp(2.0), divergence="reverse_kl", temperature=0.7, softcap=4.0),
        2,
    ),
    Named("undial", lambda x: undial(x, 10.0), dict(divergence="cross_entropy"), 1, ("add", -10.0)),
    Named("undial weak", lambda x: undial(x, 3.0), dict(divergence="cross_entropy"), 1, ("add", -3.0)),
    Named("ce-u", lambda x: ce_u(x, x.student), dict(divergence="cross_entropy"), "self", ("ban",)),
    Named(
        "ce-u softcap",
        lambda x: ce_u(x, capped(x.student, 3.0)),
        dict(divergence="cross_entropy", softcap=3.0),
        "self",
        ("ban",),
    ),
    Named(
        "uld",
        lambda x: kl(soft(uld_target(*x.teachers, -1.0)), soft(x.student)),
        dict(combination=Offset(-1.0, RelativeTop(0.1, "keep")), divergence="forward_kl"),
        2,
    ),
    Named(
        "uld hard",
        lambda x: cross_entropy(x.student, hard(uld_target(*x.teachers, -0.8))),
        dict(combination=Offset(-0.8, RelativeTop(0.1)), divergence="hard"),
        2,
    ),
    Named(
        "contrastive decoding",
        lambda x: kl(soft(contrastive_log_ratio(*x.teachers, 0.1)), soft(x.student)),
        dict(combination=Offset(-1.0, RelativeTop(0.1, "mask")), divergence="forward_kl"),
        2,
    ),
    Named(
        "contrastive decoding jsd",
        lambda x: generalized_jsd(x.student, contrastive_log_ratio(*x.teachers, 0.05), 0.5),
        dict(combination=Offset(-1.0, RelativeTop(0.05, "mask")), divergence="jsd"),
        2,
    ),
    Named(
        "filtered teacher",
        lambda x: kl(soft(contrastive_log_ratio(x.teachers[0], x.teachers[0] * 0, 0.2)), soft(x.student)),
        dict(combination=Identity(RelativeTop(0.2, "mask")), divergence="forward_kl"),
        1,
    ),
    Named(
        "offset of two models",
        lambda x: kl(soft(x.teachers[0] + 0.85 * (x.teachers[1] - x.teachers[2])), soft(x.student)),
        dict(combination=Offset(0.85), divergence="forward_kl"),
        3,
    ),
    Named(
        "offset of two models, filtered",
        lambda x: kl(
            soft(uld_target(x.teachers[0], x.teachers[1] - x.teachers[2], 0.85), 1.5), soft(x.student, 1.5)
        ),
        dict(combination=Offset(0.85, RelativeTop(0.1)), divergence="forward_kl", temperature=1.5),
        3,
    ),
    Named(  # arXiv 2404.11045
        "delta-unlearning",
        lambda x: cross_entropy(x.teachers[0] + 0.8 * (x.student - x.teachers[1]), x.labels),
        dict(combination=StudentOffset(0.8)),
        2,
    ),
    Named(
        "delta-unlearning softcap",
        lambda x: cross_entropy(
            capped(x.teachers[0], 3.0) - 1.2 * (capped(x.student, 3.0) - capped(x.teachers[1], 3.0)),
            x.labels,
        ),
        dict(combination=StudentOffset(-1.2), softcap=3.0),
        2,
    ),
    Named(
        "kl to a frozen reference",
        lambda x: F.kl_div(
            F.log_softmax(x.student, -1), F.log_softmax(x.teachers[0], -1), reduction="none", log_target=True
        ).sum(-1),
        dict(divergence="forward_kl"),
        1,
    ),
    Named(
        "kl to a frozen reference softcap",
        lambda x: kl(soft(capped(x.teachers[0], 2.5)), soft(capped(x.student, 2.5))),
        dict(divergence="forward_kl", softcap=2.5),
        1,
    ),
    Named(
        "distillation temperature",
        lambda x: cross_entropy(x.student / 3.0, soft(x.teachers[0], 3.0)),
        dict(combination=Identity(), divergence="cross_entropy", temperature=3.0),
        1,
    ),
    Named(
        "hard distillation",
        lambda x: cross_entropy(x.student, hard(x.teachers[0])),
        dict(combination=Identity(), divergence="hard"),
        1,
    ),
    *(gkd(beta) for beta in (0, 0.1, 0.5, 0.9, 1)),
    gkd(0.3, 2.0),
    gkd(1, 0.5),
    Named(
        "jsd of whp with forbidden tokens and softcap",
        lambda x: generalized_jsd(
            capped(x.student, 4.0),
            whp_target(forbid(capped(x.teachers[0], 4.0), x.forbidden), capped(x.teachers[1], 4.0), 3.0),
            0.7,
        ),
        dict(combination=Whp(3.0), divergence="jsd", beta=0.7, softcap=4.0),
        2,
        ("mean",),
    ),
    Named(  # JensUn, forget term: the target is one token
        "jsd to a refusal token",
        lambda x: generalized_jsd(x.student, x.teachers[0], 0.5),
        dict(divergence="jsd", beta=0.5),
        "refusal",
    ),
]
