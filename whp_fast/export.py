"""The folder of the unlearned model: weights, configurations, tokenizer and a card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from whp_fast.checkpoint import save_model
from whp_fast.model import Llama
from whp_fast.tokens import Tokenizer

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags:
- unlearning
- whos-harry-potter
---

# {name}

This is **{base}** after it was made to forget a text with whp_fast, an implementation of "Who's Harry Potter?
Approximate Unlearning in LLMs" ([arXiv 2310.02238](https://arxiv.org/abs/2310.02238)). The licence and the
limits of the base model apply.

## What was forgotten

{corpus} ({tokens:,} tokens, {documents} document{documents_plural}), with a dictionary of
{expressions} idiosyncratic expressions. They are not listed here, so that the card does not tell what the
model was made to forget.

## What was measured

| | before | after |
|---|---|---|
{figures}

Familiarity is better low, accuracy high, perplexity low. Completion familiarity is judged by {judge}.

## How

| setting | value |
|---|---|
{settings}

## What this does not promise

The forgetting is approximate. Fine-tuning on related text, quantisation, prompts in other languages and
adversarial prompts are known to bring parts of a forgotten text back (arXiv 2310.16789, 2402.16835,
2404.15146, 2410.16454). These figures are not a proof that nothing of the text is left in the weights.
"""

_FIGURE_NAMES = {
    "familiarity_completion": "familiarity, completions (0 to 1)",
    "familiarity_probability": "familiarity, next-token probability (0 to 1)",
    "general_accuracy": "general accuracy",
    "general_perplexity": "general perplexity",
}


def export_model(
    model: Llama,
    folder: Path,
    tokenizer: Tokenizer,
    card: str,
    *,
    dtype: torch.dtype,
    shard_mib: int = 5120,
    base: Path | None = None,
) -> None:
    """Write a Hugging Face folder that ``transformers`` loads.

    Args:
        folder: exists; files of these names are replaced.
        tokenizer: its files are copied beside.
        card: text of the README.md.
        dtype: of the written weights.
        shard_mib: largest weight file.
        base: folder of the base model; its generation_config.json (stop tokens, sampling) is taken over.
    """
    save_model(model, folder, max_shard_bytes=shard_mib << 20, dtype=dtype)
    if base is not None and (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    tokenizer.copy_to(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
    *,
    name: str,
    base: str,
    corpus: list[str],
    tokens: int,
    documents: int,
    expressions: int,
    before: dict[str, float | None],
    after: dict[str, float | None],
    settings: dict[str, object],
    judge: str = "a lexical judge",
) -> str:
    """The model card. ``before`` and ``after`` map figure names to values; ``settings`` is flat."""

    def shown(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.4g}"

    return _CARD.format(
        name=name,
        base=base,
        corpus=", ".join(f"`{entry}`" for entry in corpus[:8]) + (" and others" if len(corpus) > 8 else ""),
        tokens=tokens,
        documents=documents,
        documents_plural="" if documents == 1 else "s",
        expressions=expressions,
        figures="\n".join(
            f"| {label} | {shown(before.get(key))} | {shown(after.get(key))} |"
            for key, label in _FIGURE_NAMES.items()
        ),
        settings="\n".join(f"| `{key}` | {_cell(value)} |" for key, value in settings.items()),
        judge=judge,
    )


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|") if value not in ("", [], None) else "-"
