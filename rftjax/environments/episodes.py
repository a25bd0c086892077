"""Episodes as the main process sees them; user code runs in worker processes, inside `handler`.

A stateful episode has its own process from start to end: a hang or a crash ends that episode only.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import logging
from collections.abc import Hashable, Iterable
from typing import Any

from rftjax.environments.limits import Limits
from rftjax.types import Message, Task, Turn
from rftjax.workers.pool import WorkerError, Workers, done

_log = logging.getLogger(__name__)


class Environments:
    """Episodes of `environment` ("module:name" or "file.py:name"), each under a key that the caller chooses.

    An empty `environment` ends every episode after the first answer and starts no process. `workers` calls run at once
    (64 times as many for asynchronous code). Futures raise WorkerError where an episode fails: user code raised,
    returned something other than messages, overran `timeout_s` seconds in one call, or its process died. `env` lists
    environment variables to pass on besides the harmless ones. `tool_timeout_s` and `max_calls` (in one turn) limit
    calls of tools; the caller cuts messages to `max_message_tokens`; 0 is no limit. `tools` holds the tool schemas for
    chat templates, from the environment's `schemas`. The constructor raises ValueError where the import fails; call it
    before JAX is used.
    """

    def __init__(
        self,
        environment: str,
        *,
        workers: int = 2,
        timeout_s: float = 60.0,
        env: Iterable[str] = (),
        tool_timeout_s: float = 0.0,
        max_calls: int = 0,
        max_message_tokens: int = 0,
    ):
        self.tools: list[dict[str, Any]] = []
        self._timeout_s = timeout_s
        self._limits = Limits(tool_timeout_s, max_calls)._asdict()
        self.max_message_tokens = max_message_tokens
        self._workers: Workers | None = None
        self._stateful = self._has_state = False
        self._open: dict[Hashable, tuple[Task, str]] = {}
        self._closing: set[concurrent.futures.Future[Any]] = set()
        self._numbers = itertools.count()
        if environment:
            self._workers = Workers(
                environment,
                workers,
                timeout_s,
                wrapper="rftjax.environments.handler:environment_handler",
                field="environment",
                limit_field="environments.timeout_s",
                env=env,
                env_field="environments.env",
            )
            about = json.loads(self._workers.about)
            self._stateful, self.tools = about["stateful"], about["tools"]
            self._has_state = about["state"]

    @property
    def active(self) -> bool:
        """Whether there is an environment."""
        return self._workers is not None

    def start(
        self, key: Hashable, task: Task, seed: int
    ) -> concurrent.futures.Future[list[Message]]:
        """Starts an episode; the future's result is its first messages, often none.

        Returns at once: the process is forked when the call's turn comes. End every episode, also a failed one, with
        `close_episode` or `finish_episode`.
        """
        assert key not in self._open, f"episode {key!r} is open already"
        session = f"episode {next(self._numbers)}" if self._stateful else ""
        self._open[key] = (task, session)
        if self._workers is None or not self._stateful:
            return done([])
        return self._workers.submit("start", session, task, seed, self._limits, session=session)

    def step(self, key: Hashable, messages: list[Message]) -> concurrent.futures.Future[Turn]:
        """Sends the conversation so far, which ends with the model's message; the future's result is the answer."""
        assert messages and messages[-1].get("role") == "assistant", "the model's message is last"
        task, session = self._open[key]
        if self._workers is None:
            return done(Turn(done=True))
        if not self._stateful:
            return self._workers.submit("reply", "", task, messages)
        return self._workers.submit("step", session, messages[-1], session=session)

    def finish_episode(self, key: Hashable) -> concurrent.futures.Future[Any]:
        """Ends an episode without an error; the future's result is the environment's `state()`, None without one.

        The episode is then closed, as by `close_episode`.
        """
        _, session = self._open[key]
        if self._workers is None or not session or not self._has_state:
            self.close_episode(key)
            return done(None)
        del self._open[key]
        future = self._workers.submit("state", session, session=session)
        closed: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._closing.add(closed)

        def close(_: object) -> None:
            try:
                self._close(session)
            finally:
                self._closing.discard(closed)
                closed.set_result(None)

        future.add_done_callback(close)
        return future

    def close_episode(self, key: Hashable) -> None:
        """Ends an episode without waiting; ignores an unknown key."""
        _, session = self._open.pop(key, (None, ""))
        if session:
            self._close(session)

    def _close(self, session: str, *, urgent: bool = False) -> None:
        assert self._workers is not None
        future = self._workers.submit("close", session, session=session, last=True, urgent=urgent)
        self._closing.add(future)
        future.add_done_callback(self._closed)

    def _closed(self, future: concurrent.futures.Future[Any]) -> None:
        self._closing.discard(future)
        error = future.exception()
        if isinstance(error, WorkerError) and not error.bystander:
            _log.warning("an environment's close() failed: %s", error)

    @property
    def bystanders(self) -> int:
        """Calls stopped by another call's fault so far."""
        return self._workers.bystanders if self._workers else 0

    def close(self) -> None:
        """Closes all open episodes, waits for that within the time limit, and ends the processes."""
        if self._workers is None:
            return
        try:
            self._close_all()
        finally:
            self._workers.close()

    def _close_all(self) -> None:
        for key in list(self._open):
            _, session = self._open.pop(key)
            if session:
                self._close(session, urgent=True)
        # Twice: the last episodes may return their state first. The extra seconds are for interrupted calls.
        for _ in range(2):
            concurrent.futures.wait(list(self._closing), timeout=self._timeout_s + 4.0)

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
