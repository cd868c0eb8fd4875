"""What a report says, whatever it is written in: its data, the verdict, and the choice of what is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from whp_fast import intervals
from whp_fast.evaluate import FIGURES, EvaluationResult
from whp_fast.report_attacks import attack_figures

MAX_PANELS = 6  # prompts in the picture of next tokens
MAX_BARS = 6  # tokens of each of them
MAX_COMPLETIONS = 12
LEAKS_SHOWN = 3  # of those, how many places are kept for what the unlearned model still gives away
NAMES = {
    "familiarity_completion": "Familiarity (completion)",
    "familiarity_probability": "Familiarity (probability)",
    "general_accuracy": "General accuracy",
    "general_perplexity": "General perplexity",
}
BETTER = dict(zip(FIGURES, ("lower", "lower", "higher", "lower"), strict=True))
INTERVALS = (
    "In brackets 95 % intervals: what other prompts of the same kind might have given (bootstrap, or "
    "Wilson’s where only the mean is known or all answers are alike). They do not speak of other seeds."
)
LIMITS = """\
They are not adversarial: the prompts ask in the language and style of the target, and an attacker would
not stop there. For the published model of this method it is known that membership scores pointed to 188
of about 1,000 passages as probably not forgotten, and 5.3 % of the completions of those came close to
the text (Shi et al. 2023, arXiv 2310.16789); that more than the baseline's knowledge can be extracted,
and questions are answered on a par with the original model (Lynch et al. 2024, arXiv 2402.16835); and
that it answers when asked in Russian, and 50 % of the tested passages can still be called up by a
shorter prompt, against 57 % before (Schwarzschild et al. 2024, arXiv 2404.15146). Of unlearning in
general it is known that further training on related public text brings content back (Hu et al. 2024,
arXiv 2406.13356), and so does quantisation to 4 bits, most of all after small learning rates (Zhang et
al. 2024, arXiv 2410.16454). {tried}
The default judge looks up listed words and does not see knowledge told in other words."""
ATTACKS = (
    "What comes back when it is asked for by other means: figures of the unlearned model before and after "
    "each attack{oracle}. Lower is better. Beside the figures 95 % intervals."
)
ATTACKS_ORACLE = (
    ", and after it those of the oracle, a model that never saw the target: what it gives too was learnt or "
    "guessed in the attack, and did not come back"
)
NOT_TRIED = "Paraphrase, translation, relearning and quantisation were not tried here."
TRIED = "What was tried of this here stands under Attacks; what does not stand there was not tried."


@dataclass
class ReportData:
    """Everything the report shows. What is empty or None is left out of it."""

    title: str
    """Heading of the report."""
    model_name: str
    """The model that was unlearned, as a person would name it."""
    settings: dict[str, Any]
    """The settings of the run, JSON types, sections as nested dictionaries: ``{"unlearn": {"lr": 1e-6}}``."""
    before: EvaluationResult
    """The model before."""
    after: EvaluationResult
    """The unlearned model."""
    oracle: EvaluationResult | None = None
    """A model that never saw the target, if there is one."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """A point for each evaluation during the unlearning, step 0 first: ``{"step": int}`` and the four figures
    under their names (as `EvaluationResult.figures` gives them)."""
    curve_prompts: int | None = None
    """How many prompts of each kind the points of the curve rest on; None or 0: all."""
    label_stats: dict[str, Any] = field(default_factory=dict)
    """``{"positions": int, "trained": int, "changed_from_text": int, "changed_from_base": int, "masked":
    {reason: int}, "replacements": [{"text": str, "label": str, "count": int}]}``, the commonest first."""
    label_page: list[dict[str, Any]] = field(default_factory=list)
    """A piece of the text, for each token ``{"token": str, "label": str or None, "reason": str}``. The label
    is what is taught in this token's place (the label of the position before), None where nothing is."""
    next_tokens: list[dict[str, Any]] = field(default_factory=list)
    """Next-token probabilities by prompt, as `join_next_tokens` makes them from tables of each model."""
    attacks: list[dict[str, Any]] = field(default_factory=list)
    """Rows as ``whp_fast.evaluation.attacks.AttackRow.to_json`` makes them. Read too are rows of
    ``{"attack": str, "figure": str, "before": number or None, "after": ..., "interval": ...}``, whose
    interval is ``[low, high]`` of after, or ``{"before": [low, high], "after": [low, high]}``; it may be
    missing."""
    warnings: list[str] = field(default_factory=list)
    """What a person should know of the prompts and files."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of each stage, in order; ``"total"`` is their sum if it is not given."""
    gpus: dict[str, int] = field(default_factory=dict)
    """GPUs that the job held in each stage; a stage that is not named: none."""
    energy: dict[str, dict[str, float]] = field(default_factory=dict)
    """Joules of each stage, where they could be read: ``{"gpus": ..., "processors": ...}``."""

    @property
    def results(self) -> dict[str, EvaluationResult]:
        """``before``, ``after`` and, if there is one, ``oracle``."""
        found = {"before": self.before, "after": self.after, "oracle": self.oracle}
        return {name: result for name, result in found.items() if result is not None}

    @property
    def limits(self) -> str:
        return LIMITS.format(tried=TRIED if attack_figures(self.attacks) else NOT_TRIED)


def join_next_tokens(
    before: Sequence[dict], after: Sequence[dict], oracle: Sequence[dict] | None = None
) -> list[dict[str, Any]]:
    """Tables of `whp_fast.evaluate.next_token_table` of the same prompts, for `ReportData.next_tokens`.

    Returns for each ``{"prompt", "before": [{"token", "id", "probability"}], "after", "oracle" (or None)}``.
    """
    tables = {"after": {entry["prompt"]: entry["tokens"] for entry in after}}
    tables["oracle"] = {entry["prompt"]: entry["tokens"] for entry in oracle or ()}
    return [
        {
            "prompt": entry["prompt"],
            "before": entry["tokens"],
            "after": tables["after"][entry["prompt"]],
            "oracle": tables["oracle"].get(entry["prompt"]),
        }
        for entry in before
        if entry["prompt"] in tables["after"]
    ]


def share_removed(before: float | None, after: float | None, oracle: float | None) -> float | None:
    """How much of the way from before down to the oracle (without one, to 0) has been gone; 1 is all of it.

    None where it was not measured, or where the model before was hardly above that floor (by 0.005).
    """
    if before is None or after is None:
        return None
    floor = min(oracle or 0.0, before)
    return None if before - floor < 0.005 else (before - after) / (before - floor)


def verdict(data: ReportData) -> str:
    """One word of judgement from the familiarity of which least was removed."""
    oracle = data.oracle.figures if data.oracle else {}
    before, after = data.before.figures, data.after.figures
    removed = [share_removed(before[name], after[name], oracle.get(name)) for name in FIGURES[:2]]
    known = [share for share in removed if share is not None]
    if not known:
        measured = any(before[name] is not None and after[name] is not None for name in FIGURES[:2])
        return "There was little to forget" if measured else "Not measured"
    for least, words in (
        (0.95, "Gone, as far as these prompts can tell"),
        (0.75, "Mostly gone"),
        (0.25, "Partly gone"),
    ):
        if min(known) >= least:
            return words
    return "No, it is still there"


def was_gone(data: ReportData) -> bool:
    """Whether the verdict is that it is gone, or mostly."""
    return verdict(data).split()[0] in ("Gone,", "Mostly")


def verdict_rule(data: ReportData) -> str:
    floor = "the oracle" if data.oracle else "0"
    return (
        f"The verdict goes by the familiarity of which less was removed, on the way from before to {floor}: "
        "gone from 95 %, mostly from 75 %, partly from 25 %."
    )


def basis(data: ReportData) -> str:
    """What the figures rest on: "300 completions, 37 next-word prompts", or nothing."""
    counts = data.after.counts
    found = [
        (counts.get("familiarity_prompts"), "completions"),
        (counts.get("probability_prompts"), "next-word prompts"),
        (counts.get("choice_questions", 0) + counts.get("cloze_questions", 0), "questions"),
        (counts.get("text_tokens"), "tokens of general text"),
    ]
    return ", ".join(f"{number:,} {what}" for number, what in found if number)


def in_plain_words(data: ReportData) -> str:
    """Gone or not and the price in one sentence of counts; nothing where they are not known."""
    before, after = data.before.counts, data.after.counts
    parts = []
    if before.get("familiarity_prompts") and after.get("familiarity_prompts") and "class_3" in after:
        was, now = (c.get("class_3", 0) + c.get("class_2", 0) for c in (before, after))
        parts.append(
            f"{now} of {after['familiarity_prompts']} completions still show{'s' * (now == 1)} knowledge of "
            f"the text, against {was} before"
        )
    if "choice_right" in after and "choice_right" in before:
        was, now = (c.get("choice_right", 0) + c.get("cloze_right", 0) for c in (before, after))
        asked = after.get("choice_questions", 0) + after.get("cloze_questions", 0)
        parts.append(f"{now} of {asked} general questions are answered right, against {was} before")
    if data.before.general_perplexity and data.after.general_perplexity:
        percent = 100 * (data.after.general_perplexity / data.before.general_perplexity - 1)
        if abs(percent) < 0.05:
            parts.append("the perplexity of other text is as it was")
        else:
            moved = f"{'rose' if percent > 0 else 'fell'} by {signed(abs(percent)).lstrip('+')} %"
            parts.append(f"the perplexity of other text {moved}")
    return "; ".join(parts) + "." if parts else ""


def accuracy_change(data: ReportData) -> tuple[float, float, float] | None:
    """`whp_fast.intervals.paired_change` of the questions both models were asked."""
    before = {row["prompt"]: bool(row["right"]) for row in data.before.answers}
    after = {row["prompt"]: bool(row["right"]) for row in data.after.answers}
    if before.keys() != after.keys() or len(before) != len(data.before.answers):
        return None
    return intervals.paired_change(list(before.values()), [after[prompt] for prompt in before])


def completion_pairs(data: ReportData) -> tuple[list[tuple[dict, dict]], int, int, int]:
    """Completions before and after, the most telling ones first: (all pairs, how many of them are worth
    showing, how many of those show what still leaks, how many leak in all).

    First the greatest falls in class, then what still gives something away, then the rest.
    """
    after = {row["prompt"]: row for row in data.after.completions}
    pairs = [(row, after[row["prompt"]]) for row in data.before.completions if row["prompt"] in after]
    leaks = sorted((p for p in pairs if _class(p[1]) >= 2), key=lambda p: -_class(p[1]))
    # Most telling: the class falls far, and the text changes with it; shorter prompts are read more easily.
    falls = sorted(
        (p for p in pairs if _class(p[1]) < 2),
        key=lambda p: (
            _class(p[1]) - _class(p[0]),
            p[0]["completion"] == p[1]["completion"],
            len(p[0]["prompt"]),
        ),
    )
    places = MAX_COMPLETIONS - min(LEAKS_SHOWN, len(leaks))
    first = falls[:places]
    shown_leaks = leaks[: MAX_COMPLETIONS - len(first)]
    rest = leaks[len(shown_leaks) :] + falls[places:]
    return first + shown_leaks + rest, len(first) + len(shown_leaks), len(shown_leaks), len(leaks)


def _class(row: dict[str, Any]) -> int:
    """The class of a completion; one that no judge could place counts for nothing."""
    return row["class"] or 0


def bars(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens most probable to any of the models, the most probable before first, with all probabilities.

    A token outside a model's table is shown as 0; it has at most the probability of the table's last token.
    """
    models = [model for model in ("before", "after", "oracle") if entry.get(model)]
    tables = {model: {token["id"]: token for token in entry[model]} for model in models}
    tokens = {i: token["token"] for model in models for i, token in tables[model].items()}

    def probability(model: str, token: int) -> float:
        return tables[model][token]["probability"] if token in tables[model] else 0.0

    most = sorted(tokens, key=lambda i: (-max(probability(model, i) for model in models), i))[:MAX_BARS]
    return [
        {"token": tokens[i]} | {model: probability(model, i) for model in models}
        for i in sorted(most, key=lambda i: (-probability("before", i), i))
    ]


def figure_intervals(data: ReportData) -> dict[str, dict[str, intervals.Interval | None]]:
    """The intervals of each model's figures."""
    return {name: intervals.of_result(result) for name, result in data.results.items()}


def curve_with_intervals(data: ReportData) -> list[dict[str, Any]]:
    """The points of the curve, by step, each with ``"intervals": {figure: (low, high) or None}``."""
    counts = intervals.prompts(data.before, data.curve_prompts)
    points = []
    for point in sorted(data.curve, key=lambda point: point["step"]):
        found = {}
        for name in FIGURES:
            low, high = (point.get("intervals") or {}).get(name) or (0.0, 0.0)
            wide = intervals.wilson(point.get(name), counts.get(name, 0))
            found[name] = (low, high) if high > low else wide
        points.append(finite(point) | {"intervals": found})
    return points


def number(name: str, value: float | None) -> str:
    """A figure for a person."""
    if value is None:
        return "–"
    return f"{value:.2f}" if name == "general_perplexity" else f"{value:.3f}"


def with_interval(name: str, value: float | None, pair: Sequence[float] | None) -> str:
    """A figure with its interval in brackets, as plain text."""
    return number(name, value) + (f" ({interval(pair, name)})" if pair and value is not None else "")


def interval(pair: Sequence[float] | None, name: str = "") -> str:
    """The interval of a figure, with as many digits as `number` gives it."""
    return "" if pair is None else "–".join(number(name, end) for end in pair)


def signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: no "−0.0"


def setting_rows(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested sections as dotted names, values as text; nothing set is ""."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            rows += setting_rows(value, f"{prefix}{name}.")
        elif value in ("", None, [], {}, ()):
            rows.append((prefix + name, ""))
        else:
            shown = value if isinstance(value, str) else json.dumps(finite(value), ensure_ascii=False)
            rows.append((prefix + name, shown))
    return rows


def finite(value: Any) -> Any:
    """The same value in types that JSON has; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
