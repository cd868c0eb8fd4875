"""The tasks of lm-evaluation-harness on a model of this project (an extra: ``pip install lm-eval``).

`HarnessModel` answers the three kinds of requests of ``lm_eval.api.model.LM``, whose instances carry
``args``:

    loglikelihood          (context, continuation)   -> (log-probability, whether it is the greedy choice)
    loglikelihood_rolling  (text,)                   -> log-probability of the whole text
    generate_until         (context, settings)       -> text, up to the first stop string

A text's log-probability does not count its BOS token. The harness's own class for Hugging Face models reads
BOS twice there and counts the second one, for tokenizers that add it: its perplexities are a little higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from whp_fast.errors import UserError
from whp_fast.evaluation.bootstrap import Figure, mean_figure
from whp_fast.generate import greedy, sample
from whp_fast.scoring import document_ids, end_of_text_ids, evaluation_mode, token_scores

_NEW_TOKENS = 256  # the harness's own default


class HarnessModel:
    """The requests of the harness, without the harness.

    Args:
        model, tokenizer: as for `whp_fast.evaluate.evaluate`.
        max_length: tokens that the model can read; longer contexts lose their beginning.
        seed: of what is sampled.
    """

    def __init__(self, model, tokenizer, *, max_length: int, batch_size: int = 8, seed: int = 0):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows, sizes = [], []
        for context, continuation in (request.args for request in requests):
            before, after = self._pair(context, continuation)
            rows.append([*before, *after][-self.max_length - 1 :])  # the last one is only predicted
            sizes.append(min(len(after), len(rows[-1]) - 1))
        with evaluation_mode(self.model):
            scores = token_scores(self.model, rows, self.batch_size)
        return [
            (
                float(s.log_probs[len(s.log_probs) - n :].double().sum()),
                bool(s.greedy[len(s.greedy) - n :].all()),
            )
            for s, n in zip(scores, sizes, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        rows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = document_ids(self.tokenizer, text)
            if self.tokenizer.bos_id is None:
                ids = [self._prefix_token(), *ids]
            for window in rolling_windows(len(ids), self.max_length):
                rows.append(ids[window[0] : window[2]])
                owners.append((number, window[2] - window[1]))
        totals = [0.0] * len(requests)
        with evaluation_mode(self.model):
            scores = token_scores(self.model, rows, self.batch_size)
        for (number, count), score in zip(owners, scores, strict=True):
            totals[number] += float(score.log_probs[len(score.log_probs) - count :].double().sum())
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        answers = []
        with evaluation_mode(self.model):
            for context, settings in (request.args for request in requests):
                new = int(settings.get("max_gen_toks", settings.get("max_new_tokens", _NEW_TOKENS)))
                new = min(new, self.max_length // 2)  # room for a context in a model that reads little
                ids = document_ids(self.tokenizer, context) or [self._prefix_token()]
                tokens = self._generate(ids[-(self.max_length - new) :], new, settings)
                until = settings.get("until") or []
                answers.append(
                    cut_at(self.tokenizer.decode(tokens), [until] if isinstance(until, str) else until)
                )
        return answers

    def _generate(self, ids: list[int], new: int, settings: dict[str, Any]) -> list[int]:
        stops = end_of_text_ids(self.model, self.tokenizer)
        temperature = float(settings.get("temperature", 0.0) or 0.0)
        if settings.get("do_sample") and temperature > 0:
            generator = torch.Generator(self.model.lm_head_weight.device).manual_seed(self.seed)
            return sample(self.model, [ids], new, temperature, generator, stops)[0]
        return greedy(self.model, [ids], new, stops)[0]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; white space at the end of the context goes to the continuation, as in the "
        "harness."""
        cut = len(context.rstrip())
        context, continuation = context[:cut], context[cut:] + continuation
        before = document_ids(self.tokenizer, context)
        after = document_ids(self.tokenizer, context + continuation)[len(before) :]
        return before or [self._prefix_token()], after

    def _prefix_token(self) -> int:
        found = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        return 0 if found is None else found


def rolling_windows(length: int, max_length: int) -> list[tuple[int, int, int]]:
    """(first token read, first token predicted, end) of windows that predict every token but the first once.

    A window reads ``max_length`` tokens and predicts one behind them; the last one reaches back, so that it
    has its full context too.
    """
    windows, predicted = [], 1
    while predicted < length:
        end = min(length, predicted + max_length)
        windows.append((max(0, end - max_length - 1), predicted, end))
        predicted = end
    return windows


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    places = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(places)] if places else text


def harness_figures(
    model, tokenizer, tasks: Sequence[str], *, max_length: int, batch_size: int = 8, limit: int | None = None
) -> dict[str, Figure]:
    """Run tasks of the harness: ``{"arc_easy acc": Figure}``, each mean with its bootstrap over the
    documents.

    Raises:
        UserError: lm-eval is not installed, or it does not know a task.
    """
    require_harness()
    import lm_eval
    from lm_eval.api.model import LM

    class Model(HarnessModel, LM):
        """Registered with nothing: it is handed over as an object."""

    lm = Model(model, tokenizer, max_length=max_length, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=lm, tasks=list(tasks), limit=limit, log_samples=True, bootstrap_iters=0
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--lm-eval {','.join(tasks)}: the harness refused ({error}); `lm_eval ls tasks` names its tasks."
        ) from error
    return task_figures(found)


def require_harness() -> None:
    """Raises a UserError where lm-eval is not installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--lm-eval: lm-evaluation-harness cannot be imported ({error}); pip install lm-eval."
        ) from None


def task_figures(found: dict[str, Any]) -> dict[str, Figure]:
    """Figures from what ``lm_eval.simple_evaluate`` returns: of each task every metric that is a mean of
    numbers a document (``acc``, ``acc_norm``, ``exact_match`` ...); other metrics, such as perplexities, as
    they are, without an interval."""
    figures = {}
    for task, results in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if metric in ("alias", "name", "sample_len") or "stderr" in metric or not _is_number(value):
                continue
            own = [s for s in samples if s.get("filter", filtered) == filtered]
            name = f"{task} {metric}" + (f" ({filtered})" if filtered not in ("", "none") else "")
            values = [s[metric] for s in own if metric in s and _is_number(s[metric])]
            mean = mean_figure(values) if values else None
            if mean is not None and abs(mean.value - value) <= 1e-6 * max(1.0, abs(value)):
                figures[name] = mean
            else:
                figures[name] = Figure(float(value), float("nan"), float("nan"), len(own))
    return figures


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, str)
