"""All figures of a model: which there are, what each needs, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whp_fast.errors import UserError
from whp_fast.evaluate import EvaluationResult, answered_questions, evaluate
from whp_fast.evaluation import memorisation, privacy
from whp_fast.evaluation.bootstrap import Figure, figure, mean_figure
from whp_fast.evaluation.chat_template import ChatTemplate
from whp_fast.evaluation.forget_quality import ks_p_value, ks_statistic
from whp_fast.evaluation.memorisation import cut_passages
from whp_fast.evaluation.questions import answer_recalls, answer_scores, model_utility
from whp_fast.judge import Judge
from whp_fast.prompts import Cloze, EvaluationSet, MultipleChoice, spaced
from whp_fast.scoring import evaluation_mode


@dataclass(frozen=True)
class Metric:
    """better: in words.  needs: options without which it cannot be measured.  what: one line for the "
    "table."""

    better: str
    needs: tuple[str, ...]
    what: str


METRICS = {
    "familiarity_completion": Metric(
        "lower", ("familiarity",), "completions that show the target, by a judge"
    ),
    "familiarity_probability": Metric("lower", ("probability",), "probability of the target's next words"),
    "verbatim": Metric("lower", ("target",), "ROUGE-L F1 of continued passages"),
    "exact_memorisation": Metric("lower", ("target",), "tokens of passages that are the first choice"),
    "extraction_strength": Metric("lower", ("target",), "share of a passage that the rest calls up"),
    "knowledge_accuracy": Metric("lower", ("questions",), "questions on the target answered right"),
    "truth_ratio": Metric("higher", ("questions",), "right and wrong answers alike: min(R, 1/R)"),
    "forget_quality": Metric("higher", ("questions", "oracle"), "KS p-value of truth ratios, to the oracle"),
    "min_k": Metric("lower", ("target",), "log-probability of the target's least likely tokens"),
    "min_k_auc": Metric("oracle's", ("target", "holdout"), "target less familiar than the hold-out"),
    "priv_leak": Metric("near 0", ("target", "holdout", "oracle"), "that AUC beside the oracle's, percent"),
    "general_accuracy": Metric("higher", ("choices",), "general questions answered right"),
    "model_utility": Metric("higher", ("choices",), "harmonic mean of what general answers show"),
    "general_perplexity": Metric("lower", ("text",), "of general text, per token"),
}


@dataclass(frozen=True)
class Inputs:
    """What is asked of the models; None where it was not given.

    data: the four evaluation files.  questions: on the target.  target: its text, a document an entry.
    holdout: text of the same kind that the target's model was not trained on.
    """

    data: EvaluationSet = field(default_factory=EvaluationSet)
    questions: Sequence[MultipleChoice | Cloze] | None = None
    target: Sequence[str] | None = None
    holdout: Sequence[str] | None = None

    def given(self) -> set[str]:
        """The names of `Metric.needs` that are there."""
        here = {
            "familiarity": self.data.familiarity,
            "probability": self.data.probability,
            "choices": self.data.choices,
            "text": self.data.texts,
            "questions": self.questions,
            "target": self.target,
            "holdout": self.holdout,
        }
        return {name for name, content in here.items() if content is not None}


@dataclass(frozen=True)
class Settings:
    """How much is asked.

    max_prompts: of each kind, and blocks of general text; None: all.  max_new_tokens: of a completion.
    prefix_tokens, continuation_tokens: of a passage.  passages: at most so many.  share: of Min-K%.
    chat: template in which familiarity prompts are given; None: as they are.
    """

    max_prompts: int | None = None
    max_new_tokens: int = 40
    batch_size: int = 32
    context: int = 512
    prefix_tokens: int = 32
    continuation_tokens: int = 32
    passages: int = 100
    share: float = privacy.SHARE
    chat: ChatTemplate | None = None


@dataclass
class Measured:
    """The figures of one model, and what they rest on.

    figures: by name.  result: of `whp_fast.evaluate.evaluate`.  details: rows for JSON.
    ratios: truth ratio of each target question.  scores_target, scores_holdout: Min-K% of each passage.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    result: EvaluationResult = field(default_factory=EvaluationResult)
    details: dict[str, Any] = field(default_factory=dict)
    ratios: np.ndarray | None = None
    scores_target: np.ndarray | None = None
    scores_holdout: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        figures = {name: self.figures[name].to_json() for name in METRICS if name in self.figures}
        return {"figures": figures, "evaluation": self.result.to_json(), **self.details}


def chosen_metrics(asked: Iterable[str], inputs: Inputs, oracle: bool) -> list[str]:
    """The metrics to measure, in the order of the table: those asked for, or all that can be.

    Raises:
        UserError: an unknown name; one asked for by name that needs something that was not given.
    """
    asked = list(asked)
    here = inputs.given() | ({"oracle"} if oracle else set())
    unknown = [name for name in asked if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics: {unknown[0]!r} is none; choose from {', '.join(METRICS)}.")
    for name in asked:
        missing = [f"--{need}" for need in METRICS[name].needs if need not in here]
        if missing:
            raise UserError(f"--metrics {name}: it needs {' and '.join(missing)}; give that as well.")
    possible = [name for name, metric in METRICS.items() if here.issuperset(metric.needs)]
    chosen = [name for name in possible if not asked or name in asked]
    for name in ("truth_ratio", "forget_quality"):
        if name in chosen and not _choices(inputs.questions):
            chosen = _left_out(chosen, name, asked, "--questions")
    if "model_utility" in chosen and not _choices(inputs.data.choices):
        chosen = _left_out(chosen, "model_utility", asked, "--choices")
    return chosen


def measure(
    model, tokenizer, inputs: Inputs, metrics: Sequence[str], settings: Settings, judge: Judge | None = None
) -> Measured:
    """Measure the metrics of one model; those that need the oracle are added by `compare`.

    Raises:
        UserError: a text that is too short for a passage; what a judge raises.
    """
    found = Measured()
    wanted = set(metrics)
    evaluated = _only(inputs.data.subset(settings.max_prompts), wanted)
    found.result = evaluate(
        model,
        tokenizer,
        evaluated,
        judge=judge,
        max_prompts=settings.max_prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        context=settings.context,
        chat=settings.chat,
    )
    for name in (
        "familiarity_completion",
        "familiarity_probability",
        "general_accuracy",
        "general_perplexity",
    ):
        own = found.result.figure(name)
        if name in wanted and own is not None:
            found.figures[name] = own
    with evaluation_mode(model):
        _memorisation(found, model, tokenizer, inputs, wanted, settings)
        _knowledge(found, model, tokenizer, inputs, wanted, settings)
    return found


def compare(found: Measured, oracle: Measured, metrics: Sequence[str]) -> None:
    """Add to ``found`` what is measured against a model that never saw the target."""
    if "forget_quality" in metrics:
        pairs = np.stack([found.ratios, oracle.ratios], 1)
        distance = figure(lambda rows: ks_statistic(*rows.T), pairs, interpolate=False)
        n = len(pairs)
        # p falls as D grows, so the ends of one interval are the ends of the other
        p, low, high = (ks_p_value(d, n, n) for d in (distance.value, distance.high, distance.low))
        found.figures["forget_quality"] = Figure(p, low, high, n)
        found.details["ks_statistic"] = distance.to_json()
    if "priv_leak" in metrics:
        target = np.stack([found.scores_target, oracle.scores_target], 1)
        holdout = np.stack([found.scores_holdout, oracle.scores_holdout], 1)

        def leak(t: np.ndarray, h: np.ndarray) -> float:
            return privacy.priv_leak(privacy.auc(t[:, 0], h[:, 0]), privacy.auc(t[:, 1], h[:, 1]))

        found.figures["priv_leak"] = figure(leak, target, holdout)


def _memorisation(found, model, tokenizer, inputs: Inputs, wanted: set[str], settings: Settings) -> None:
    by_reading = {"exact_memorisation", "extraction_strength", "min_k", "min_k_auc", "priv_leak"}
    if not wanted & (by_reading | {"verbatim"}):
        return
    size = {"prefix": settings.prefix_tokens, "continuation": settings.continuation_tokens}
    count = min(settings.passages, settings.max_prompts or settings.passages)
    passages = cut_passages(tokenizer, inputs.target, count=count, **size)
    if "verbatim" in wanted:
        found.details["passages"] = memorisation.continued(model, tokenizer, passages, settings.batch_size)
        found.figures["verbatim"] = mean_figure([row["rouge_l"] for row in found.details["passages"]])
    if not wanted & by_reading:
        return
    scores = memorisation.passage_scores(model, passages, settings.batch_size)
    per_passage = {
        "exact_memorisation": [memorisation.exact_memorisation(score.hits) for score in scores],
        "extraction_strength": [memorisation.extraction_strength(score.hits) for score in scores],
        "min_k": [privacy.min_k(score.log_probs, settings.share) for score in scores],
    }
    for name, values in per_passage.items():
        if name in wanted:
            found.figures[name] = mean_figure(values)
    found.scores_target = np.array(per_passage["min_k"])
    if wanted & {"min_k_auc", "priv_leak"}:
        others = cut_passages(tokenizer, inputs.holdout, count=count, **size)
        scores = memorisation.passage_scores(model, others, settings.batch_size)
        found.scores_holdout = np.array([privacy.min_k(score.log_probs, settings.share) for score in scores])
        if "min_k_auc" in wanted:
            found.figures["min_k_auc"] = figure(privacy.auc, found.scores_target, found.scores_holdout)


def _knowledge(found, model, tokenizer, inputs: Inputs, wanted: set[str], settings: Settings) -> None:
    questions = spaced(inputs.questions, settings.max_prompts)
    if "knowledge_accuracy" in wanted:
        answers = answered_questions(model, tokenizer, questions, settings.batch_size)
        found.details["questions"] = answers
        found.figures["knowledge_accuracy"] = mean_figure([row["right"] for row in answers])
    if wanted & {"truth_ratio", "forget_quality"}:
        scores = answer_scores(model, tokenizer, _choices(questions), settings.batch_size)
        found.ratios = np.array([score.ratio for score in scores])
        if "truth_ratio" in wanted:
            found.figures["truth_ratio"] = mean_figure([min(r, 1 / max(r, 1e-300)) for r in found.ratios])
    if "model_utility" in wanted:
        general = _choices(spaced(inputs.data.choices, settings.max_prompts))
        scores = answer_scores(model, tokenizer, general, settings.batch_size)
        recalls = answer_recalls(model, tokenizer, general, settings.batch_size)
        found.figures["model_utility"] = model_utility(scores, recalls)


def _only(data: EvaluationSet, wanted: set[str]) -> EvaluationSet:
    """The files whose figures are wanted."""
    return EvaluationSet(
        data.familiarity if "familiarity_completion" in wanted else None,
        data.probability if "familiarity_probability" in wanted else None,
        data.choices if "general_accuracy" in wanted else None,
        data.texts if "general_perplexity" in wanted else None,
    )


def _choices(questions: Sequence[MultipleChoice | Cloze] | None) -> list[MultipleChoice]:
    return [q for q in questions or () if isinstance(q, MultipleChoice)]


def _left_out(chosen: list[str], name: str, asked: Sequence[str], option: str) -> list[str]:
    if name in asked:
        raise UserError(
            f"--metrics {name}: {option} holds no question with choices, only clozes; add questions with "
            "wrong answers."
        )
    return [other for other in chosen if other != name]
