"""A judge behind an OpenAI-compatible address (``/chat/completions``), asked with the standard library."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from whp_fast.errors import UserError
from whp_fast.evaluation.judge_question import judge_question, read_class
from whp_fast.evaluation.model_judge import check_share, unjudged_warning
from whp_fast.judge import UNJUDGED
from whp_fast.prompts import FamiliarityPrompt

KEY_VARIABLE = "WHP_JUDGE_KEY"
_LONGEST_REPLY = 1 << 20


class EndpointJudge:
    """Asks a chat model for the class of each completion.

    An answer that is no class (`read_class`) is asked for again, as is one that does not come in time; after
    ``tries`` the completion is left unjudged and counted, by name, in ``nonsense``, ``timeouts`` or
    ``failures``. What no second try can mend (a refused key, an unknown model or address) is an error at
    once; so is an endpoint that never answered, and one that leaves more than a fifth of the completions
    unjudged.

    Args:
        url: up to and including the version (``http://localhost:8000/v1``), or the whole address.
        model: its name there.
        key: sent as a bearer token; None: what the environment variable WHP_JUDGE_KEY holds, if anything.
        timeout: seconds for one answer.
        tries: at most so many requests for a completion.
        workers: requests at the same time.
        pause: seconds before the second try, doubled before each later one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout: float = 30.0,
        tries: int = 3,
        workers: int = 4,
        pause: float = 1.0,
    ):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError(
                f"--judge-endpoint: {url!r} is no address of the web; give one such as "
                "http://localhost:8000/v1."
            )
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.model, self.key = model, key if key is not None else os.environ.get(KEY_VARIABLE)
        self.timeout, self.tries, self.workers, self.pause = timeout, tries, workers, pause
        self.nonsense = self.timeouts = self.failures = 0
        self.answered = 0
        self.last_nonsense = ""
        self._lock = threading.Lock()

    def __call__(self, prompt: str, completion: str, item: FamiliarityPrompt) -> int | None:
        problem = ""
        for attempt in range(self.tries):
            if attempt and problem != "nonsense":
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                answer = self._answer(judge_question(prompt, completion, item))
            except _Failure as failure:
                problem = str(failure)
                continue
            with self._lock:
                self.answered += 1
            number = read_class(answer)
            if number is not None:
                return number
            problem = "nonsense"
            self.last_nonsense = answer
        with self._lock:
            if problem == "nonsense":
                self.nonsense += 1
            elif problem == "timeout":
                self.timeouts += 1
            else:
                self.failures += 1
            if not self.answered:
                what = f"within {self.timeout:g} s" if problem == "timeout" else f"({problem})"
                raise UserError(
                    f"--judge-endpoint: {self.url} gave no answer {what}, asked {self.tries} times; check "
                    "that "
                    "the server runs, or raise --judge-timeout."
                )
        return UNJUDGED

    def classes(self, asked: Sequence[tuple[str, str, FamiliarityPrompt]]) -> list[int | None]:
        """Each completion's class; the first one is asked alone, so that a wrong address shows at once."""
        if not asked:
            return []
        found = [self(*asked[0])]
        with ThreadPoolExecutor(self.workers) as pool:
            found += pool.map(lambda one: self(*one), asked[1:])
        shown = f", the last {self.last_nonsense[:60]!r}" if self.nonsense else ""
        why = (
            f"{self.nonsense} answers were no class{shown}; {self.timeouts} timed out; {self.failures} failed"
        )
        check_share(found, f"--judge-endpoint {self.url}", why)
        return found

    def warnings(self) -> list[str]:
        """What a person should know of its work."""
        return [
            *unjudged_warning(
                self.model,
                self.nonsense,
                f"its answers were no class from 0 to 3, the last {self.last_nonsense[:60]!r}",
            ),
            *unjudged_warning(self.model, self.timeouts, f"no answer within {self.timeout:g} s"),
            *unjudged_warning(self.model, self.failures, "the server failed or broke off"),
        ]

    def _answer(self, question: str) -> str:
        """The text of the answer.

        Raises:
            _Failure: another try may help; ``timeout`` or what happened.
            UserError: it will not.
        """
        body = {"model": self.model, "temperature": 0, "max_tokens": 16}
        body["messages"] = [{"role": "user", "content": question}]
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                content = json.loads(reply.read(_LONGEST_REPLY))
            text = content["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            with error:
                told = error.read(300).decode(errors="replace").strip()
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Failure(f"status {error.code}") from None
            raise UserError(
                f"--judge-endpoint: {self.url} answered with status {error.code} ({told or error.reason}); "
                "check "
                f"the address, --judge-model and the key in {KEY_VARIABLE}."
            ) from None
        except TimeoutError:
            raise _Failure("timeout") from None
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            raise _Failure("timeout" if timed_out else str(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failure(type(error).__name__) from None
        except (ValueError, LookupError, TypeError):
            return ""  # no chat completion: nonsense
        return text if isinstance(text, str) else ""


class _Failure(Exception):
    pass
