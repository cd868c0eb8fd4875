"""Questions with right and wrong answers: what the model knows of the target, and what it should keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whp_fast.evaluate import choice_log_probs
from whp_fast.evaluation.bootstrap import Figure, figure
from whp_fast.evaluation.forget_quality import harmonic_mean, truth_ratio
from whp_fast.evaluation.rouge import rouge_l
from whp_fast.judge import contains_expression
from whp_fast.prompts import Cloze, EvaluationSet, FamiliarityPrompt, MultipleChoice, ProbabilityPrompt
from whp_fast.scoring import continuations


@dataclass(frozen=True)
class AnswerScores:
    """Of one multiple-choice question, from mean log-probabilities per token of its choices.

    ratio: truth ratio, wrong over right.  probability: of the right choice among all, P(right) / sum of P.
    """

    ratio: float
    probability: float


def answer_scores(
    model, tokenizer, questions: Sequence[MultipleChoice], batch_size: int = 32
) -> list[AnswerScores]:
    """The probabilities of right and wrong answers, per token (TOFU)."""
    results = []
    scores = choice_log_probs(model, tokenizer, questions, batch_size)
    for question, of_choices in zip(questions, scores, strict=True):
        means = [float(log_probs.double().mean()) for log_probs in of_choices]
        right = means[question.answer]
        wrong = [mean for number, mean in enumerate(means) if number != question.answer]
        total = float(np.logaddexp.reduce(means))
        results.append(AnswerScores(truth_ratio(right, wrong), float(np.exp(right - total))))
    return results


def answer_recalls(
    model, tokenizer, questions: Sequence[MultipleChoice | Cloze], batch_size: int = 32
) -> list[float]:
    """ROUGE-L recall of each right answer in the model's greedy continuation of the prompt."""
    answers = [q.answer if isinstance(q, Cloze) else q.choices[q.answer] for q in questions]
    longest = max(len(tokenizer.encode_inside(" " + answer)) for answer in answers) + 4
    given = continuations(model, tokenizer, [q.prompt for q in questions], longest, batch_size)
    return [rouge_l(answer, text).recall for answer, text in zip(answers, given, strict=True)]


def model_utility(scores: Sequence[AnswerScores], recalls: Sequence[float]) -> Figure:
    """The harmonic mean of three means over the questions (TOFU, arXiv 2401.06121): the probability of the
    right choice, max(0, 1 - truth ratio), and the ROUGE-L recall of the greedy answer.

    TOFU takes the three on each of three sets (kept authors, real authors, facts of the world); here there is
    one set, so that the figures of one run compare with each other and not with TOFU's tables.

    Args:
        scores: of the multiple-choice questions.
        recalls: of the same questions, in the same order.
    """
    table = [[s.probability, max(0.0, 1 - s.ratio), r] for s, r in zip(scores, recalls, strict=True)]
    return figure(lambda rows: harmonic_mean(rows.mean(0)), np.array(table))


def questions_from(prompts: Sequence[ProbabilityPrompt]) -> list[MultipleChoice]:
    """Questions on the target from prompts of probability.json: the first idiosyncratic word is the right
    answer, the generic ones are wrong. Prompts without generic words make none."""
    return [
        MultipleChoice(p.prompt, (p.idiosyncratic[0], *dict.fromkeys(p.generic)), 0)
        for p in prompts
        if p.generic and p.idiosyncratic[0] not in p.generic
    ]


def answers_given_away(data: EvaluationSet, questions: Sequence[MultipleChoice | Cloze] = ()) -> list[str]:
    """Warnings that name the prompts that hold their own answer, one for each kind of file."""
    found = {
        "familiarity": [p.prompt for p in data.familiarity or () if _holds(p, [w for w in p.references])],
        "probability": [p.prompt for p in data.probability or () if _holds(p, p.idiosyncratic[:1])],
        "target question": [q.prompt for q in questions if _holds(q, [_right(q)])],
    }
    told = {
        "familiarity": "hold one of their references, which does not count there",
        "probability": "hold their first idiosyncratic word; the model can copy it",
        "target question": "hold the right answer; the model can copy it",
    }
    return [
        f"{kind} prompts: {len(prompts)} {told[kind]} (the first: {_short(prompts[0])})"
        for kind, prompts in found.items()
        if prompts
    ]


def _holds(item: FamiliarityPrompt | ProbabilityPrompt | MultipleChoice | Cloze, words) -> bool:
    return any(contains_expression(item.prompt, word) for word in words)


def _right(question: MultipleChoice | Cloze) -> str:
    return question.answer if isinstance(question, Cloze) else question.choices[question.answer]


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
