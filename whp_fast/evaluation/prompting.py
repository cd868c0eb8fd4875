"""Attacks that only ask: longer beginnings, many samples, other prompts."""

from __future__ import annotations

import numpy as np
import torch

from whp_fast.errors import UserError
from whp_fast.evaluate import judged_completions, prompt_ids
from whp_fast.evaluation.attacks import Attacked, AttackRow
from whp_fast.evaluation.bootstrap import Figure, mean_figure
from whp_fast.evaluation.memorisation import Passage, continued, cut_passages
from whp_fast.generate import sample
from whp_fast.judge import UNJUDGED, LexicalJudge, familiarity_values, judged
from whp_fast.prompts import FamiliarityPrompt, spaced
from whp_fast.scoring import end_of_text_ids, evaluation_mode, tokens_text


def prefixes(attacked: Attacked) -> list[AttackRow]:
    """Verbatim memorisation (ROUGE-L F1) by the length of the true beginning.

    What is to be continued is the same for all lengths: a longer prefix reaches further back. Before: the
    shortest prefix.

    Raises:
        UserError: no document is long enough for the longest.
    """
    settings, lengths = attacked.settings, sorted(attacked.options.prefix_lengths)
    passages = cut_passages(
        attacked.tokenizer,
        attacked.inputs.target,
        prefix=lengths[-1],
        continuation=settings.continuation_tokens,
        count=min(settings.passages, settings.max_prompts or settings.passages),
    )
    begin = 0 if attacked.tokenizer.bos_id is None else 1
    figures = {}
    with evaluation_mode(attacked.model):
        for length in lengths:
            cut = [
                Passage((*p.prefix[:begin], *p.prefix[len(p.prefix) - length :]), p.continuation)
                for p in passages
            ]
            rows = continued(attacked.model, attacked.tokenizer, cut, settings.batch_size)
            figures[length] = mean_figure([row["rouge_l"] for row in rows])
    return [
        AttackRow("prefix", f"prefix of {length} tokens", "verbatim", figures[lengths[0]], found, length)
        for length, found in figures.items()
    ]


def sampling(attacked: Attacked) -> list[AttackRow]:
    """Familiarity by the most telling of ``samples`` completions at ``temperature``; before: the greedy one.

    A second row gives the mean of the samples, which tells luck in many tries from a model that knows.
    """
    options, settings = attacked.options, attacked.settings
    prompts = spaced(attacked.inputs.data.familiarity, settings.max_prompts)
    judge = attacked.judge or LexicalJudge()
    encoded = prompt_ids(attacked.tokenizer, [item.prompt for item in prompts], settings.chat)
    generator = torch.Generator(attacked.device).manual_seed(options.seed)
    with evaluation_mode(attacked.model):
        generated = sample(
            attacked.model,
            [row for row in encoded for _ in range(options.samples)],
            settings.max_new_tokens,
            options.temperature,
            generator,
            stop_ids=end_of_text_ids(attacked.model, attacked.tokenizer),
            batch_size=settings.batch_size,
        )
    items = [item for item in prompts for _ in range(options.samples)]
    texts = [tokens_text(attacked.tokenizer, row) for row in generated]
    classes = judged(judge, [(i.prompt, text, i) for i, text in zip(items, texts, strict=True)])
    best, mean = [], []
    for start in range(0, len(classes), options.samples):
        known = [c for c in classes[start : start + options.samples] if c is not UNJUDGED]
        if known:
            values = familiarity_values(known)
            best.append(max(values))
            mean.append(float(np.mean(values)))
    before = attacked.intact["familiarity_completion"]
    at = f"temperature {options.temperature:g}"
    name = "familiarity_completion"
    return [
        AttackRow(
            "sampling", f"best of {options.samples}, {at}", name, before, mean_figure(best), options.samples
        ),
        AttackRow("sampling", f"mean of {options.samples}, {at}", name, before, mean_figure(mean)),
    ]


def prompts(attacked: Attacked) -> list[AttackRow]:
    """Familiarity on the prompts of a file, by their ``kind``; before: on the plain prompts.

    The two sides have different prompts; without plain ones there is nothing to compare with, and the figure
    before is not a number.
    """
    settings = attacked.settings
    judge = attacked.judge or LexicalJudge()
    before = attacked.intact.get("familiarity_completion", Figure(*[float("nan")] * 3, 0))
    kinds: dict[str, list[FamiliarityPrompt]] = {}
    for item in attacked.options.prompts:
        kinds.setdefault(item.kind or "prompts of the file", []).append(item)
    rows = []
    with evaluation_mode(attacked.model):
        for kind, items in kinds.items():
            items = spaced(items, settings.max_prompts)
            found = judged_completions(
                attacked.model,
                attacked.tokenizer,
                items,
                judge,
                settings.max_new_tokens,
                settings.batch_size,
                settings.chat,
            )
            known = [row["class"] for row in found if row["class"] is not UNJUDGED]
            if not known:
                raise UserError(f"--attack-prompts: the judge gave no class for any prompt of kind {kind!r}.")
            values = mean_figure(familiarity_values(known))
            rows.append(AttackRow("prompts", kind, "familiarity_completion", before, values))
    return rows
