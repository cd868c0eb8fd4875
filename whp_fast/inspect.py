"""Look at one block of a finished run: its labels, what was masked and why, and what the models expected.

    python -m whp_fast.inspect RUN                       the block with the most expressions, in the terminal
    python -m whp_fast.inspect RUN --find "some words"   the first block in which they begin
    python -m whp_fast.inspect RUN --html page.html      the same as one page that needs nothing else

A label stands under the token whose place it takes, so it is that of the output at the token before. The
models are run again over this one block; ``--no-models`` leaves them out and is done at once.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.cells import cell_len, set_cell_size
from rich.text import Text
from whp_kernels.losses import IGNORE_INDEX

from whp_fast.alignment import Alignment, load_alignment
from whp_fast.anchors import Dictionary
from whp_fast.corpus import Blocks
from whp_fast.errors import UserError, exit_status
from whp_fast.inspect_page import write_page
from whp_fast.label import make_aligner
from whp_fast.label_stage import BANNED, labels_file
from whp_fast.page import FIRST, mark_of, shown_token, why
from whp_fast.progress import console
from whp_fast.reasons import REASONS
from whp_fast.scoring import token_text
from whp_fast.tokens import Tokenizer, load_tokenizer
from whp_fast.top_tokens import TEACHERS, TopTokens, load_labeller, top_tokens

EXAMPLES = 3  # tables shown in the terminal when no positions are asked for


@dataclass
class BlockView:
    """One block of a run, ready to be shown.

    Attributes:
        entries: for each token ``{"n", "token", "label", "reason", "own"}`` in the order of the text: its
            number in the block, what is taught in its place (None: nothing) and why not, and what the base
            alone says there. The last one, with ``"next": True``, is the first token of the block that
            follows, whose place the block's last label takes.
        translated: what the base reads instead, ``[(text of a token, whether a counterpart begins there)]``.
        tables: by number of the token, see `whp_fast.top_tokens.TopTokens`.
        disagreeing: labels of the run that came out otherwise when they were made again for this page; None
            without models.
    """

    run: str
    number: int
    n_blocks: int
    alpha: float
    entries: list[dict[str, Any]]
    translated: list[tuple[str, bool]]
    tables: dict[int, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    disagreeing: int | None = None

    @property
    def positions(self) -> int:
        """Tokens in the block."""
        return sum(not e.get("next") for e in self.entries)

    @property
    def changed(self) -> list[int]:
        """Numbers of the tokens in whose place another one is taught."""
        return [e["n"] for e in self.entries if e["label"] is not None and e["label_id"] != e["id"]]


class Run:
    """The artifacts of a run whose labels are finished.

    Args:
        path: the run folder.
        model: where the base is now, if not where the settings say.

    Raises:
        UserError: no run folder, labels that are not finished, or no tokenizer.
    """

    def __init__(self, path: Path, model: str = ""):
        self.path = path
        if not (path / "settings.json").is_file():
            raise UserError(f"{path}: there is no settings.json; name the folder of a run (run.dir).")
        self.settings = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        for stage in ("prepare", "align", "label"):
            if not (path / stage / "complete.json").is_file():
                raise UserError(f"{path}: stage {stage!r} is not finished; run the job up to its labels.")
        self.base = Path(model or self.settings["model"]["path"])
        tokenizer = Path(self.settings["data"]["tokenizer"] or self.base)
        if not tokenizer.exists():
            raise UserError(
                f"{tokenizer}: the run's tokenizer is not there, seen from the current folder; start from "
                "the folder in which the run was made, or name the base with --model."
            )
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer)
        tokens = np.load(path / "prepare" / "tokens.npy", mmap_mode="r")
        rules = self.settings["anchors"]["reference_rules"]
        self.blocks = Blocks.of(tokens, self.settings["data"]["context"], drop_tail=rules)
        self.alignment = load_alignment(path / "align")

    def labels(self, alpha: float | None) -> tuple[float, np.ndarray]:
        """The labels of a strength, by default of the one that is trained."""
        alpha = self.settings["label"]["alpha"] if alpha is None else alpha
        file = self.path / "label" / labels_file(alpha)
        if not file.is_file():
            found = sorted(f.stem.rpartition("_")[2] for f in file.parent.glob("labels_alpha_*.npy"))
            raise UserError(
                f"--alpha: the run has no labels of strength {alpha:g}, but of {', '.join(found)}; name one "
                "of these, or run the job with label.more_alphas."
            )
        return alpha, np.load(file, mmap_mode="r")

    def telling_block(self) -> int:
        """The block with the most expressions."""
        return int(np.argmax(np.diff(self.alignment.used_offsets)))

    def find(self, text: str) -> int:
        """The first block in which the text begins (it may end in the next one)."""
        wanted = text.encode()
        if not wanted:
            raise UserError("--find: no text given; name words of the corpus.")
        pieces: dict[int, bytes] = {}

        def spelled(block: int) -> bytes:
            for token in np.unique(self.blocks[block]).tolist():
                pieces.setdefault(token, self.tokenizer.token_bytes(token))
            return b"".join(pieces[token] for token in self.blocks[block].tolist())

        following = spelled(0)
        for block in range(len(self.blocks)):
            here, following = following, spelled(block + 1) if block + 1 < len(self.blocks) else b""
            ahead, reach = following, block + 2
            while len(ahead) < len(wanted) - 1 and reach < len(self.blocks):
                ahead, reach = ahead + spelled(reach), reach + 1
            if wanted in here + ahead[: len(wanted) - 1]:
                return block
        raise UserError(f"--find: {text!r} does not stand in the run's corpus; mind capitals and spaces.")

    def view(self, number: int, alpha: float | None = None) -> BlockView:
        """Labels and reasons of a block, from the files alone.

        Raises:
            UserError: no such block, or no labels of this strength.
        """
        if not 0 <= number < len(self.blocks):
            raise UserError(
                f"--block: there is no block {number}; name one from 0 to {len(self.blocks) - 1}."
            )
        alpha, labels = self.labels(alpha)
        start, stop = self.blocks.offsets(number, number + 1).tolist()
        reason, own = (
            np.load(self.path / "label" / name, mmap_mode="r")[start:stop]
            for name in ("reason.npy", "base_choice.npy")
        )
        tokens = self.blocks.tokens[start : stop + 1].tolist()  # one more, if there is one

        def text(token: int) -> str | None:
            return None if token == IGNORE_INDEX else token_text(self.tokenizer, token)

        entries = [
            {"n": 0, "id": tokens[0], "token": text(tokens[0]), "label": None, "label_id": None, "own": None}
            | {"reason": FIRST}
        ]
        for n, token in enumerate(tokens[1:], 1):
            label = int(labels[start + n - 1])
            entries.append(
                {"n": n, "id": token, "token": text(token), "label": text(label), "label_id": label}
                | {"reason": REASONS[reason[n - 1]], "own": text(int(own[n - 1]))}
            )
        if len(tokens) > stop - start:
            entries[-1]["next"] = True
        part = self.alignment.blocks(number, number + 1)
        begins = set(part.used_at.tolist())
        translated = [(text(int(token)), i in begins) for i, token in enumerate(part.translated)]
        return BlockView(str(self.path), number, len(self.blocks), alpha, entries, translated)

    def ask_models(self, view: BlockView, numbers: Sequence[int], k: int, device: torch.device) -> None:
        """Add the tables of these tokens (by number) to a view.

        Raises:
            UserError: a model folder that is missing or broken.
        """
        anchors = self.settings["anchors"]
        entries = json.loads((self.path / "align" / "anchors.json").read_text(encoding="utf-8"))
        aligner = make_aligner(
            Dictionary(entries, {}),
            self.tokenizer,
            reference_rules=anchors["reference_rules"],
            seed=self.settings["run"]["seed"],
            match_across_lines=anchors["match_across_lines"],
        )
        reinforced = self.path / "reinforce"
        if not (reinforced / "complete.json").is_file():
            raise UserError(f"{reinforced}: the reinforced model is not there; add --no-models.")
        if not self.base.is_dir():
            raise UserError(f"{self.base}: the base is not there; name it with --model, or add --no-models.")
        kept = self.path / "label" / BANNED
        banned = np.load(kept) if kept.is_file() else None
        labeller, *heads = load_labeller(
            self.settings, self.base, reinforced, aligner, view.alpha, device, banned
        )
        one: Alignment = self.alignment.blocks(view.number, view.number + 1)
        block = self.blocks[view.number]
        found: TopTokens = top_tokens(
            labeller, heads, block, one, self.tokenizer, {n - 1 for n in numbers}, k
        )
        view.tables = {position + 1: tables for position, tables in found.tables.items()}
        _, labels = self.labels(view.alpha)
        start = int(self.blocks.offsets(view.number, view.number + 1)[0])
        view.disagreeing = int((labels[start : start + len(block)] != found.labels).sum())


def show(view: BlockView, tables: Sequence[int]) -> None:
    """The view in the terminal."""
    trained = [e for e in view.entries if e["label"] is not None]
    console.print(
        Text(f"{view.run}: block {view.number} of 0 to {view.n_blocks - 1}, alpha {view.alpha:g}. ", "bold")
        + Text(f"{len(trained)} labels, {len(view.changed)} of them another token than the text's.")
    )
    if view.disagreeing is not None:
        console.print(_agreement(view))
    console.print(Text("Under each token, what is taught in its place: "), end="")
    console.print(
        Text("·", "dim") + Text(" the text's own token, ") + Text("another one", "bold underline"), end=""
    )
    console.print(Text(". The number of a line's first token stands at its left. Not trained:"))
    reasons = dict.fromkeys(e["reason"] for e in view.entries if e["label"] is None)
    for reason in reasons:
        count = sum(e["label"] is None and e["reason"] == reason for e in view.entries)
        console.print(Text(f"  {mark_of(reason)}  {why(reason).removeprefix('Not trained: ')} ({count})"))
    console.print()
    for line in _lines(view.entries, console.width):
        console.print(line, no_wrap=True, crop=True)
    for n in tables:
        console.print()
        for line in _tables(view, n, console.width):
            console.print(line)


def _agreement(view: BlockView) -> Text:
    if view.disagreeing:
        return Text(
            f"{view.disagreeing} of the run's labels came out otherwise here: the models of the run, or "
            "their rounding, have changed.",
            "yellow",
        )
    return Text("Made again here, every label came out as the run has it.")


def _lines(entries: Sequence[dict[str, Any]], width: int) -> list[Text]:
    """Pairs of lines: tokens, and under them labels or marks; a blank line between pairs."""
    lines: list[Text] = []
    upper, lower = Text(), Text()

    def finish() -> None:
        nonlocal upper, lower
        if upper:
            lines.extend([upper, lower, Text()])
        upper, lower = Text(), Text()

    for entry, after in zip(entries, [*entries[1:], None]):
        token, label = entry["token"], entry["label"]
        shown = shown_token(token, space=label is not None and label.strip() == token.strip() != "")
        shown = shown if entry["label_id"] != entry["id"] else shown_token(token, space=False)
        if label is None:
            taught, style = mark_of(entry["reason"]), "magenta"
        elif entry["label_id"] == entry["id"]:
            taught, style = "·", "dim"
        else:
            same = shown_token(label, space=False) == shown_token(token, space=False)
            taught, style = shown_token(label, space=same), "bold underline"
        cells = max(cell_len(shown), cell_len(taught))
        gap = 1 if not upper or token.startswith((" ", "\n")) or cells > cell_len(shown) else 0
        if upper and cell_len(upper.plain) + gap + cells > width:
            finish()
        if not upper:
            upper, lower = Text(f"{entry['n']:>5} ", "dim"), Text(" " * 6)
            gap = 0
        upper.append(" " * gap)
        lower.append(" " * gap)
        upper.append(shown + " " * (cells - cell_len(shown)), "italic" if entry.get("next") else "")
        lower.append(taught, style)
        lower.append(" " * (cells - cell_len(taught)))
        if token.endswith("\n") and after is not None and after["token"].strip():
            finish()  # empty lines stay at the end of the one before
    finish()
    return lines


def _tables(view: BlockView, n: int, width: int) -> list[Text]:
    """What the three expected in the place of one token, side by side."""
    entry = view.entries[n] if 0 <= n < len(view.entries) else None
    if entry is None:
        return [Text(f"token {n}: the block has tokens 0 to {len(view.entries) - 1}.", "yellow")]
    head = Text(f"token {n}  ", "bold") + Text(f"{shown_token(entry['token'])}  ")
    if n not in view.tables:
        return [head + Text(why(entry["reason"]) if entry["label"] is None else "no table was made")]
    head += Text("taught: ") + Text(shown_token(entry["label"]), "bold underline")
    lines, tables = [head], view.tables[n]
    titles = {"base": "base, on the translation", "reinforced": "reinforced, on the text"}
    wide = min(max(width // 3 - 17, 6), 16)  # of a token
    heads = "".join(f"  {titles.get(name, name):<{wide + 15}.{wide + 15}}" for name in TEACHERS)
    lines.append(Text(heads.rstrip(), "dim"))
    for rank in range(max(len(tables[name]) for name in TEACHERS)):
        line = Text()
        for name in TEACHERS:
            row = tables[name][rank]
            line.append("  " + set_cell_size(shown_token(row["token"]), wide))
            line.append(f"{row['logit']:7.2f}{100 * row['probability']:6.1f}%")
            line.append("x" if row["edited"] else " ", "red")
        line.rstrip()
        lines.append(line)
    if any(row["edited"] for row in tables["base"]):
        lines.append(
            Text("  x: set to the row's mean, its counterpart has been used before in the block", "dim")
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for what the user can mend)."""
    parser = argparse.ArgumentParser(
        prog="python -m whp_fast.inspect",
        description="The text of a block with the generic label under each token, what was masked and why, "
        "and the top tokens of base, reinforced and combined logits.",
    )
    parser.add_argument("run", type=Path, help="run folder (run.dir)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--block", type=int, help="number of the block; default: the one with most expressions"
    )
    choice.add_argument("--find", metavar="TEXT", help="the first block in which this text begins")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="rows of a table of top tokens")
    parser.add_argument("--alpha", type=float, help="labels of this strength; default: the trained ones")
    parser.add_argument(
        "--positions", metavar="N,M-L", help="tokens (by number in the block) whose tables the terminal shows"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    parser.add_argument("--no-models", action="store_true", help="labels and reasons alone, at once")
    parser.add_argument(
        "--model", default="", metavar="FOLDER", help="where the base is now, if it has moved"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)

    def work() -> None:
        if options.top < 1:
            raise UserError(f"--top: {options.top} rows make no table; set 1 or more.")
        if options.positions and options.no_models:
            raise UserError("--positions: tables need the models; leave --no-models out.")
        asked = _numbers(options.positions) if options.positions else []
        run = Run(options.run, options.model)
        number = run.find(options.find) if options.find is not None else options.block
        view = run.view(run.telling_block() if number is None else number, options.alpha)
        shown = asked or view.changed[:EXAMPLES]
        if not options.no_models:
            wanted = sorted({*asked, *view.changed}) if options.html else shown
            run.ask_models(view, wanted, options.top, torch.device(options.device))
        if options.html:
            write_page(options.html, view)
            console.print(Text(f"{options.html}: block {view.number} of 0 to {view.n_blocks - 1}"))
        else:
            show(view, [] if options.no_models else shown)

    return exit_status(work, debug=options.debug)


def _numbers(words: str) -> list[int]:
    """``"3,17-20"`` as numbers.

    Raises:
        UserError: anything else.
    """
    numbers: list[int] = []
    for word in words.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if not match:
            raise UserError(f"--positions: {word!r} is no number or range; write such as 3,17-20.")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers


if __name__ == "__main__":
    sys.exit(main())
