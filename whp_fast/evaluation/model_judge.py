"""A local model as judge of completions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from whp_fast.errors import UserError
from whp_fast.evaluation.chat_template import ChatTemplate
from whp_fast.evaluation.judge_question import CLASSES, judge_question
from whp_fast.judge import UNJUDGED
from whp_fast.prompts import FamiliarityPrompt
from whp_fast.scoring import document_ids, evaluation_mode, first_scored_token, target_log_probs

LEAST_MASS = 0.05  # of the probability, on the four classes together
MOST_UNJUDGED = 0.2  # of the completions; beyond, the figure would rest on a choice of them


class ModelJudge:
    """Asks a model of this process; the class is the number that it finds most probable as the answer.

    Nothing is generated, so there is always an answer to read. But a model that expects something other than
    a class gives it little probability: below ``LEAST_MASS`` for all four together the completion is left
    unjudged, and counted in ``nonsense``.

    Args:
        model, tokenizer: as for `whp_fast.evaluate.evaluate`.
        name: for messages.
        chat: the chat template of the model, in which the question is put; None: it is given as plain text.
    """

    def __init__(
        self, model, tokenizer, name: str = "judge", batch_size: int = 8, chat: ChatTemplate | None = None
    ):
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        self.chat = chat
        self.nonsense = 0

    def __call__(self, prompt: str, completion: str, item: FamiliarityPrompt) -> int | None:
        return self._ask([(prompt, completion, item)])[0]

    def classes(self, asked: Sequence[tuple[str, str, FamiliarityPrompt]]) -> list[int | None]:
        """Each completion's class.

        Raises:
            UserError: more than a fifth are left unjudged.
        """
        found = self._ask(asked)
        check_share(found, f"--judge-model {self.name}", "expected something other than a class from 0 to 3")
        return found

    def warnings(self) -> list[str]:
        """What a person should know of its work."""
        return unjudged_warning(self.name, self.nonsense, "it expected something other than a class")

    def _ask(self, asked) -> list[int | None]:
        rows, begins = [], []
        for one in asked:
            question = judge_question(*one)
            choices = [str(number) for number in CLASSES]
            encoded = [self._encoded(question, choice) for choice in choices]
            rows += encoded
            begins += [first_scored_token(self.tokenizer, encoded, choices)] * len(encoded)
        longest = max((len(row) for row in rows), default=0)
        limit = getattr(getattr(self.model, "config", None), "max_position_embeddings", longest)
        if longest > limit:
            raise UserError(
                f"--judge-model {self.name}: a question has {longest} tokens, but the model reads {limit} "
                "(max_position_embeddings); use another one, or shorter completions."
            )
        with evaluation_mode(self.model):
            scores = target_log_probs(self.model, rows, self.batch_size)
        totals = [float(row[begin - 1 :].sum()) for row, begin in zip(scores, begins, strict=True)]
        found = []
        for i in range(0, len(totals), len(CLASSES)):
            of_classes = totals[i : i + len(CLASSES)]
            mass = sum(math.exp(total) for total in of_classes)
            found.append(CLASSES[of_classes.index(max(of_classes))] if mass >= LEAST_MASS else UNJUDGED)
        self.nonsense += found.count(UNJUDGED)
        return found

    def _encoded(self, question: str, choice: str) -> list[int]:
        """The question and an answer."""
        if self.chat is None:
            return document_ids(self.tokenizer, f"{question} {choice}")
        return self.chat.ids(self.tokenizer, question, self.chat.answer_space + choice)


def check_share(found: Sequence[int | None], who: str, why: str) -> None:
    """Refuse a judgement of which too much is missing."""
    unjudged = list(found).count(UNJUDGED)
    if unjudged > MOST_UNJUDGED * len(found):
        raise UserError(
            f"{who}: {unjudged} of {len(found)} completions were left unjudged ({why}); use another judge, "
            "or "
            "leave the option out for the lexical one."
        )


def unjudged_warning(name: str, count: int, why: str) -> list[str]:
    if not count:
        return []
    return [f"judge {name}: {count} completions were left unjudged and do not count ({why})"]
