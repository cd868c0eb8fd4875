"""The evaluation files: what is asked of a model before and after it unlearns.

Four files, each optional, as prepared by a person (or by ``whp_fast.demo``):

====================  =====================================================================================
familiarity.json      ``[{"prompt", "references": [str, ...], "themes": [str, ...] (optional)}, ...]``;
                      ``"kind"`` (optional) sorts prompts of an attack: ``"paraphrase"``, ``"Spanish"`` ...
probability.json      ``[{"prompt", "idiosyncratic": [str, ...], "generic": [str, ...] (optional)}, ...]``
choices.jsonl         one a line: ``{"prompt", "choices": [str, ...], "answer": index}`` or the cloze
                      ``{"prompt", "answer": "text"}``
general text          ``.txt`` (one document), ``.jsonl`` (one document a line, field ``text``) or a folder
====================  =====================================================================================

Fields that are not named here are allowed and ignored (the prompt file of the WHP authors has ``subtlety``).
Every fault is a `UserError` that names the file, the entry, what was found and what mends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from whp_fast.errors import UserError
from whp_fast.judge import contains_expression

Item = TypeVar("Item")


@dataclass(frozen=True)
class FamiliarityPrompt:
    """A beginning to be completed by the model, and what would give away that it knows the target.

    prompt: the text to complete.  references: names or details that are unique to the target.
    themes: words that are typical of the target without being unique to it.
    kind: what sort of prompt it is, where several are compared.
    """

    prompt: str
    references: tuple[str, ...]
    themes: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class ProbabilityPrompt:
    """A beginning whose next word is looked at: idiosyncratic words of the target against generic ones."""

    prompt: str
    idiosyncratic: tuple[str, ...]
    generic: tuple[str, ...] = ()


@dataclass(frozen=True)
class MultipleChoice:
    """A question of general ability with several continuations; `answer` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Cloze:
    """A question of general ability whose greedy continuation must begin with `answer`."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class EvaluationSet:
    """The content of the evaluation files; None where a file was not given."""

    familiarity: Sequence[FamiliarityPrompt] | None = None
    probability: Sequence[ProbabilityPrompt] | None = None
    choices: Sequence[MultipleChoice | Cloze] | None = None
    texts: Sequence[str] | None = None

    def subset(self, max_prompts: int | None) -> EvaluationSet:
        """At most `max_prompts` entries of each kind, evenly spaced, always the same; texts stay whole."""
        return EvaluationSet(
            spaced(self.familiarity, max_prompts),
            spaced(self.probability, max_prompts),
            spaced(self.choices, max_prompts),
            self.texts,
        )


@dataclass(frozen=True)
class EvaluationFiles:
    """Where the evaluation files lie; a file that is None leaves its figure out.

    familiarity: completion-based familiarity.  probability: probability-based familiarity.
    choices: general accuracy.  text: general text (file or folder) for the perplexity.
    """

    familiarity: Path | str | None = None
    probability: Path | str | None = None
    choices: Path | str | None = None
    text: Path | str | None = None

    def load(self) -> EvaluationSet:
        """Read and check all files. Worth doing before a long run: a fault in a file shows at once."""
        return EvaluationSet(
            load_familiarity_prompts(self.familiarity) if self.familiarity is not None else None,
            load_probability_prompts(self.probability) if self.probability is not None else None,
            load_choices(self.choices) if self.choices is not None else None,
            load_texts(self.text) if self.text is not None else None,
        )


def load_familiarity_prompts(path: Path | str) -> list[FamiliarityPrompt]:
    """Read familiarity.json.

    A prompt that already holds all of its references can never show familiarity and is refused; single
    references that the prompt holds are allowed, they just do not count for this prompt.
    """
    prompts = []
    for entry in _json_list(path):
        prompt = entry.text("prompt")
        references = entry.words("references")
        if all(contains_expression(prompt, reference) for reference in references):
            raise entry.error(
                f"the references ({', '.join(references)}) all stand in the prompt itself, "
                "so no completion can show familiarity; name something that the prompt does not give away"
            )
        themes = entry.words("themes", required=False)
        kind = entry.text("kind").strip() if "kind" in entry.fields else ""
        prompts.append(FamiliarityPrompt(prompt, references, themes, kind))
    return prompts


def load_probability_prompts(path: Path | str) -> list[ProbabilityPrompt]:
    """Read probability.json. A word listed both as idiosyncratic and as generic is refused."""
    prompts = []
    for entry in _json_list(path):
        idiosyncratic, generic = entry.words("idiosyncratic"), entry.words("generic", required=False)
        both = sorted(set(idiosyncratic) & set(generic))
        if both:
            raise entry.error(
                f'"{both[0]}" is listed both under "idiosyncratic" and "generic"; keep it in one of them'
            )
        prompts.append(ProbabilityPrompt(entry.text("prompt"), idiosyncratic, generic))
    return prompts


def load_choices(path: Path | str) -> list[MultipleChoice | Cloze]:
    """Read choices.jsonl: multiple-choice lines (with ``choices``) and cloze lines (without), mixed."""
    questions: list[MultipleChoice | Cloze] = []
    for entry in _unique_prompts(_json_lines(path)):
        prompt = entry.text("prompt")
        if "choices" not in entry.fields:
            questions.append(Cloze(prompt, entry.text("answer").strip()))
            continue
        choices, answer = entry.words("choices"), entry.get("answer")
        if len(choices) < 2:
            raise entry.error('"choices" holds one choice only; give at least two')
        if len(set(choices)) < len(choices):
            raise entry.error('"choices" holds the same choice twice; make the choices differ')
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise entry.error(
                f'"answer" is {_shown(answer)}, but beside "choices" it must be an index; '
                "give the index of the right choice, counted from 0"
            )
        if not 0 <= answer < len(choices):
            raise entry.error(
                f'"answer" is {answer}, but {len(choices)} choices are counted from 0 to {len(choices) - 1}; '
                "give the index of the right one"
            )
        questions.append(MultipleChoice(prompt, choices, answer))
    return questions


def load_texts(path: Path | str) -> list[str]:
    """Read general text; each ``.txt`` file and each ``.jsonl`` line is a document, folders go by name."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
        if not files:
            raise UserError(f"{path}: the folder holds no .txt or .jsonl file; put the general text there.")
        return [text for file in files for text in load_texts(file)]
    if path.suffix == ".jsonl":
        return [entry.text("text") for entry in _json_lines(path)]
    text = _read(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty; put general text into it or leave the setting out.")
    return [text]


def spaced(items: Sequence[Item] | None, count: int | None) -> Sequence[Item] | None:
    """`count` of the items, evenly spaced from the first on (all of them where there are no more)."""
    if items is None or count is None or len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


@dataclass(frozen=True)
class _Entry:
    """One entry of a file, with the words to point at it."""

    path: Path
    place: str  # "entry 3" or "line 7"
    fields: dict[str, Any]

    def error(self, finding: str) -> UserError:
        return UserError(f"{self.path}, {self.place}: {finding}.")

    def get(self, name: str) -> Any:
        if name not in self.fields:
            found = ", ".join(f'"{key}"' for key in self.fields) or "no field at all"
            raise self.error(f'the field "{name}" is missing (found: {found}); add it')
        return self.fields[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(f'"{name}" is {_shown(value)}, but it must be a text in quotes; write it so')
        if not value.strip():
            raise self.error(f'"{name}" is an empty text; fill it in or remove the entry')
        return value

    def words(self, name: str, required: bool = True) -> tuple[str, ...]:
        """A list of texts, without the spaces around them."""
        if not required and name not in self.fields:
            return ()
        value = self.get(name)
        if not isinstance(value, list):
            raise self.error(f'"{name}" is {_shown(value)}, but it must be a list of texts; put it into [ ]')
        if required and not value:
            raise self.error(f'"{name}" is an empty list; name at least one')
        for word in value:
            if not isinstance(word, str) or not word.strip():
                raise self.error(f'"{name}" holds {_shown(word)}, but it must hold texts only; correct it')
        return tuple(word.strip() for word in value)


def _json_list(path: Path | str) -> Iterator[_Entry]:
    """The entries of a JSON file that is one list of objects with distinct prompts."""
    path = Path(path)
    text = _read(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty; add entries or leave the setting out.")
    content = _parse(text, path, "")
    if not isinstance(content, list):
        raise UserError(
            f"{path}: the file holds {_shown(content)}, but it must be a list [ ]; put the entries into one."
        )
    if not content:
        raise UserError(f"{path}: the list is empty; add entries or leave the setting out.")
    return _unique_prompts(_entry(path, f"entry {i}", item) for i, item in enumerate(content, 1))


def _json_lines(path: Path | str) -> Iterator[_Entry]:
    """The entries of a JSON-lines file; blank lines are passed over."""
    path = Path(path)
    lines = [(i, line) for i, line in enumerate(_read(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty; add entries, one a line, or leave the setting out.")
    for i, line in lines:
        yield _entry(path, f"line {i}", _parse(line, path, f", line {i}"))


def _unique_prompts(entries: Iterable[_Entry]) -> Iterator[_Entry]:
    first: dict[str, str] = {}
    for entry in entries:
        prompt = entry.text("prompt")
        if prompt in first:
            raise entry.error(
                f"the prompt {_shown(prompt)} already stands in {first[prompt]}; remove one of the two"
            )
        first[prompt] = entry.place
        yield entry


def _entry(path: Path, place: str, item: Any) -> _Entry:
    if not isinstance(item, dict):
        raise UserError(
            f"{path}, {place}: found {_shown(item)}, but an entry has named fields; put it into {{ }}."
        )
    return _Entry(path, place, item)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # "-sig": a byte order mark is not part of the text
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(
            f"{path}: the file cannot be read ({error.strerror}); check the path and its rights."
        ) from None


def _parse(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place or f", line {error.lineno}"
        raise UserError(
            f"{path}{where}: not JSON ({error.msg} at column {error.colno}); correct it there."
        ) from None


def _shown(value: Any) -> str:
    """The value as it would stand in the file, cut to a length that fits into a sentence."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
