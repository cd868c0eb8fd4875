"""A base that has read a folder of plain books, and the job of making it forget one of them.

The base is small enough for two cores; what it reads and what it forgets are real text. The dictionary is
extracted from the book with the others as background, unless one is given; the prompts that measure
forgetting are written for the book (``examples/sherlock``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from whp_fast.corpus import corpus_files
from whp_fast.demo import Recipe, from_scratch, new_model, save, timed, train_on, train_tokenizer, write_jsonl
from whp_fast.errors import UserError
from whp_fast.extraction import command as anchors_command
from whp_fast.progress import say
from whp_fast.tokens import Tokenizer, load_tokenizer

BOOKS = Recipe(
    vocab_size=4096,
    layers=4,
    context=256,
    branch=from_scratch(epochs=10, lr=2e-3, warmup_steps=50),
    repeat_target=3,
)
"""How the base is trained; the target stands ``repeat_target`` times in each pass over the books."""
RETAINED, MEASURED = "retained.jsonl", "measured.jsonl"
_PASSAGE = 4000  # characters


def make_books(
    books: Path,
    target: str,
    out: Path,
    *,
    examples: Path,
    recipe: Recipe = BOOKS,
    tokenizer_path: Path | None = None,
    anchors: Path | None = None,
    seed: int = 0,
) -> Path:
    """Train a small base on a folder of plain books and write the job of forgetting one of them.

    Args:
        books: folder of ``.txt`` files.
        target: the book to forget, a file name inside it.
        out: folder for the base, the dictionary and ``job.yaml``.
        examples: folder with familiarity.json, probability.json and choices.jsonl for the target.
        recipe: ``branch`` is how the base is trained, ``trunk`` is not used.
        tokenizer_path: ``tokenizer.model`` or ``tokenizer.json``; None: one of ``recipe.vocab_size`` pieces,
            trained on the books.
        anchors: the dictionary; None: extracted, the other books being the background.

    Returns:
        the path of ``job.yaml``.

    Raises:
        UserError: a file that is not there, or no other book.
    """
    files = [f for f in corpus_files([books]) if f.suffix == ".txt"]
    book = books / target
    if book not in files:
        names = ", ".join(f.name for f in files)
        raise UserError(f"{book}: no such book; --target is one of {names}.")
    others = [f for f in files if f != book]
    if not others:
        raise UserError(f"{books}: holds no other book than {target}; add some that are to be kept.")
    for path in (examples / "familiarity.json", anchors):
        if path is not None and not path.is_file():
            option = "--anchors" if path == anchors else "--examples"
            raise UserError(f"{path}: no such file; name one that is there with {option}.")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else _own_tokenizer(out, files, recipe)
    model = new_model(recipe, tokenizer, seed)
    seconds: dict[str, float] = {}
    with timed(seconds, "base"):
        mixture = [*others, *[book] * recipe.repeat_target]
        train_on(model, mixture, tokenizer, recipe.context, recipe.branch, seed, out, "base")
        save(model, tokenizer, out / "base")
    say(f"  [bold]{'base':<11}[/bold] {seconds['base']:7.1f} s  trained on {len(files)} books")
    _write_others(out, others)
    if anchors is None:
        anchors = _extract(book, others, out / "anchors.json")
    job = out / "job.yaml"
    job.write_text(_job(out, book, anchors, examples, recipe), encoding="utf-8")
    return job


def _write_others(out: Path, others: Sequence[Path]) -> None:
    """The other books, a passage in turn for each file: one is retained while unlearning, one is measured."""
    passages = []
    for file in others:
        text = file.read_text(encoding="utf-8")
        passages += [text[at : at + _PASSAGE] for at in range(0, len(text), _PASSAGE)]
    write_jsonl(out / RETAINED, [{"text": text} for text in passages[::2]])
    write_jsonl(out / MEASURED, [{"text": text} for text in passages[1::2]])


def _own_tokenizer(out: Path, files: Sequence[Path], recipe: Recipe) -> Tokenizer:
    return train_tokenizer(out, [f.read_text(encoding="utf-8") for f in files], recipe.vocab_size)


def _extract(book: Path, others: Sequence[Path], anchors: Path) -> Path:
    words = ["extract", str(book), "--background", *map(str, others), "--out", str(anchors)]
    anchors_command.run([*words, "--parts", "--overwrite"])
    return anchors


def _job(out: Path, book: Path, anchors: Path, examples: Path, recipe: Recipe) -> str:
    """The configuration; a small model needs higher learning rates than seven billion weights."""
    import yaml

    job = {
        "model": {"path": str(out / "base")},
        "data": {"corpus": [str(book)], "context": recipe.context},
        "anchors": {"path": str(anchors), "match_across_lines": True},
        "reinforce": {"epochs": 3, "lr": 5e-4, "batch_blocks": 16, "accumulate": 1, "betas": [0.9, 0.95]},
        "label": {"dtype": "float32", "batch_blocks": 32, "ban_share": 0.1},
        "unlearn": {
            "epochs": 4,
            "lr": 3e-4,
            "warmup_steps": 10,
            "batch_blocks": 16,
            "accumulate": 1,
            "betas": [0.9, 0.95],
            "evaluate_every": 20,
            "retain": str(out / RETAINED),
        },
        "evaluate": {
            "familiarity": str(examples / "familiarity.json"),
            "probability": str(examples / "probability.json"),
            "choices": str(examples / "choices.jsonl"),
            "general_text": str(out / MEASURED),
            "max_new_tokens": 16,
        },
        "export": {"dtype": "float32"},
        "run": {"dir": str(out / "run")},
    }
    return yaml.safe_dump(job, sort_keys=False)
