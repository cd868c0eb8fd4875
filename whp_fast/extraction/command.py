"""The command line of ``python -m whp_fast.anchors``: extract, review, check."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from whp_fast.corpus import corpus_files, read_documents
from whp_fast.errors import UserError, exit_status
from whp_fast.extraction import check as checking
from whp_fast.extraction import review as reviewing
from whp_fast.extraction.candidates import Limits
from whp_fast.extraction.expectation import rises
from whp_fast.extraction.overlap import check_sizes
from whp_fast.extraction.prompting import NEW_TOKENS, Replies, ask, asked_ids, passages_of
from whp_fast.extraction.proposal import Proposal, list_path, propose, write
from whp_fast.extraction.words import Texts
from whp_fast.progress import console, say, track


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for what the user can mend)."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.work(options), debug=options.debug)


def run(arguments: Sequence[str]) -> None:
    """The same within another command: raises UserError."""
    options = _parser().parse_args(arguments)
    options.work(options)


def _extract(options: argparse.Namespace) -> None:
    began = time.monotonic()
    if (options.base is None) != (options.trained is None):
        raise UserError("--base: goes with --trained, the model trained on the corpus; give both or neither.")
    if options.out.suffix != ".json":
        raise UserError(f"--out: {options.out} does not end in .json; name the dictionary file.")
    if options.out.exists() and not options.overwrite:
        raise UserError(f"--out: {options.out} is there already; choose another name or add --overwrite.")
    if options.min_count < 1 or options.alternatives < 1:
        raise UserError("--min-count, --alternatives: at least 1; give larger numbers.")
    for name in ("base", "trained", "model"):
        folder = getattr(options, name)
        if folder is not None and not (folder / "config.json").is_file():
            raise UserError(f"--{name}: {folder} holds no config.json; name the folder of a model.")
    corpus = Texts(_documents(options.corpus, options.text_field))
    background = {
        str(file): Texts(_documents([file], options.text_field)) for file in corpus_files(options.background)
    }
    check_sizes(*(sum(len(t.split()) for t in texts) for texts in (corpus.documents, _all(background))))
    replies = _asked(options, corpus.documents) if options.model else None
    proposals = propose(
        corpus,
        background,
        Limits(count=options.min_count, log_likelihood=options.min_score, parts=options.parts),
        options.alternatives,
        _measure(options, corpus.documents) if options.base else None,
        replies,
        warn=lambda message: say(f"[yellow]warning:[/yellow] {escape(message)}"),
    )
    write(options.out, proposals)
    _summary(proposals)
    say(f"{len(proposals)} expressions in {time.monotonic() - began:.1f} s: {escape(str(options.out))}, with")
    say(f"counts, kinds and scores in {escape(str(list_path(options.out)))}; look through them: review")


def _all(background: dict[str, Texts]) -> list[str]:
    return [text for texts in background.values() for text in texts.documents]


def _summary(proposals: Sequence[Proposal]) -> None:
    by_kind: dict[str, list[Proposal]] = {}
    for proposal in proposals:
        by_kind.setdefault(proposal.kind.split()[0], []).append(proposal)
    for kind, entries in sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(f"{p.expression} → {p.counterparts[0]}" for p in entries[:4])
        say(f"  {kind:<8} {len(entries):4}  {escape(shown)}")


def _measure(options: argparse.Namespace, documents: list[str]):
    def measure(expressions: list[str]) -> tuple[dict[str, float], float]:
        with track("models", 1.0) as advance:
            return rises(
                documents, expressions, options.base, options.trained, options.device, progress=advance
            )

    return measure


def _asked(options: argparse.Namespace, documents: list[str]) -> Replies:
    import torch

    from whp_fast.checkpoint import load_model
    from whp_fast.evaluation.chat_template import load_chat_template
    from whp_fast.scoring import evaluation_mode, generated_texts
    from whp_fast.tokens import load_tokenizer

    model = load_model(options.model, device=torch.device(options.device)).requires_grad_(False)
    tokenizer = load_tokenizer(options.model)
    chat = load_chat_template(options.model, tokenizer)
    passages = passages_of(documents, options.passages)
    with track("asking", len(passages)) as advance, evaluation_mode(model):
        replies = ask(
            passages,
            lambda prompts: generated_texts(
                model, tokenizer, asked_ids(prompts, tokenizer, chat), NEW_TOKENS, len(prompts)
            ),
            progress=advance,
        )
    left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(replies.refused.items()))
    say(
        f"asked about {replies.passages} passages: {len(replies.translations)} expressions, "
        f"{replies.unreadable} replies unreadable{', pairs left out: ' + left_out if left_out else ''}"
    )
    if not replies.translations:
        raise UserError(
            f"--model: {options.model} gave no usable dictionary for {replies.passages} passages; choose a "
            "model that follows instructions, or leave --model out."
        )
    return replies


def _review(options: argparse.Namespace) -> None:
    documents = _documents(options.corpus, options.text_field) if options.corpus else []
    counts = reviewing.review(options.anchors, documents, console.input, say)
    say(", ".join(f"{n} {name}" for name, n in counts.items()) + f": {escape(str(options.anchors))}")


def _check(options: argparse.Namespace) -> None:
    found = checking.check(options.anchors, _documents(options.corpus, options.text_field))
    for line in checking.report(found):
        say(escape(line))
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False), encoding="utf-8")


def _documents(paths: Sequence[Path], text_field: str) -> list[str]:
    return ["".join(parts) for file in corpus_files(paths) for parts in read_documents(file, text_field)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m whp_fast.anchors",
        description="Propose, review and check a dictionary of idiosyncratic expressions.",
    )
    commands = parser.add_subparsers(required=True)
    extract = commands.add_parser("extract", help="propose expressions and generic counterparts")
    extract.add_argument("corpus", type=Path, nargs="+", help=".txt or .jsonl files or folders to forget")
    extract.add_argument("--background", type=Path, nargs="+", required=True, help="texts of other matter")
    extract.add_argument("--out", type=Path, required=True, help="the dictionary to write (.json)")
    extract.add_argument("--min-count", type=int, default=Limits.count, help="occurrences (default 3)")
    extract.add_argument(
        "--min-score", type=float, default=Limits.log_likelihood, help="log-likelihood ratio (default 6.63)"
    )
    extract.add_argument(
        "--parts",
        action="store_true",
        help='single names in the place of phrases that hold one ("Baker", not "Baker Street")',
    )
    extract.add_argument("--alternatives", type=int, default=3, help="counterparts each (default 3)")
    extract.add_argument("--base", type=Path, help="model folder, with --trained: use what training raised")
    extract.add_argument("--trained", type=Path, help="folder of the base model trained on the corpus")
    extract.add_argument("--model", type=Path, help="folder of an instruction-tuned model to ask")
    extract.add_argument("--passages", type=int, default=400, help="passages to ask --model about")
    extract.add_argument("--device", default="cpu", help="of the models (cpu, cuda)")
    extract.add_argument("--overwrite", action="store_true", help="replace the file of --out")
    extract.set_defaults(work=_extract)
    review = commands.add_parser("review", help="keep, drop or edit entries in the terminal")
    review.add_argument("anchors", type=Path, help="the dictionary")
    review.add_argument("--corpus", type=Path, nargs="+", help="for counts and example sentences")
    review.set_defaults(work=_review)
    check = commands.add_parser("check", help="coverage, unmatched expressions, leaks, splittable keys")
    check.add_argument("anchors", type=Path, help="the dictionary")
    check.add_argument("corpus", type=Path, nargs="+", help="the text to forget")
    check.add_argument("--json", type=Path, help="write the findings here too")
    check.set_defaults(work=_check)
    for command in (extract, review, check):
        command.add_argument("--text-field", default="text", help="field of .jsonl lines with the text")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
