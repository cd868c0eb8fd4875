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

    python -m whp_fast.evaluate MODEL_OR_RUN [--metrics ...] [--attacks ...] [--lm-eval ...] --json FILE

measures these four and all others (``whp_fast.evaluation.metrics``) of a model, or of the models of a run.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from whp_fast.evaluation.bootstrap import Figure, mean_figure, ratio_figure
from whp_fast.judge import UNJUDGED, Judge, LexicalJudge, familiarity_score, familiarity_values, judged
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
    generated_texts,
    next_token_logits,
    next_word_tokens,
    target_log_probs,
    token_text,
)

if TYPE_CHECKING:
    from whp_fast.evaluation.chat_template import ChatTemplate

FIGURES = ("familiarity_completion", "familiarity_probability", "general_accuracy", "general_perplexity")


@dataclass
class EvaluationResult:
    """What `evaluate` found. A figure is None where its file was not given or nothing in it can be scored.

    completions: for each prompt ``{"prompt", "completion", "class": 0..3, "found": [what led to it]}``; the
        class is None where a judge gave no usable answer, and the completion does not count then.
    probabilities: for each prompt ``{"prompt", "probability", "tokens": [piece], "top": piece}``; without a
        probability (None) where no token tells the idiosyncratic words from the generic ones.
    answers: for each question ``{"prompt", "kind": "choice" or "cloze", "answer", "given", "right": bool}``.
    counts: how many of what the figures rest on.
    intervals: name -> [low, high], 95 % by bootstrap over prompts, questions and blocks of text.
    """

    familiarity_completion: float | None = None
    familiarity_probability: float | None = None
    general_accuracy: float | None = None
    general_perplexity: float | None = None
    completions: list[dict[str, Any]] = field(default_factory=list)
    probabilities: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)

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

    def figure(self, name: str) -> Figure | None:
        """One of `FIGURES` with its interval; None where it was not measured."""
        value = getattr(self, name)
        if value is None:
            return None
        low, high = self.intervals.get(name, (math.nan, math.nan))
        units = {
            "familiarity_completion": len([c for c in self.completions if c["class"] is not None]),
            "familiarity_probability": self.counts.get("probability_prompts", 0),
            "general_accuracy": len(self.answers),
            "general_perplexity": self.counts.get("text_tokens", 0),
        }
        return Figure(value, low, high, units[name])

    def _keep(self, name: str, figure: Figure) -> None:
        setattr(self, name, figure.value)
        if math.isfinite(figure.low) and math.isfinite(figure.high):
            self.intervals[name] = [figure.low, figure.high]

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
    chat: ChatTemplate | None = None,
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
        chat: familiarity prompts are given as a user's messages in this template; None: as they are.

    Raises:
        UserError: a fault in a file (when paths are given).
    """
    data = (files.load() if isinstance(files, EvaluationFiles) else files).subset(max_prompts)
    result = EvaluationResult()
    with evaluation_mode(model):
        if data.familiarity is not None:
            result.completions = judged_completions(
                model, tokenizer, data.familiarity, judge or LexicalJudge(), max_new_tokens, batch_size, chat
            )
            classes = [completion["class"] for completion in result.completions]
            known = [c for c in classes if c is not UNJUDGED]
            if known:
                result._keep("familiarity_completion", mean_figure(familiarity_values(known)))
                result.familiarity_completion = familiarity_score(known)
            result.counts["familiarity_prompts"] = len(known)
            result.counts |= {f"class_{c}": classes.count(c) for c in range(4)}
            if len(known) < len(classes):
                result.counts["unjudged"] = len(classes) - len(known)
        if data.probability is not None:
            result.probabilities = idiosyncratic_probabilities(model, tokenizer, data.probability, batch_size)
            scores = [row["probability"] for row in result.probabilities if row["probability"] is not None]
            if scores:
                result._keep("familiarity_probability", mean_figure(scores))
            result.counts["probability_prompts"] = len(scores)
            result.counts["probability_prompts_left_out"] = len(result.probabilities) - len(scores)
        if data.choices is not None:
            result.answers = answered_questions(model, tokenizer, data.choices, batch_size)
            result._keep("general_accuracy", mean_figure([row["right"] for row in result.answers]))
            for kind in ("choice", "cloze"):
                right = [row["right"] for row in result.answers if row["kind"] == kind]
                result.counts |= {f"{kind}_questions": len(right), f"{kind}_right": sum(right)}
        if data.texts is not None:
            losses, tokens = text_losses(
                model, tokenizer, data.texts, context=context, batch_size=batch_size, max_blocks=max_prompts
            )
            if tokens:
                result._keep("general_perplexity", ratio_figure(losses, tokens, safe_exp))
            result.counts["text_tokens"] = sum(tokens)
    return result


def judged_completions(
    model,
    tokenizer,
    prompts: Sequence[FamiliarityPrompt],
    judge: Judge,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    chat: ChatTemplate | None = None,
) -> list[dict[str, Any]]:
    """Greedy completions with the judge's class and, where the judge names it, its evidence."""
    rows = prompt_ids(tokenizer, [item.prompt for item in prompts], chat)
    texts = generated_texts(model, tokenizer, rows, max_new_tokens, batch_size)
    classes = judged(judge, [(item.prompt, text, item) for item, text in zip(prompts, texts, strict=True)])
    evidence = getattr(judge, "evidence", lambda prompt, completion, item: [])
    return [
        {
            "prompt": item.prompt,
            "completion": text,
            "class": number,
            "found": list(evidence(item.prompt, text, item)),
        }
        for item, text, number in zip(prompts, texts, classes, strict=True)
    ]


def prompt_ids(tokenizer, prompts: Sequence[str], chat: ChatTemplate | None = None) -> list[list[int]]:
    """The tokens of prompts: texts that begin here, or a user's messages in a chat template."""
    if chat is not None:
        return [chat.ids(tokenizer, prompt) for prompt in prompts]
    return [document_ids(tokenizer, prompt) for prompt in prompts]


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
    numbers = [number for number, question in enumerate(questions) if isinstance(question, MultipleChoice)]
    scores = choice_log_probs(model, tokenizer, [questions[number] for number in numbers], batch_size)
    for number, of_choices in zip(numbers, scores, strict=True):
        question = questions[number]
        per_byte = [
            log_probs.sum(dtype=torch.float64).item() / len(choice.encode())
            for log_probs, choice in zip(of_choices, question.choices, strict=True)
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


def choice_log_probs(
    model, tokenizer, questions: Sequence[MultipleChoice], batch_size: int = 32
) -> list[list[Tensor]]:
    """For each question and each of its choices the log-probabilities of the choice's tokens, float32.

    A choice stands behind the prompt and a space (unless the prompt ends in white space). What all choices
    share of the prompt's tokens is their context.
    """
    rows, begins, sizes = [], [], []
    for question in questions:
        space = "" if question.prompt[-1].isspace() else " "
        encoded = [document_ids(tokenizer, question.prompt + space + choice) for choice in question.choices]
        rows += encoded
        begins += [first_scored_token(tokenizer, encoded, question.choices)] * len(encoded)
        sizes.append(len(encoded))
    scores = zip(target_log_probs(model, rows, batch_size), begins, strict=True)
    tails = iter([log_probs[begin - 1 :] for log_probs, begin in scores])
    return [[next(tails) for _ in range(size)] for size in sizes]


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
    losses, tokens = text_losses(
        model, tokenizer, texts, context=context, batch_size=batch_size, max_blocks=max_blocks
    )
    return (safe_exp(sum(losses) / sum(tokens)) if tokens else None), sum(tokens)


def text_losses(
    model,
    tokenizer,
    texts: Sequence[str],
    *,
    context: int = 512,
    batch_size: int = 32,
    max_blocks: int | None = None,
) -> tuple[list[float], list[int]]:
    """Of each block: the sum of the negative log-likelihoods of its tokens, and how many these are."""
    blocks = spaced(_text_blocks(tokenizer, tuple(texts), context), max_blocks)
    scores = target_log_probs(model, blocks, batch_size)
    return [-row.sum(dtype=torch.float64).item() for row in scores], [len(row) for row in scores]


def safe_exp(mean: float) -> float:
    """exp, infinite where it overflows: the perplexity of a model that diverged."""
    return math.exp(mean) if mean < 700 else math.inf


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
    from whp_fast.evaluation.command import main as command  # it builds on this file

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
