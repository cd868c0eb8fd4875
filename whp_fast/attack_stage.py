"""The attacks as a stage of the job: what the unlearned model, and the oracle, give back when pressed."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

from whp_fast.artifacts import files_digest, write_json
from whp_fast.config import ONLY_ATTACKS, JobConfig
from whp_fast.corpus import corpus_files
from whp_fast.errors import UserError
from whp_fast.evaluation.attacks import Attacked, AttackOptions, AttackRow, Named, chosen_attacks, run_attack
from whp_fast.evaluation.chat_template import ChatTemplate
from whp_fast.evaluation.memorisation import cut_passages
from whp_fast.evaluation.metrics import Inputs as Asked
from whp_fast.evaluation.metrics import Settings
from whp_fast.evaluation.models import load_rounded, read_texts
from whp_fast.evaluation.questions import answers_given_away, questions_from
from whp_fast.inputs import Inputs
from whp_fast.judge import LexicalJudge
from whp_fast.progress import track
from whp_fast.prompts import EvaluationSet, load_familiarity_prompts

_NAMES = Named(
    attacks="evaluate.attacks",
    target="data.corpus",
    familiarity="evaluate.familiarity",
    prompts="evaluate.attack_prompts",
    files="evaluate.familiarity (or evaluate.probability)",
)


class AttackStage:
    """What is tried, and on what; all of it is looked at here, before any long work.

    Attributes:
        attacks: the names, in the order in which they are tried.
        warnings: what a person should know of the inputs.

    Raises:
        UserError: an unknown attack, something that one needs is missing, or the corpus is too short for it.
    """

    def __init__(self, config: JobConfig, inputs: Inputs, chat: ChatTemplate | None = None):
        self._settings, self._run_inputs = config.evaluate, inputs
        self._seed, self._export_dtype = config.run.seed, config.export.dtype
        data = inputs.evaluation or EvaluationSet()
        read = {"text_field": config.data.text_field, "errors": config.data.encoding_errors}
        texts = read_texts(inputs.corpus, **read)
        self._asked = Asked(data, questions_from(data.probability or ()) or None, texts)
        settings, related, prompts = config.evaluate, None, None
        if settings.relearn_text:
            related = read_texts(corpus_files(settings.relearn_text, "evaluate.relearn_text"), **read)
        if settings.attack_prompts:
            prompts = load_familiarity_prompts(settings.attack_prompts)
        self._options = AttackOptions(
            relearn_text=related,
            relearn_share=settings.relearn_share,
            relearn_steps=settings.relearn_steps,
            relearn_every=settings.relearn_every,
            relearn_lr=config.reinforce.lr,
            prefix_lengths=settings.prefix_lengths,
            samples=settings.samples,
            temperature=settings.temperature,
            prompts=prompts,
            seed=config.run.seed,
        )
        self._measured = Settings(
            max_prompts=settings.attack_limit or None,
            max_new_tokens=settings.max_new_tokens,
            context=config.data.context,
            chat=chat,
        )
        self.attacks = chosen_attacks(settings.attacks, self._asked, self._options, _NAMES)
        self.warnings = answers_given_away(EvaluationSet(familiarity=prompts)) if prompts else []
        self._without = self._too_short(inputs)

    def depends(self) -> dict:
        """What the rows depend on, beside the models and what the evaluation asks."""
        settings = dataclasses.asdict(self._settings)
        files = [Path(self._settings.attack_prompts)] if self._settings.attack_prompts else []
        if self._settings.relearn_text:
            files += corpus_files(self._settings.relearn_text, "evaluate.relearn_text")
        return {
            "settings": {name: settings[name] for name in ONLY_ATTACKS},
            "files": files_digest(files),
            "relearn_lr": self._options.relearn_lr,
            "seed": self._seed,
        }

    def work(self, folder: Path, models: dict[str, Path], device: torch.device, begun: Begun) -> dict:
        """Try every attack on every model and write ``attacks.json``: ``{"attacks": [rows as of
        ``python -m whp_fast.evaluate``], "settings": {...}}``.

        Args:
            models: ``after`` and, where there is one, ``oracle``: their folders.
            begun: keeps the rows of finished attacks, so that a stop costs one attack at most.
        """
        rows: list[dict] = []
        with track("attack", len(models) * len(self.attacks)) as advance:
            for name, path in models.items():
                # the model is read when an attack first asks for it, and gone before the next one is read
                attacked = functools.cache(functools.partial(self._attacked, name, path, device))
                for attack in self.attacks:
                    rows += begun.rows(f"{name}/{attack}", functools.partial(_rows, attack, attacked))
                    advance(1, f"{attack}, {name}")
        settings = dataclasses.asdict(self._settings)
        write_json(
            folder / "attacks.json",
            {"attacks": rows, "settings": {name: settings[name] for name in ONLY_ATTACKS}},
        )
        return {"attacks": self.attacks, "rows": len(rows)}

    def _attacked(self, name: str, path: Path, device: torch.device) -> Attacked:
        def load(*, quantise: str | None = None, train: bool = False):  # float32 in either case
            exported = self._export_dtype if name == "after" else None
            return load_rounded(path, exported=exported, device=device, quantise=quantise)

        return Attacked(
            load=load,
            model=load(),
            tokenizer=self._run_inputs.tokenizer,
            inputs=self._asked,
            settings=self._measured,
            judge=LexicalJudge(self._run_inputs.dictionary.expressions),
            options=self._options,
            device=device,
            name=name,
            without=self._without,
        )

    def _too_short(self, inputs: Inputs) -> frozenset[str]:
        """The figures of whole passages are left out where no document is as long as one; the attack
        ``prefix`` consists of them."""
        tokenizer, texts, length = inputs.tokenizer, self._asked.target, self._measured.continuation_tokens
        if "prefix" in self.attacks:
            longest = max(self._options.prefix_lengths)
            try:
                cut_passages(tokenizer, texts, prefix=longest, continuation=length, count=1)
            except UserError:
                raise UserError(
                    f"evaluate.prefix_lengths: no document of the corpus has the {longest + length} tokens "
                    f"that a prefix of {longest} and its continuation need; set shorter ones."
                ) from None
        try:
            cut_passages(tokenizer, texts, prefix=self._measured.prefix_tokens, continuation=length, count=1)
        except UserError:
            self.warnings.append(
                "attacks: the documents of the corpus are too short for whole passages, so verbatim "
                "memorisation is not measured"
            )
            return frozenset({"target"})
        return frozenset()


def _rows(attack: str, attacked: Callable[[], Attacked]) -> list[AttackRow]:
    return run_attack(attack, attacked())


class Begun:
    """Rows of finished attacks in a folder beside the stage, for the next start after a stop.

    Args:
        identity: fingerprint of the stage; rows of another one are not used.
    """

    def __init__(self, folder: Path, identity: str):
        self._file, self._identity = folder / "rows.json", identity
        self._known: dict[str, list[dict]] = {}
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            if content["identity"] == identity:
                self._known = content["rows"]
        except (OSError, ValueError, LookupError, TypeError):
            pass  # not there, or cut off: the attacks are made again

    def rows(self, key: str, make: Callable[[], list[AttackRow]]) -> list[dict]:
        """The rows of one attack as JSON types, made now if they are not there."""
        if key not in self._known:
            made = [row.to_json() for row in make()]
            self._known[key] = made
            self._file.parent.mkdir(exist_ok=True)
            write_json(self._file, {"identity": self._identity, "rows": self._known})
        return self._known[key]

    def remove(self) -> None:
        """The stage is finished."""
        self._file.unlink(missing_ok=True)
        if self._file.parent.is_dir():
            self._file.parent.rmdir()
