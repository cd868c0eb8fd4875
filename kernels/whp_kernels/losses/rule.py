"""The numbers and choices of one loss, as the row kernels see them: combination, edits, divergence."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from whp_kernels.losses.combination import Combination, Identity, Offset, RowEdits, StudentOffset, Whp

DIVERGENCES = ("label", "hard", "cross_entropy", "forward_kl", "reverse_kl", "jsd")
SOFT = ("cross_entropy", "forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Rule:
    """Everything about a loss that is not a tensor.

    Attributes:
        combination: ``none`` (no teachers), ``identity``, ``whp``, ``offset`` or ``student_offset``.
        weight: alpha or weight of the combination.
        relative_top: fraction of the filter, 0 for none.
        outside: ``keep`` or ``mask``.
        edit: ``none``, ``add``, ``ban`` or ``mean``.
        edit_value: for ``add``.
        divergence: one of ``DIVERGENCES``.
        beta: of the Jensen-Shannon divergence, between 0 and 1.
        temperature: divides the logits of teacher and student in soft divergences.
        softcap: every model's logits are ``softcap * tanh(x / softcap)`` first; 0 for none.
    """

    combination: str = "none"
    weight: float = 0.0
    relative_top: float = 0.0
    outside: str = "keep"
    edit: str = "none"
    edit_value: float = 0.0
    divergence: str = "label"
    beta: float = 0.5
    temperature: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(
        cls,
        combination: Combination | None,
        edits: RowEdits | None,
        divergence: str,
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        softcap: float | None = None,
    ) -> Rule:
        """The rule of public arguments.

        Raises:
            ValueError: a choice that does not exist, or that does not go with another.
        """
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence is {divergence!r}, give one of {', '.join(DIVERGENCES)}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, give a finite number above 0")
        if temperature != 1 and divergence not in SOFT:
            raise ValueError(f"temperature has no meaning for divergence={divergence!r}; leave it at 1")
        if divergence == "jsd" and not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta}, give a number from 0 to 1")
        if softcap is not None and not 0 < softcap < math.inf:
            raise ValueError(f"softcap is {softcap}, give a finite number above 0, or None for none")
        if divergence == "jsd" and beta in (0, 1):  # the limits, by the convention of TRL and Liger-Kernel
            divergence = "forward_kl" if beta == 0 else "reverse_kl"
        if combination is None and edits is not None:
            raise ValueError("row_edits change a teacher, but no teachers are given")
        if combination is None and divergence != "label":
            raise ValueError(f"divergence={divergence!r} compares with teachers, but none are given")
        if isinstance(combination, StudentOffset) != (combination is not None and divergence == "label"):
            raise ValueError(
                "StudentOffset goes with divergence='label' (labels are taught through the sum), and "
                "divergence='label' with StudentOffset or with no teachers"
            )
        if isinstance(combination, StudentOffset) and edits is not None:
            raise ValueError("row_edits and StudentOffset cannot be used together")
        if not math.isfinite(getattr(combination, "alpha", getattr(combination, "weight", 0.0))):
            raise ValueError(f"the number of {combination!r} is not finite")
        top = getattr(combination, "relative_top", None)
        name, weight = {
            type(None): lambda c: ("none", 0.0),
            Identity: lambda c: ("identity", 0.0),
            Whp: lambda c: ("whp", c.alpha),
            Offset: lambda c: ("offset", c.weight),
            StudentOffset: lambda c: ("student_offset", c.weight),
        }[type(combination)](combination)
        return cls(
            combination=name,
            weight=float(weight),
            relative_top=top.fraction if top else 0.0,
            outside=top.outside if top else "keep",
            edit=edits.kind if edits is not None else "none",
            edit_value=edits.value if edits is not None else 0.0,
            divergence=divergence,
            beta=float(beta),
            temperature=float(temperature),
            softcap=float(softcap or 0.0),
        )

    @property
    def soft(self) -> bool:
        return self.divergence in SOFT

    def encode(self) -> str:
        """One string for the schema of an operator; :func:`decode` is its inverse. Plain formatting, which
        torch.compile can trace."""
        return (
            f"{self.combination} {self.weight!r} {self.relative_top!r} {self.outside} {self.edit} "
            f"{self.edit_value!r} {self.divergence} {self.beta!r} {self.temperature!r} {self.softcap!r}"
        )


@functools.lru_cache(maxsize=256)
def decode(text: str) -> Rule:
    words = zip(dataclasses.fields(Rule), text.split())
    return Rule(**{field.name: type(field.default)(word) for field, word in words})


def once_labelled(text: str) -> str | None:
    """For the encoded rule of ``hard``: that of cross-entropy with the labels it found, which needs no
    teachers; None for other rules. (String work only: torch.compile traces it.)"""
    words = text.split()
    if words[6] != "hard":
        return None
    return " ".join(["none", "0.0", "0.0", "keep", "none", "0.0", "label", "0.5", "1.0", words[9]])
