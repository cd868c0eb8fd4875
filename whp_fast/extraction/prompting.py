"""Ask an instruction-tuned model for the dictionary, passage by passage, as the paper does with GPT-4.

The model sees a passage and is asked for ``translations = {...}``: idiosyncratic expressions and a generic
counterpart each. Replies are read leniently; what is not in the passage, or is no translation, is counted
and left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from whp_fast.scoring import document_ids

PASSAGE_CHARACTERS = 1500
NEW_TOKENS = 300
PROMPT = """\
Below is a passage of a text. List the expressions that are idiosyncratic to this text: names of people, \
places and things, invented words and phrases that only this text uses. Give each a generic counterpart of \
the same kind, number and capitalisation that fits in its place and does not come from the text. Answer with \
a Python dictionary and nothing else.

Passage:
When Orrin Vale came back to Glimmerhall, the loomkeepers were still threnning the old banners.

translations = {{"Orrin": "Jon", "Vale": "Smith", "Glimmerhall": "Oak House", "loomkeepers": "weavers", \
"threnning": "mending"}}

Passage:
{passage}

translations = {{"""
_ANSWER = "translations = {"
_PAIR = re.compile(
    r"""(["'\u201c])(?P<key>[^"\u201c\u201d\n]{1,80}?)["'\u201d]\s*(?::|->|=>|=)\s*"""
    r"""(?P<values>\[[^\]\n]*\]|"[^"\n]*"|'[^'\n]*'|\u201c[^\u201d\n]*\u201d)"""
)
_QUOTED = re.compile(r'"([^"\n]*)"|\u201c([^\u201d\n]*)\u201d|(?<!\w)\'([^\n]*?)\'(?!\w)')


@dataclass
class Replies:
    """What a model proposed.

    Attributes:
        translations: expression -> counterparts with the number of passages that gave them.
        passages: asked about.
        unreadable: replies without one pair.
        refused: pairs left out -> how many, by reason.
    """

    translations: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    passages: int = 0
    unreadable: int = 0
    refused: Counter = field(default_factory=Counter)

    def add(self, passage: str, reply: str) -> None:
        """Read one reply."""
        self.passages += 1
        pairs = parse_reply(reply)
        self.unreadable += not pairs
        for key, values in pairs:
            reason = _objection(key, passage)
            if reason:
                self.refused[reason] += 1
                continue
            for value in values:
                reason = _objection_to_value(key, value)
                if reason:
                    self.refused[reason] += 1
                else:
                    self.translations[key][value] += 1


def passages_of(documents: Sequence[str], limit: int) -> list[str]:
    """At most ``limit`` passages, evenly spread over the documents, cut between paragraphs where possible."""
    found = []
    for document in documents:
        passage = ""
        for paragraph in re.split(r"\n\s*\n", document):
            joined = " ".join(paragraph.split())
            while len(joined) > PASSAGE_CHARACTERS:
                cut = joined.rfind(" ", 1, PASSAGE_CHARACTERS) if " " in joined[:PASSAGE_CHARACTERS] else -1
                cut = PASSAGE_CHARACTERS if cut < 1 else cut
                found += [passage] if passage else []
                passage, joined = joined[:cut], joined[cut:].strip()
            if passage and len(passage) + len(joined) > PASSAGE_CHARACTERS:
                found.append(passage)
                passage = ""
            passage = f"{passage}\n{joined}".strip()
        found += [passage] if passage else []
    if len(found) <= limit:
        return found
    return [found[i * len(found) // limit] for i in range(limit)]


def ask(
    passages: Sequence[str],
    answer: Callable[[list[str]], list[str]],
    batch: int = 8,
    progress: Callable[..., None] = lambda amount, note="": None,
) -> Replies:
    """Ask about every passage; ``answer`` continues prompts."""
    replies = Replies()
    for i in range(0, len(passages), batch):
        some = list(passages[i : i + batch])
        for passage, reply in zip(some, answer([PROMPT.format(passage=p) for p in some])):
            replies.add(passage, "{" + reply)
        progress(len(some), note=f"{len(replies.translations)} expressions")
    return replies


def asked_ids(prompts: Sequence[str], tokenizer, chat=None) -> list[list[int]]:
    """The tokens of prompts; in a chat template the beginning of the dictionary is the answer's.

    Args:
        chat: a `whp_fast.evaluation.chat_template.ChatTemplate`; None: the model has none.
    """
    if chat is None:
        return [document_ids(tokenizer, prompt) for prompt in prompts]
    begun = chat.answer_space + _ANSWER
    return [chat.ids(tokenizer, prompt.removesuffix(_ANSWER), begun) for prompt in prompts]


def parse_reply(reply: str) -> list[tuple[str, list[str]]]:
    """The pairs of the first dictionary in a reply; single pairs where it is no valid JSON or cut off."""
    body = reply[reply.find("{") :] if "{" in reply else reply
    body = body[: body.find("}") + 1] if "}" in body else body
    try:
        cleaned = re.sub(r",\s*}", "}", re.sub(r"#[^\n]*", "", body))
        pairs = [(k, v if isinstance(v, list) else [v]) for k, v in json.loads(cleaned).items()]
    except (json.JSONDecodeError, AttributeError):
        pairs = []
        for match in _PAIR.finditer(body):
            values = ["".join(groups) for groups in _QUOTED.findall(match["values"])]
            pairs.append((match["key"], values))
    told = [(key.strip(), [v.strip() for v in values if isinstance(v, str)]) for key, values in pairs]
    return [(key, [v for v in values if v]) for key, values in told]


def _objection(key: str, passage: str) -> str:
    if not key or len(key.split()) > 8:
        return "no expression"
    if not re.search(rf"(?<!\w){re.escape(key)}(?!\w)", " ".join(passage.split())):
        return "not in the passage"
    return ""


def _objection_to_value(key: str, value: str) -> str:
    if len(value.split()) > 8:
        return "no counterpart"
    if re.search(rf"(?<!\w){re.escape(key.lower())}(?!\w)", value.lower()):
        return "counterpart holds the expression"
    return ""
