"""Chat templates: a question as the message of a user, in the form that a chat model was trained on.

The template is the one of the model's folder: ``chat_template.jinja``, or ``chat_template`` in
``tokenizer_config.json``. It is rendered by jinja2 in a sandbox, as Hugging Face does. Only the template's
own text may hold special tokens: what is asked stands in it as plain text, whatever it spells.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

from whp_fast.errors import UserError

_PLACE = "\ue000"  # private use: stands for what is asked while the template is rendered


class ChatTemplate:
    """The chat template of a model folder.

    Args:
        text: the template.
        special: special token -> id.
        names: bos_token and eos_token as text, for the template.
        where: file, for messages.

    Raises:
        UserError: jinja2 is missing, the template is broken, or does not show what is asked exactly once.
    """

    def __init__(self, text: str, special: dict[str, int], names: dict[str, str], where: str = "template"):
        rendered = _rendered(text, names, where)
        if rendered.count(_PLACE) != 1:
            raise UserError(
                f"{where}: the chat template shows a user's message {rendered.count(_PLACE)} times; mend it, "
                "or take it out."
            )
        self._special = special
        known = sorted(map(re.escape, special), key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(known)})") if known else None
        self._before, self._after = rendered.split(_PLACE)

    @property
    def answer_space(self) -> str:
        """What stands between the question and an answer: a space where the template leaves nothing."""
        end = self._parts(self._after)[-1] if self._after else ""
        return "" if end == "" or end in self._special or end[-1].isspace() else " "

    def ids(self, tokenizer, message: str, answer: str = "") -> list[int]:
        """Tokens of the message in the template, and of the beginning of an answer behind it."""
        *front, last = self._parts(self._before)
        first, *back = self._parts(self._after)
        runs = [*front, last + message.strip() + first, *back]
        runs[-1] += answer
        plain = len(front)  # the run with the message: special tokens that it spells are text
        found: list[int] = []
        for number, run in enumerate(runs):
            if number != plain and run in self._special:
                found.append(self._special[run])
            elif run:
                at_start = all(r in self._special or not r for r in runs[:number]) and number <= plain
                found += tokenizer.encode(run) if at_start else tokenizer.encode_inside(run)
        return found

    def _parts(self, text: str) -> list[str]:
        """Special tokens and the text between them, which begins and ends the list (maybe empty)."""
        return self._splitter.split(text) if self._splitter else [text]


def load_chat_template(folder: Path, tokenizer) -> ChatTemplate | None:
    """The chat template of a model folder; None where it has none.

    Raises:
        UserError: see `ChatTemplate`; a file that is not JSON.
    """
    config = _json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    where, text = str(folder / "tokenizer_config.json"), config.get("chat_template")
    if file.is_file():
        where, text = str(file), file.read_text(encoding="utf-8")
    if isinstance(text, list):  # several, by name
        text = {entry["name"]: entry["template"] for entry in text}.get("default")
    if not isinstance(text, str) or not text.strip():
        return None
    names = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
    special = {names["bos_token"]: tokenizer.bos_id, names["eos_token"]: tokenizer.eos_id}
    special |= {
        entry["content"]: entry["id"] for entry in _json(folder / "tokenizer.json").get("added_tokens", [])
    }
    special |= _json(folder / "added_tokens.json")
    special |= {e["content"]: int(i) for i, e in config.get("added_tokens_decoder", {}).items()}
    special = {piece: number for piece, number in special.items() if piece and number is not None}
    return ChatTemplate(text, special, names, where)


def _rendered(text: str, names: dict[str, str], where: str) -> str:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:  # torch brings it
        raise UserError(f"{where}: jinja2 cannot be imported ({error}); pip install jinja2.") from None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    world.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    world.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    given: dict[str, Any] = {"messages": [{"role": "user", "content": _PLACE}], "add_generation_prompt": True}
    try:
        return world.from_string(text).render(**given, **names)
    except Exception as error:  # whatever a template does wrong
        raise UserError(
            f"{where}: the chat template cannot be rendered ({' '.join(str(error).split())}); mend it, or "
            "take it out."
        ) from None


def _token_text(entry: Any) -> str:
    """A token as tokenizer_config.json writes it: a text, or an object with its content."""
    return str((entry.get("content") if isinstance(entry, dict) else entry) or "")


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON ({error}); mend the file.") from None
    return content if isinstance(content, dict) else {}
