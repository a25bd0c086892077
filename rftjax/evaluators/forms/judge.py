"""A client of any address that speaks OpenAI's chat completions, for evaluators that ask a model.

Requests run in threads, as many at once as `concurrency` says; equal ones are asked once. Answers are kept in a folder,
so that a repeated or resumed run asks nothing twice. Standard library only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import random
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OPENAI = "https://api.openai.com/v1"
_AGAIN = (408, 409, 425, 429)  # and 5xx: worth another try
_LONGEST_WAIT_S = 20.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's text, and what it cost: calls and tokens are 0 where it was kept from before."""

    text: str
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The costs, by the names under which they are recorded."""
        return {
            "judge_calls": float(self.calls),
            "judge_prompt_tokens": float(self.prompt_tokens),
            "judge_completion_tokens": float(self.completion_tokens),
        }


class Judge:
    """Asks `model` at `base_url`, by default that of the variable OPENAI_BASE_URL or OpenAI's own.

    `key_variable` names the environment variable with the key, which scoring.env has to pass on; none is needed on this
    machine. `sampling` are further fields of the request (temperature, seed, max_tokens, ...). A request is tried again
    `retries` times where the server is busy, fails or drops the connection. `cache` is the folder of kept answers.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "",
        key_variable: str = "OPENAI_API_KEY",
        sampling: Mapping[str, Any] | None = None,
        concurrency: int = 16,
        retries: int = 4,
        timeout_s: float = 60.0,
        cache: Path | None = None,
    ) -> None:
        self.model = model
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        self._key_variable, self._sampling = key_variable, dict(sampling or {})
        self._concurrency, self._retries, self._timeout_s = concurrency, retries, timeout_s
        self._cache = cache
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._asked: dict[str, asyncio.Future[Answer]] = {}

    async def ask(self, messages: Sequence[Mapping[str, Any]]) -> Answer:
        """Returns the answer to a conversation; raises RuntimeError with what the server said last."""
        body = {"model": self.model, "messages": list(messages), **self._sampling}
        key = hashlib.sha256(
            json.dumps([self.base_url, body], sort_keys=True).encode("utf-8", "backslashreplace")
        ).hexdigest()
        if (kept := self._kept(key)) is not None:
            return kept
        if (asked := self._asked.get(key)) is not None:  # the same question is under way
            try:
                return Answer((await asyncio.shield(asked)).text)
            except asyncio.CancelledError:
                if not asked.cancelled():  # this call was, not the one that asks
                    raise
                return await self.ask(messages)
        if self._threads is None:  # not before: a process with threads cannot be forked
            self._threads = concurrent.futures.ThreadPoolExecutor(self._concurrency, "judge")
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._ask, body)
        self._asked[key] = work
        try:
            answer = await work
        finally:
            del self._asked[key]
        self._keep(key, answer)
        return answer

    def close(self) -> None:
        """Waits for requests under way and ends the threads."""
        if self._threads is not None:
            self._threads.shutdown()

    def _ask(self, body: Mapping[str, Any]) -> Answer:
        calls, wait_s = 0, 0.5
        while True:
            calls += 1
            try:
                return self._request(body, calls)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(2000).decode("utf-8", "replace")
                problem = f"{error.code} {error.reason}: {said.strip()[:300]}"
                again = error.code in _AGAIN or error.code >= 500
                wait_s = _retry_after(error.headers.get("Retry-After"), wait_s)
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # no connection, a timeout, a dropped one
                problem, again = f"{type(error).__name__}: {error}", True
            if not again or calls > self._retries:
                raise RuntimeError(
                    f"the judge at {self.base_url} failed after {calls} calls: {problem}"
                )
            time.sleep(min(wait_s, _LONGEST_WAIT_S) * random.uniform(0.7, 1.0))
            wait_s *= 2

    def _request(self, body: Mapping[str, Any], calls: int) -> Answer:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self._key_variable, "")
        local = any(host in self.base_url for host in ("://127.0.0.1", "://localhost", "://[::1]"))
        if key:
            headers["Authorization"] = f"Bearer {key}"
        elif not local:
            raise ValueError(
                f"the judge at {self.base_url} needs a key in the environment variable {self._key_variable}"
            )
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions",
            json.dumps(body).encode("utf-8", "backslashreplace"),
            headers,
        )
        with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
            data = response.read()
        try:
            said = json.loads(data)
        except ValueError:
            shown = data[:300].decode("utf-8", "replace").strip()
            raise ValueError(
                f"the judge at {self.base_url} answered what is no JSON: {shown!r}"
            ) from None
        try:
            text = said["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"the judge answered {json.dumps(said)[:300]}") from None
        usage = said.get("usage") or {}
        prompt, completion = (
            int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")
        )
        return Answer(text, calls, prompt, completion)

    def _kept(self, key: str) -> Answer | None:
        if self._cache is None:
            return None
        try:
            return Answer(json.loads((self._cache / key[:2] / f"{key}.json").read_text())["text"])
        except (OSError, ValueError, KeyError):
            return None

    def _keep(self, key: str, answer: Answer) -> None:
        if self._cache is None:
            return
        folder = self._cache / key[:2]
        folder.mkdir(parents=True, exist_ok=True)
        number, partial = tempfile.mkstemp(dir=folder)
        with open(number, "w") as file:
            json.dump({"text": answer.text, "model": self.model}, file)
        os.replace(partial, folder / f"{key}.json")  # two workers may write the same answer


def _retry_after(text: str | None, otherwise: float) -> float:
    try:
        return float(text or otherwise)
    except ValueError:  # a date
        return otherwise
