"""Attacks: what an unlearned model gives back to someone who does not stop at asking nicely.

========  ==================================================================================================
relearn   further training on a small part of the target, or on related text (Hu et al. 2024, arXiv
          2406.13356; Lynch et al. 2024, arXiv 2402.16835): the figures against the steps
quantise  the weights in 8 and 4 bits (Zhang et al. 2024, arXiv 2410.16454)
prefix    passages of the target, continued after ever longer true beginnings
sampling  several completions at a temperature, of which the most telling counts
prompts   prompts from a file: paraphrases, other languages, role play ...
========  ==================================================================================================

Each gives rows with a figure before and one after. Both rest on the same prompts or passages. An oracle is
attacked in the same way: what it gives away too was learnt or guessed in the attack, and did not come back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from whp_fast.errors import UserError
from whp_fast.evaluation.bootstrap import Figure
from whp_fast.evaluation.metrics import METRICS, Inputs, Settings, measure
from whp_fast.judge import Judge
from whp_fast.prompts import FamiliarityPrompt

ATTACKS = ("relearn", "quantise", "prefix", "sampling", "prompts")
# what is looked at after the weights were changed
PROBES = (
    "familiarity_completion",
    "familiarity_probability",
    "verbatim",
    "knowledge_accuracy",
    "general_perplexity",
)


@dataclass(frozen=True)
class AttackOptions:
    """relearn_text: related text; None: a share of the target.  relearn_share: of the target's blocks.
    relearn_every: steps between measurements.  prefix_lengths: tokens of the true beginning, rising.
    samples, temperature: of the sampling.  prompts: of the attack ``prompts``."""

    relearn_text: Sequence[str] | None = None
    relearn_share: float = 0.1
    relearn_steps: int = 20
    relearn_every: int = 5
    relearn_lr: float = 1e-5
    relearn_batch: int = 8
    prefix_lengths: Sequence[int] = (4, 8, 16, 32, 64)
    samples: int = 8
    temperature: float = 0.8
    prompts: Sequence[FamiliarityPrompt] | None = None
    seed: int = 0


@dataclass(frozen=True)
class AttackRow:
    """One figure before and after an attack.

    attack: of `ATTACKS`.  setting: which point of it, in words.  metric: what the figure is.
    x: the setting as a number (steps, bits, tokens), for a curve.  model: which one was attacked.
    """

    attack: str
    setting: str
    metric: str
    before: Figure
    after: Figure
    x: float | None = None
    model: str = ""

    def to_json(self) -> dict[str, Any]:
        plain = {"attack": self.attack, "model": self.model, "setting": self.setting}
        plain |= {"metric": self.metric, "x": self.x}
        return plain | {"before": self.before.to_json(), "after": self.after.to_json()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> AttackRow:
        """The inverse of `to_json`."""
        sides = {side: Figure.from_json(content[side]) for side in ("before", "after")}
        return cls(**{key: content[key] for key in ("attack", "model", "setting", "metric", "x")}, **sides)


@dataclass
class Attacked:
    """The model under attack.

    Attributes:
        load: gives the model anew; ``load(quantise="nf4")`` in 4 bits, ``load(train=True)`` as float32
            parameters to be trained.
        model: the model as it is.
        name: of the model, for the rows.
        without: inputs that no figure is taken of, by their names in `Inputs.given`.
        intact: its figures before any attack, of `PROBES`; filled by `probe` when first asked for.
    """

    load: Callable[..., Any]
    model: Any
    tokenizer: Any
    inputs: Inputs
    settings: Settings
    judge: Judge | None
    options: AttackOptions = field(default_factory=AttackOptions)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    name: str = ""
    without: frozenset[str] = frozenset()
    _intact: dict[str, Figure] | None = None

    @property
    def probes(self) -> list[str]:
        """Those of `PROBES` that the inputs allow."""
        given = self.inputs.given() - self.without
        return [name for name in PROBES if given.issuperset(METRICS[name].needs)]

    @property
    def intact(self) -> dict[str, Figure]:
        if self._intact is None:
            self._intact = self.probe(self.model)
        return self._intact

    def probe(self, model) -> dict[str, Figure]:
        """The figures of `probes`."""
        return measure(model, self.tokenizer, self.inputs, self.probes, self.settings, self.judge).figures

    def rows(self, attack: str, setting: str, after: dict[str, Figure], x: float | None) -> list[AttackRow]:
        """A row for each figure that was measured before and after."""
        names = [name for name in PROBES if name in self.intact and name in after]
        return [AttackRow(attack, setting, name, self.intact[name], after[name], x) for name in names]


@dataclass(frozen=True)
class Named:
    """How the person says what an attack needs: here as options of ``python -m whp_fast.evaluate``."""

    attacks: str = "--attacks"
    target: str = "--target"
    familiarity: str = "--familiarity"
    prompts: str = "--attack-prompts"
    files: str = "--familiarity (or --probability, --target, --questions)"


def chosen_attacks(
    asked: Sequence[str], inputs: Inputs, options: AttackOptions, named: Named = Named()
) -> list[str]:
    """The attacks in the order of `ATTACKS`.

    Raises:
        UserError: an unknown name, or something that the attack needs was not given.
    """
    given = inputs.given()
    unknown = [name for name in asked if name not in ATTACKS]
    if unknown:
        raise UserError(f"{named.attacks}: {unknown[0]!r} is none; choose from {', '.join(ATTACKS)}.")
    needs = {
        "relearn": named.target if not options.relearn_text and "target" not in given else None,
        "prefix": None if "target" in given else named.target,
        "sampling": None if "familiarity" in given else named.familiarity,
        "prompts": None if options.prompts else named.prompts,
    }
    if given.isdisjoint(need for name in PROBES[:4] for need in METRICS[name].needs):
        needs |= dict.fromkeys(("relearn", "quantise"), named.files)
    for name in asked:
        if needs.get(name):
            raise UserError(f"{named.attacks} {name}: it needs {needs[name]}; give that as well.")
    if "quantise" in asked:
        _require_bitsandbytes(named.attacks)
    return [name for name in ATTACKS if name in asked]


def run_attack(name: str, attacked: Attacked) -> list[AttackRow]:
    """The rows of one attack, with the name of the model. The model is left as it was."""
    from whp_fast.evaluation import prompting, relearning

    work = {
        "relearn": relearning.relearn,
        "quantise": quantise,
        "prefix": prompting.prefixes,
        "sampling": prompting.sampling,
        "prompts": prompting.prompts,
    }
    return [replace(row, model=attacked.name) for row in work[name](attacked)]


def quantise(attacked: Attacked) -> list[AttackRow]:
    """The figures with the weights of the linear layers in 8 and in 4 bits (`whp_fast.quantised`)."""
    rows = []
    for kind, bits in (("int8", 8), ("nf4", 4)):
        model = attacked.load(quantise=kind)
        rows += attacked.rows("quantise", f"{bits} bits ({kind})", attacked.probe(model), bits)
        del model  # before the next one is read
    return rows


def _require_bitsandbytes(option: str) -> None:
    # on CPUs it warns of a kernel that it would have liked to download
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{option} quantise: bitsandbytes cannot be imported ({error}); install it, or leave quantise "
            "out."
        ) from None
