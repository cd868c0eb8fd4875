"""Is it gone, and at what price: the figures of the paper for one model.

=======================  =====================================================================  ==========
figure                   what it is                                                             better is
=======================  =====================================================================  ==========
familiarity_completion   greedy completions, put into the paper's classes by a judge, 0 to 1    lower
familiarity_probability  mean probability of the target's own words as the next word, 0 to 1    lower
general_accuracy         share of multiple-choice and cloze questions answered right, 0 to 1    higher
general_perplexity       exp(mean negative log-likelihood per token) on general text, from 1    lower
=======================  =====================================================================  ==========

The first two follow arXiv 2310.02238 (with a lexical judge where the paper asks GPT-4, see `whp_fast.judge`).
Everything is deterministic: greedy decoding, float32 softmax, a fixed subset where one is asked for.

    python -m whp_fast.evaluate MODEL_FOLDER --familiarity F.json --choices C.jsonl --text T.txt --json O.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from whp_fast.anchors import load_dictionary
from whp_fast.errors import UserError, exit_status
from whp_fast.judge import Judge, LexicalJudge, familiarity_score
from whp_fast.prompts import (
    Cloze,
    EvaluationFiles,
    EvaluationSet,
    FamiliarityPrompt,
    MultipleChoice,
    ProbabilityPrompt,
    spaced,
)
from whp_fast.scoring import (
    continuations,
    document_ids,
    evaluation_mode,
    first_scored_token,
    next_token_logits,
    next_word_tokens,
    target_log_probs,
    token_text,
)

FIGURES = ("familiarity_completion", "familiarity_probability", "general_accuracy", "general_perplexity")


@dataclass
class EvaluationResult:
    """What `evaluate` found. A figure is None where its file was not given or nothing in it can be scored.

    completions: for each prompt ``{"prompt", "completion", "class": 0..3, "found": [what led to it]}``.
    probabilities: for each prompt ``{"prompt", "probability", "tokens": [piece], "top": piece}``; without a
        probability (None) where no token tells the idiosyncratic words from the generic ones.
    answers: for each question ``{"prompt", "kind": "choice" or "cloze", "answer", "given", "right": bool}``.
    counts: how many of what the figures rest on.
    """

    familiarity_completion: float | None = None
    familiarity_probability: float | None = None
    general_accuracy: float | None = None
    general_perplexity: float | None = None
    completions: list[dict[str, Any]] = field(default_factory=list)
    probabilities: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float | None]:
        """The four figures, ready for JSON (a perplexity that is not finite becomes None)."""
        values = {name: getattr(self, name) for name in FIGURES}
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values; `from_json` is its inverse."""
        return asdict(self) | self.figures

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> EvaluationResult:
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})


def evaluate(
    model,
    tokenizer,
    files: EvaluationFiles | EvaluationSet,
    *,
    judge: Judge | None = None,
    max_prompts: int | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    context: int = 512,
) -> EvaluationResult:
    """Measure the four figures of a model.

    Args:
        model: a `whp_fast.model.Llama` (or anything with its ``hidden_states`` and ``lm_head_weight``). It is
            put into evaluation mode and given back in the mode in which it came.
        tokenizer: a `whp_fast.tokens.Tokenizer`.
        files: the evaluation files, or what `EvaluationFiles.load` made of them.
        judge: decides the class of a completion; without one, `LexicalJudge` with the prompts' references.
        max_prompts: a quick look, for a curve during training: at most so many evenly spaced prompts of each
            kind and blocks of general text, the same ones each time.
        max_new_tokens: length of a completion, in tokens.
        batch_size: rows of a batch; it does not change the figures beyond rounding.
        context: tokens of a block of general text.

    Raises:
        UserError: a fault in a file (when paths are given).
    """
    data = (files.load() if isinstance(files, EvaluationFiles) else files).subset(max_prompts)
    result = EvaluationResult()
    with evaluation_mode(model):
        if data.familiarity is not None:
            result.completions = judged_completions(
                model, tokenizer, data.familiarity, judge or LexicalJudge(), max_new_tokens, batch_size
            )
            classes = [completion["class"] for completion in result.completions]
            result.familiarity_completion = familiarity_score(classes)
            result.counts["familiarity_prompts"] = len(classes)
            result.counts |= {f"class_{c}": classes.count(c) for c in range(4)}
        if data.probability is not None:
            result.probabilities = idiosyncratic_probabilities(model, tokenizer, data.probability, batch_size)
            scores = [row["probability"] for row in result.probabilities if row["probability"] is not None]
            result.familiarity_probability = sum(scores) / len(scores) if scores else None
            result.counts["probability_prompts"] = len(scores)
            result.counts["probability_prompts_left_out"] = len(result.probabilities) - len(scores)
        if data.choices is not None:
            result.answers = answered_questions(model, tokenizer, data.choices, batch_size)
            result.general_accuracy = sum(row["right"] for row in result.answers) / len(result.answers)
            for kind in ("choice", "cloze"):
                right = [row["right"] for row in result.answers if row["kind"] == kind]
                result.counts |= {f"{kind}_questions": len(right), f"{kind}_right": sum(right)}
        if data.texts is not None:
            result.general_perplexity, result.counts["text_tokens"] = perplexity(
                model, tokenizer, data.texts, context=context, batch_size=batch_size, max_blocks=max_prompts
            )
    return result


def judged_completions(
    model,
    tokenizer,
    prompts: Sequence[FamiliarityPrompt],
    judge: Judge,
    max_new_tokens: int = 40,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Greedy completions with the judge's class and, where the judge names it, its evidence."""
    texts = continuations(model, tokenizer, [item.prompt for item in prompts], max_new_tokens, batch_size)
    evidence = getattr(judge, "evidence", lambda prompt, completion, item: [])
    return [
        {
            "prompt": item.prompt,
            "completion": text,
            "class": int(judge(item.prompt, text, item)),
            "found": list(evidence(item.prompt, text, item)),
        }
        for item, text in zip(prompts, texts, strict=True)
    ]


def idiosyncratic_probabilities(
    model, tokenizer, prompts: Sequence[ProbabilityPrompt], batch_size: int = 32
) -> list[dict[str, Any]]:
    """For each prompt the probability that the next word begins like one of its idiosyncratic words.

    The tokens are the first tokens of the words (`next_word_tokens`) without those that a listed generic word
    begins with too; their probabilities are added up.
    """
    logits = next_token_logits(model, [document_ids(tokenizer, item.prompt) for item in prompts], batch_size)
    rows = []
    for item, row in zip(prompts, logits, strict=True):
        tokens = next_word_tokens(tokenizer, item.prompt, item.idiosyncratic)
        tokens = sorted(tokens - next_word_tokens(tokenizer, item.prompt, item.generic))
        probabilities = row.softmax(-1)
        rows.append(
            {
                "prompt": item.prompt,
                "probability": probabilities[tokens].sum().item() if tokens else None,
                "tokens": [token_text(tokenizer, token) for token in tokens],
                "top": token_text(tokenizer, int(row.argmax())),
            }
        )
    return rows


def answered_questions(
    model, tokenizer, questions: Sequence[MultipleChoice | Cloze], batch_size: int = 32
) -> list[dict[str, Any]]:
    """Answer multiple-choice questions by log-likelihood and cloze questions by greedy continuation.

    A choice scores the sum of its tokens' log-probabilities after the prompt (and a space, unless the prompt
    ends in white space), divided by its length in UTF-8 bytes, so that neither a choice's length nor the way
    the tokenizer cuts it decides. What all choices share of the prompt's tokens is their context. Of equal
    choices the first is taken. A cloze is right when the continuation begins with the answer as whole words,
    white space at the front aside.
    """
    answers: list[dict[str, Any]] = [{} for _ in questions]
    rows, places = [], []  # the token rows of all choices, and (question, first scored token) of each
    for number, question in enumerate(questions):
        if isinstance(question, MultipleChoice):
            space = "" if question.prompt[-1].isspace() else " "
            encoded = [
                document_ids(tokenizer, question.prompt + space + choice) for choice in question.choices
            ]
            rows += encoded
            places += [(number, first_scored_token(tokenizer, encoded, question.choices))] * len(encoded)
    scores: dict[int, list[float]] = {}
    for (number, begin), log_probs in zip(places, target_log_probs(model, rows, batch_size), strict=True):
        scores.setdefault(number, []).append(log_probs[begin - 1 :].sum(dtype=torch.float64).item())
    for number, sums in scores.items():
        question = questions[number]
        per_byte = [
            total / len(choice.encode()) for total, choice in zip(sums, question.choices, strict=True)
        ]
        given = max(range(len(per_byte)), key=per_byte.__getitem__)
        answers[number] = _answer(
            question.prompt,
            "choice",
            question.choices[question.answer],
            question.choices[given],
            given == question.answer,
        )
    clozes = [number for number, question in enumerate(questions) if isinstance(question, Cloze)]
    if clozes:
        # A few tokens more than the answer: a model may cut it differently, and the word's end must be seen.
        longest = max(len(tokenizer.encode_inside(" " + questions[number].answer)) for number in clozes) + 4
        texts = continuations(
            model, tokenizer, [questions[number].prompt for number in clozes], longest, batch_size
        )
        for number, text in zip(clozes, texts, strict=True):
            question = questions[number]
            end = r"(?!\w)" if re.search(r"\w\Z", question.answer) else ""
            right = re.match(re.escape(question.answer) + end, text.lstrip()) is not None
            answers[number] = _answer(question.prompt, "cloze", question.answer, text, right)
    return answers


def perplexity(
    model,
    tokenizer,
    texts: Sequence[str],
    *,
    context: int = 512,
    batch_size: int = 32,
    max_blocks: int | None = None,
) -> tuple[float | None, int]:
    """The perplexity per token of the texts, and how many tokens were predicted; None where there are none.

    Each text is one document: BOS (if the tokenizer has one) and its tokens, cut into blocks of `context`
    tokens that overlap by one, so every token of the document is predicted exactly once.
    """
    blocks = spaced(_text_blocks(tokenizer, tuple(texts), context), max_blocks)
    total, count = 0.0, 0
    for log_probs in target_log_probs(model, blocks, batch_size):
        total -= log_probs.sum(dtype=torch.float64).item()
        count += len(log_probs)
    if not count:
        return None, 0
    mean = total / count
    return (math.exp(mean) if mean < 700 else math.inf), count  # a diverged model would overflow exp


@functools.lru_cache(maxsize=1)  # the points of a curve ask for the same texts again and again
def _text_blocks(tokenizer, texts: tuple[str, ...], context: int) -> list[list[int]]:
    blocks = []
    for text in texts:
        ids = document_ids(tokenizer, text)
        blocks += [ids[i : i + context] for i in range(0, len(ids) - 1, context - 1)]
    return blocks


def next_token_table(model, tokenizer, prompts: Sequence[str], k: int = 200) -> list[dict[str, Any]]:
    """The `k` most probable next tokens: ``{"prompt", "tokens": [{"token", "id", "probability"}]}`` a prompt.

    The report compares such tables of several models; a token that is missing from one has less probability
    there than the last of its tokens, and for the default k less than 1/200.
    """
    with evaluation_mode(model):
        table = []
        for prompt, row in zip(
            prompts, next_token_logits(model, [document_ids(tokenizer, p) for p in prompts]), strict=True
        ):
            values, ids = row.softmax(-1).topk(min(k, len(row)))
            tokens = [
                {"token": token_text(tokenizer, token), "id": token, "probability": value}
                for token, value in zip(ids.tolist(), values.tolist(), strict=True)
            ]
            table.append({"prompt": prompt, "tokens": tokens})
    return table


def _answer(prompt: str, kind: str, answer: str, given: str, right: bool) -> dict[str, Any]:
    return {"prompt": prompt, "kind": kind, "answer": answer, "given": given, "right": right}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for what the user can mend)."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _run(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m whp_fast.evaluate",
        description="Familiarity with a target and general ability of a model.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="Hugging Face model folder")
    parser.add_argument(
        "--familiarity", type=Path, help="familiarity.json: prompts to complete, with references"
    )
    parser.add_argument(
        "--probability", type=Path, help="probability.json: prompts with idiosyncratic next words"
    )
    parser.add_argument("--choices", type=Path, help="choices.jsonl: multiple-choice and cloze questions")
    parser.add_argument("--text", type=Path, help="general text for the perplexity: .txt, .jsonl or a folder")
    parser.add_argument(
        "--anchors", type=Path, help="anchor dictionary; its expressions count as explicit names too"
    )
    parser.add_argument("--json", type=Path, help="write the figures and all details to this file")
    parser.add_argument("--max-prompts", type=int, help="a quick look: at most so many prompts of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="length of a completion (default: 40)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch (default: 32)")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens of a block of general text (default: 512)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run(options: argparse.Namespace) -> None:
    from whp_fast.checkpoint import load_model
    from whp_fast.tokens import load_tokenizer

    files = EvaluationFiles(options.familiarity, options.probability, options.choices, options.text)
    if files == EvaluationFiles():
        raise UserError(
            "No evaluation file was given; name one of --familiarity, --probability, --choices and --text."
        )
    for name, least in (("max_prompts", 1), ("max_new_tokens", 1), ("batch_size", 1), ("context", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}, but it must be at least {least}; raise it."
            )
    data = files.load()  # before the model: a fault in a file should not cost the loading of the weights
    judge = LexicalJudge(load_dictionary(options.anchors).expressions if options.anchors else ())
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, dtype=getattr(torch, options.dtype), device=options.device)
    result = evaluate(
        model,
        tokenizer,
        data,
        judge=judge,
        max_prompts=options.max_prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        context=options.context,
    )
    _print_table(options.model, result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _print_table(model: Path, result: EvaluationResult) -> None:
    from rich.console import Console
    from rich.table import Table

    count = result.counts.get
    table = Table(title=f"Evaluation of {model}", title_justify="left")
    for heading, justify in (
        ("figure", "left"),
        ("value", "right"),
        ("better", "left"),
        ("rests on", "left"),
    ):
        table.add_column(heading, justify=justify)
    rests_on = (
        f"{count('familiarity_prompts', 0)} completions: "
        f"{count('class_3', 0)} explicit, {count('class_2', 0)} thematic",
        f"{count('probability_prompts', 0)} prompts, {count('probability_prompts_left_out', 0)} left out",
        f"{count('choice_right', 0)} of {count('choice_questions', 0)} choices, "
        f"{count('cloze_right', 0)} of {count('cloze_questions', 0)} clozes",
        f"{count('text_tokens', 0)} tokens",
    )
    for name, better, basis in zip(FIGURES, ("lower", "lower", "higher", "lower"), rests_on, strict=True):
        value = getattr(result, name)
        if value is not None:
            table.add_row(
                name.replace("_", " "), f"{value:.3f}" if value < 1e4 else f"{value:.3g}", better, basis
            )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
