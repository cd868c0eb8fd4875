"""The command line of ``python -m whp_fast.evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from whp_fast.anchors import load_dictionary
from whp_fast.artifacts import write_json
from whp_fast.checkpoint import load_config, load_model
from whp_fast.errors import UserError, exit_status
from whp_fast.evaluation import tables
from whp_fast.evaluation.attacks import (
    ATTACKS,
    Attacked,
    AttackOptions,
    AttackRow,
    chosen_attacks,
    run_attack,
)
from whp_fast.evaluation.bootstrap import Figure
from whp_fast.evaluation.chat_template import ChatTemplate, load_chat_template
from whp_fast.evaluation.curve import draw_relearning
from whp_fast.evaluation.endpoint_judge import KEY_VARIABLE, EndpointJudge
from whp_fast.evaluation.harness import harness_figures, require_harness
from whp_fast.evaluation.metrics import (
    METRICS,
    Inputs,
    Measured,
    Settings,
    chosen_metrics,
    compare,
    measure,
)
from whp_fast.evaluation.model_judge import ModelJudge
from whp_fast.evaluation.models import find_subject, load_rounded, merged_files, read_texts
from whp_fast.evaluation.questions import answers_given_away, questions_from
from whp_fast.judge import LexicalJudge
from whp_fast.progress import say
from whp_fast.prompts import EvaluationFiles, load_choices, load_familiarity_prompts
from whp_fast.tokens import load_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status (2 for what the user can mend)."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _Evaluation(options).run(), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m whp_fast.evaluate",
        description="Is the target gone, at what price, and does it stay gone? Figures of a model, or of the "
        "models of a run, each with a 95 %% bootstrap interval.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL_OR_RUN", help="Hugging Face model folder, or run folder"
    )
    files = parser.add_argument_group("files (a run has its own)")
    files.add_argument("--familiarity", type=Path, help="familiarity.json: prompts, with references")
    files.add_argument("--probability", type=Path, help="probability.json: prompts with idiosyncratic words")
    files.add_argument("--questions", type=Path, help="questions on the target, as --choices")
    files.add_argument("--target", type=Path, nargs="+", help="the text to forget: .txt, .jsonl or folders")
    files.add_argument(
        "--holdout",
        type=Path,
        nargs="+",
        help="text of the same kind that was never trained on; default: the general text",
    )
    files.add_argument(
        "--choices", type=Path, help="choices.jsonl: general questions, with choices or clozes"
    )
    files.add_argument("--text", type=Path, help="general text for the perplexity: .txt, .jsonl or a folder")
    files.add_argument("--anchors", type=Path, help="anchor dictionary; its expressions count as names too")
    files.add_argument("--oracle", type=Path, help="a model that never saw the target")

    figures = parser.add_argument_group("figures")
    figures.add_argument("--metrics", default="", help=f"some of {', '.join(METRICS)}; default: all possible")
    figures.add_argument(
        "--lm-eval", default="", help="tasks of lm-evaluation-harness: arc_easy,hellaswag,..."
    )
    figures.add_argument("--lm-eval-limit", type=int, help="at most so many documents of a task")
    figures.add_argument("--max-prompts", type=int, help="a quick look: at most so many of each kind")
    figures.add_argument("--max-new-tokens", type=int, help="length of a completion (default: 40)")
    figures.add_argument(
        "--chat-template",
        action="store_true",
        help="give familiarity prompts as messages, in the chat template of the tokenizer (default: a run's)",
    )
    figures.add_argument("--prefix-tokens", type=int, default=32, help="given of a passage (default: 32)")
    figures.add_argument(
        "--continuation-tokens", type=int, default=32, help="asked of a passage (default: 32)"
    )
    figures.add_argument("--passages", type=int, default=100, help="at most so many passages (default: 100)")

    judge = parser.add_argument_group("judge (default: words are looked up)")
    judge.add_argument("--judge-endpoint", metavar="URL", help="OpenAI-compatible, http://localhost:8000/v1")
    judge.add_argument(
        "--judge-model",
        metavar="NAME",
        help=f"model at the endpoint (key: {KEY_VARIABLE}); without an endpoint a model folder here",
    )
    judge.add_argument(
        "--judge-timeout", type=float, default=30.0, help="seconds for an answer (default: 30)"
    )

    attacks = parser.add_argument_group("attacks")
    attacks.add_argument("--attacks", default="", help=f"some of {','.join(ATTACKS)}")
    attacks.add_argument("--attack-prompts", type=Path, help="prompts, as --familiarity, each with a kind")
    attacks.add_argument("--relearn-text", type=Path, nargs="+", help="related text; default: of the target")
    attacks.add_argument("--relearn-share", type=float, default=0.1, help="of the target (default: 0.1)")
    attacks.add_argument("--relearn-steps", type=int, default=20, help="default: 20")
    attacks.add_argument("--relearn-every", type=int, default=5, help="steps between figures (default: 5)")
    attacks.add_argument("--relearn-lr", type=float, help="default: that of a run's reinforce, else 1e-5")
    attacks.add_argument("--prefix-lengths", default="4,8,16,32,64", help="tokens (default: 4,8,16,32,64)")
    attacks.add_argument("--samples", type=int, default=8, help="completions of a prompt (default: 8)")
    attacks.add_argument("--temperature", type=float, default=0.8, help="of the samples (default: 0.8)")
    attacks.add_argument("--seed", type=int, default=0, help="of samples and relearning (default: 0)")

    parser.add_argument(
        "--json", type=Path, help="write all figures and details here; tables and picture beside"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch (default: 32)")
    parser.add_argument("--context", type=int, help="tokens of a block of text (default: a run's, else 512)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Evaluation:
    """One call of the command: everything is checked before the first model is read."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.warnings: list[str] = []
        _check_numbers(options)
        self.subject = find_subject(options.model, options.oracle)
        self.inputs = self._inputs()
        self.attack_options = self._attack_options()
        oracle = "oracle" in self.subject.models
        self.attacks = chosen_attacks(_listed(options.attacks), self.inputs, self.attack_options)
        self.tasks = _listed(options.lm_eval)
        if not (self.inputs.given() or self.attacks or self.tasks):
            raise UserError(
                "No evaluation file was given; name one of --familiarity, --probability, --questions, "
                "--target, "
                "--choices and --text, or --lm-eval."
            )
        if self.tasks:
            require_harness()
        self.metrics = chosen_metrics(_listed(options.metrics), self.inputs, oracle)
        self.tokenizer = load_tokenizer(self.subject.tokenizer)
        self.settings = self._settings()
        self.device = torch.device(options.device)

    def run(self) -> None:
        for warning in self.warnings:
            say(f"[yellow]warning:[/yellow] {_markup(warning)}")
        judge = self._judge()
        measured: dict[str, Measured] = {}
        harness: dict[str, dict[str, Figure]] = {}
        rows: list[AttackRow] = []
        for name in self.subject.models:
            model = self._load(name)
            measured[name] = measure(model, self.tokenizer, self.inputs, self.metrics, self.settings, judge)
            if self.tasks:
                harness[name] = harness_figures(
                    model,
                    self.tokenizer,
                    self.tasks,
                    max_length=model.config.max_position_embeddings,
                    batch_size=self.settings.batch_size,
                    limit=self.options.lm_eval_limit,
                )
            if name in (self.subject.main, "oracle"):
                rows += self._attack(name, model, judge)
            del model  # before the next one is read
        for name, found in measured.items():
            if "oracle" in measured and name != "oracle":
                compare(found, measured["oracle"], self.metrics)
        for warning in getattr(judge, "warnings", list)():
            self.warnings.append(warning)
            say(f"[yellow]warning:[/yellow] {_markup(warning)}")
        self._tell(measured, harness, rows)

    def _inputs(self) -> Inputs:
        options, subject = self.options, self.subject
        given = EvaluationFiles(options.familiarity, options.probability, options.choices, options.text)
        data = merged_files(given, subject.files).load()
        questions = None if options.questions is None else load_choices(options.questions)
        if questions is None and data.probability is not None:
            questions = questions_from(data.probability) or None
            if questions is not None:
                self.warnings.append(
                    "target questions: made from the probability prompts (the first idiosyncratic word is "
                    "right, "
                    "the generic ones are wrong); give --questions for better ones"
                )
        target = options.target or subject.target
        texts = None if target is None else read_texts(target, subject.text_field)
        holdout = None if options.holdout is None else read_texts(options.holdout, subject.text_field)
        if holdout is None and texts is not None and data.texts is not None:
            holdout = data.texts
            self.warnings.append(
                "hold-out: the general text, so Min-K% also sees that it is of another kind than the target; "
                "give --holdout for text of the same kind"
            )
        self.warnings += answers_given_away(data, questions or ())
        return Inputs(data, questions, texts, holdout)

    def _attack_options(self) -> AttackOptions:
        options = self.options
        related = None if options.relearn_text is None else read_texts(options.relearn_text)
        prompts = None if options.attack_prompts is None else load_familiarity_prompts(options.attack_prompts)
        return AttackOptions(
            relearn_text=related,
            relearn_share=options.relearn_share,
            relearn_steps=options.relearn_steps,
            relearn_every=options.relearn_every,
            relearn_lr=options.relearn_lr or self.subject.relearn_lr or 1e-5,
            prefix_lengths=_lengths(options.prefix_lengths),
            samples=options.samples,
            temperature=options.temperature,
            prompts=prompts,
            seed=options.seed,
        )

    def _settings(self) -> Settings:
        options, subject = self.options, self.subject
        longest = load_config(subject.models[subject.main]).max_position_embeddings
        return Settings(
            max_prompts=options.max_prompts,
            max_new_tokens=options.max_new_tokens or subject.max_new_tokens or 40,
            batch_size=options.batch_size,
            context=min(options.context or subject.context or 512, longest),
            prefix_tokens=options.prefix_tokens,
            continuation_tokens=options.continuation_tokens,
            passages=options.passages,
            chat=self._chat(),
        )

    def _chat(self) -> ChatTemplate | None:
        if not (self.options.chat_template or self.subject.chat_template):
            return None
        folder = self.subject.tokenizer
        folder = folder if folder.is_dir() else folder.parent
        chat = load_chat_template(folder, self.tokenizer)
        if chat is None:
            raise UserError(f"--chat-template: {folder} has none; leave the option out.")
        return chat

    def _judge(self) -> Any:
        options = self.options
        if options.judge_endpoint:
            if not options.judge_model:
                raise UserError("--judge-endpoint: no model is named; give its name with --judge-model.")
            return EndpointJudge(options.judge_endpoint, options.judge_model, timeout=options.judge_timeout)
        if options.judge_model:
            folder = Path(options.judge_model)
            model = load_model(folder, dtype=getattr(torch, options.dtype), device=self.device)
            tokenizer = load_tokenizer(folder)
            chat = load_chat_template(folder, tokenizer)
            return ModelJudge(model, tokenizer, options.judge_model, chat=chat)
        anchors = options.anchors or self.subject.anchors
        return LexicalJudge(load_dictionary(anchors).expressions if anchors else ())

    def _load(self, name: str, *, quantise: str | None = None, train: bool = False):
        """A model of the subject. What a run unlearned is rounded as its export is."""
        model = load_rounded(
            self.subject.models[name],
            exported=self.subject.export_dtype if name == "after" else None,
            dtype=torch.float32 if train else getattr(torch, self.options.dtype),
            device=self.device,
            quantise=quantise,
        )
        if self.tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{self.subject.models[name]}: its embedding has {model.config.vocab_size} rows but the "
                "tokenizer "
                f"{self.tokenizer.vocab_size} tokens; name a model with the same tokenizer."
            )
        return model

    def _attack(self, name: str, model, judge) -> list[AttackRow]:
        attacked = Attacked(
            load=lambda **how: self._load(name, **how),
            model=model,
            tokenizer=self.tokenizer,
            inputs=self.inputs,
            settings=self.settings,
            judge=judge,
            options=self.attack_options,
            device=self.device,
            name=name,
        )
        return [row for attack in self.attacks for row in run_attack(attack, attacked)]

    def _tell(self, measured: dict[str, Measured], harness, rows: list[AttackRow]) -> None:
        page = {
            "Figures": tables.metric_rows({name: found.figures for name, found in measured.items()}),
            "Attacks": tables.attack_rows(rows),
            "lm-evaluation-harness": tables.harness_rows(harness),
        }
        title = f"Evaluation of {self.options.model}"
        for name, table in page.items():
            tables.print_table(title if name == "Figures" else name, table)
        if self.options.json is None:
            return
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "subject": str(self.options.model),
            "models": {name: found.to_json() for name, found in measured.items()},
            "attacks": [row.to_json() for row in rows],
            "lm_eval": {n: {task: f.to_json() for task, f in found.items()} for n, found in harness.items()},
            "settings": {name: value for name, value in vars(self.settings).items() if name != "chat"}
            | {"chat_template": self.settings.chat is not None},
            "warnings": self.warnings,
        }
        write_json(self.options.json, content)
        text = tables.markdown(title, page, self.warnings)
        picture = self.options.json.with_name(f"{self.options.json.stem}_relearn.png")
        if draw_relearning(picture, rows):
            text += f"\n![Figures against the steps of relearning]({picture.name})\n"
        self.options.json.with_suffix(".md").write_text(text, encoding="utf-8")


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"max_prompts": 1, "max_new_tokens": 1, "batch_size": 1, "context": 2, "prefix_tokens": 1}
    least |= {"continuation_tokens": 1, "passages": 1, "relearn_steps": 1, "relearn_every": 1, "samples": 1}
    least |= {"lm_eval_limit": 1}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}, but it must be at least {smallest}; raise it."
            )
    for name in ("temperature", "relearn_lr", "judge_timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but it must be above 0; raise it.")
    if not 0 < options.relearn_share <= 1:
        raise UserError(f"--relearn-share is {options.relearn_share}; give a share above 0 and up to 1.")


def _lengths(text: str) -> list[int]:
    parts = _listed(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--prefix-lengths is {text!r}; give whole numbers above 0, as in 4,8,16.")
    return sorted({int(part) for part in parts})


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _markup(text: str) -> str:
    from rich.markup import escape

    return escape(text)
