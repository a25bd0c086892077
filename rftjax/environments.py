"""What answers the model between its turns: nothing, a function, a stateful environment, or tools.

User code runs in worker processes. A stateful episode lives in one process from start to end. Where that process is
stopped, because one episode in it hung or crashed, the other episodes in it are lost as well and say so; more
processes, or asynchronous methods (whose overruns are cancelled without stopping the process), lessen that.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import itertools
import json
import logging
import math
from collections.abc import Callable, Generator, Hashable
from typing import Any

from rftjax.errors import UserError
from rftjax.plain import plain
from rftjax.toolbox import ToolEpisode, Tools, tools
from rftjax.types import Message, Task, Turn
from rftjax.workers import WorkerError, Workers

__all__ = ["Environments", "ToolEpisode", "Tools", "as_messages", "as_turn", "hosting", "tools"]
_log = logging.getLogger(__name__)


class Environments:
    """Episodes of `environment` ("module:name" or "file.py:name"), each under a key that the caller chooses.

    An empty `environment` ends every episode after the first answer, without a process. Futures raise WorkerError
    where an episode fails: user code raised, returned something else than messages, overran `timeout_s` seconds a call,
    or its process died. `tools` holds the schemas that a chat template wants, for an environment that has `schemas`.
    Construction raises ValueError where the environment does not import; construct it before JAX is used.
    """

    def __init__(self, environment: str, *, workers: int = 2, timeout_s: float = 60.0):
        self.tools: list[dict[str, Any]] = []
        self._workers: Workers | None = None
        self._stateful = False
        self._open: dict[Hashable, tuple[Task, str]] = {}
        self._numbers = itertools.count()
        if environment:
            self._workers = Workers(
                environment,
                workers,
                timeout_s,
                wrapper="rftjax.environments:hosting",
                field="environment",
                limit_field="environments.timeout_s",
            )
            about = json.loads(self._workers.about)
            self._stateful, self.tools = about["stateful"], about["tools"]

    def start(
        self, key: Hashable, task: Task, seed: int
    ) -> concurrent.futures.Future[list[Message]]:
        """Begins an episode; the future gives the messages that it opens with, often none.

        Whether it fails or not, `close_episode` lets go of it.
        """
        assert key not in self._open, f"episode {key!r} is open already"
        session = f"episode {next(self._numbers)}" if self._stateful else ""
        self._open[key] = (task, session)
        if self._workers is None or not self._stateful:
            return _done([])
        return self._workers.submit("start", session, task, seed, session=session)

    def step(self, key: Hashable, messages: list[Message]) -> concurrent.futures.Future[Turn]:
        """Hands over the conversation so far, whose last message is the model's; the future gives the answer."""
        assert messages and messages[-1].get("role") == "assistant", "the model's message is last"
        task, session = self._open[key]
        if self._workers is None:
            return _done(Turn(done=True))
        if not self._stateful:
            return self._workers.submit("reply", "", task, messages)
        return self._workers.submit("step", session, messages[-1], session=session)

    def close_episode(self, key: Hashable) -> None:
        """Ends an episode, without waiting for it; an unknown key is no fault."""
        _, session = self._open.pop(key, (None, ""))
        if self._workers is not None and session:
            future = self._workers.submit("close", session, session=session)
            future.add_done_callback(_report_failed_close)
            self._workers.end_session(session)

    def close(self) -> None:
        """Ends the worker processes, and with them every episode."""
        self._open.clear()
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _done(value: Any) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(value)
    return future


def _report_failed_close(future: concurrent.futures.Future[Any]) -> None:
    error = future.exception()
    if isinstance(error, WorkerError) and error.details:
        _log.warning("an environment's close() failed: %s", error)


# The rest runs in the worker processes.


def hosting(target: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps user code as a function of (operation, episode, ...), asynchronous if the user's code is.

    A class, and a function or object called with (task, seed), makes stateful environments; any other function
    answers (task, messages). A factory whose environments have coroutine methods says so by `asynchronous = True`.
    """
    stateful = inspect.isclass(target) or {"task", "seed"} <= set(_parameters(target))
    _check_signature(target, stateful)
    names = ("reset", "step") if inspect.isclass(target) else ("__call__",)
    called = [target, *(getattr(target, name, None) for name in names)]
    concurrent_calls = getattr(target, "asynchronous", False) or any(
        map(inspect.iscoroutinefunction, called)
    )
    episodes: dict[str, Any] = {}
    operations = functools.partial(_operate, target, episodes)
    if concurrent_calls:

        async def handle_async(*args: Any) -> Any:
            return await _drive_async(operations(*args))

        handler: Any = handle_async
    else:
        loops: list[asyncio.AbstractEventLoop] = []

        def handle(*args: Any) -> Any:
            return _drive(operations(*args), loops)

        handler = handle
    schemas = plain(getattr(target, "schemas", []))
    handler.about = json.dumps({"stateful": stateful, "tools": schemas})
    return handler


def _parameters(target: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return []


def _check_signature(target: Any, stateful: bool) -> None:
    wanted = ("task", "seed") if stateful else ("task", "messages")
    try:
        inspect.signature(target).bind(*wanted)
    except TypeError as error:
        raise UserError(
            f"environment: a {'class or factory' if stateful else 'function'} must be callable with "
            f"({', '.join(wanted)}), but {error}"
        ) from None
    except ValueError:  # no signature to be had
        return
    if inspect.isclass(target) and not callable(getattr(target, "step", None)):
        raise UserError(f"environment: class {target.__name__} must have a method step(message)")


def _operate(
    target: Callable[..., Any], episodes: dict[str, Any], operation: str, episode: str, *args: Any
) -> Generator[Any, Any, Any]:
    """Does one operation; yields what user code returns and is sent it back, awaited where it must be."""
    if operation == "reply":
        return as_turn((yield target(*args)), "the reply")
    if operation == "start":
        environment = yield target(*args)
        episodes[episode] = environment
        reset = getattr(environment, "reset", None)
        return as_messages((yield reset()), "reset()") if reset else []
    if operation == "step":
        return as_turn((yield episodes[episode].step(*args)), "step(message)")
    assert operation == "close"
    close = getattr(episodes.pop(episode, None), "close", None)
    if close is not None:
        yield close()
    return None


async def _drive_async(steps: Generator[Any, Any, Any]) -> Any:
    value = None
    while True:
        try:
            value = steps.send(value)
        except StopIteration as end:
            return end.value
        if inspect.isawaitable(value):
            value = await value


def _drive(steps: Generator[Any, Any, Any], loops: list[asyncio.AbstractEventLoop]) -> Any:
    async def wait(value: Any) -> Any:
        return await value

    value = None
    while True:
        try:
            value = steps.send(value)
        except StopIteration as end:
            return end.value
        if inspect.isawaitable(value):
            # One loop for all calls, so that what an environment keeps open stays usable.
            if not loops:
                loops.append(asyncio.new_event_loop())
            value = loops[0].run_until_complete(wait(value))


def as_turn(value: Any, name: str) -> Turn:
    """Returns an environment's answer as a Turn: None ends the episode, a str is one user message."""
    if value is None:
        return Turn(done=True)
    if not isinstance(value, Turn):
        value = Turn(value)
    messages = as_messages(value.messages, f"{name}'s messages")
    done, reward = _scalar(value.done), _scalar(value.reward)
    if not isinstance(done, bool):
        raise UserError(f"{name}: Turn.done must be a bool, not {type(done).__name__}")
    if not isinstance(reward, (bool, int, float)) or not math.isfinite(reward):
        raise UserError(f"{name}: Turn.reward must be a finite number, not {reward!r:.100}")
    if not isinstance(value.info, dict):
        raise UserError(f"{name}: Turn.info must be a dict, not {type(value.info).__name__}")
    if not messages and not done:
        raise UserError(f"{name} has no message and does not end the episode (None ends it)")
    return Turn(messages, done, float(reward), plain(value.info))


def _scalar(value: Any) -> Any:
    # A scalar of NumPy, JAX or PyTorch as Python's own.
    return value.item() if getattr(value, "ndim", None) == 0 else value


def as_messages(value: Any, name: str) -> list[Message]:
    """Returns plain messages; None is none of them, a str one user message. Raises ValueError for others."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} must be a list of messages, not {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict):
            raise UserError(f"{name} must hold dicts, not {type(message).__name__}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise UserError(f"{name}: a message needs a str as {field!r}: {message!r:.200}")
    return plain(list(value))
