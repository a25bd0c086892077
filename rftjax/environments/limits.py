"""Limits of tool calls: how many of a turn are run, and how long one may take."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import NamedTuple

from rftjax.environments.calls import Call


class Limits(NamedTuple):
    """Limits of an episode's calls, 0 for none: the seconds of one, and how many of a turn are run."""

    tool_timeout_s: float = 0.0
    max_calls: int = 0

    def first(self, calls: list[Call]) -> list[Call]:
        """Returns a turn's calls; those beyond the limit have a problem, which the model is told."""
        if not self.max_calls:
            return calls
        problem = f"only {self.max_calls} calls are run in one turn (environments.max_calls); call again in the next"
        rest = [call | {"problem": problem} for call in calls[self.max_calls :]]
        return calls[: self.max_calls] + rest

    @property
    def late(self) -> str:
        """What the model is told of a call that took longer."""
        return f"the tool did not answer within {self.tool_timeout_s:g} s (environments.tool_timeout_s)"


class Late(BaseException):
    """Raised in a tool that is over its time; `except Exception` does not catch it."""


@contextlib.contextmanager
def interrupted_after(limit_s: float) -> Iterator[None]:
    """Raises Late in the code inside once the time is over (0: never); only a main thread can be interrupted."""
    if not limit_s or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
