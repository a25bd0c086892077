"""Runs in a worker process: turns the user's environment into one function of (operation, episode, ...).

Worker processes import this module: standard library and records only.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
from collections.abc import Callable, Generator
from typing import Any

from rftjax.environments.forms import load, nemo_gym
from rftjax.environments.limits import Limits
from rftjax.environments.toolbox import ToolEpisode
from rftjax.errors import UserError
from rftjax.types import Message, Turn
from rftjax.workers.plain import FLOAT32_MAX, checked, plain, scalar

MAX_INFO_BYTES = 2**18  # of one turn's info, or of an end state, as JSON


def environment_handler(name: str, field: str) -> Callable[..., Any]:
    """Loads an environment and wraps it as a function of (operation, episode, ...).

    It is a coroutine function if user code is. A class, or a function or object that takes (task, seed), makes
    stateful environments; any other function takes (task, messages) and answers. A factory of environments with
    coroutine methods sets `asynchronous = True`.
    """
    target = load.target(name, field)
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
    # A factory may make environments with a state.
    state = stateful and (not inspect.isclass(target) or callable(getattr(target, "state", None)))
    state = state and getattr(target, "has_state", True)
    handler.about = json.dumps({"stateful": stateful, "tools": schemas, "state": bool(state)})
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
    """Runs one operation; yields each result of user code and receives it back, awaited if it is awaitable."""
    if operation == "reply":
        return as_turn((yield target(*args)), "the reply")
    if operation == "start":
        task, seed, limits = args
        environment = load.episode((yield target(task, seed)), task, seed)
        if isinstance(environment, ToolEpisode | nemo_gym.Episode):
            environment.limits = Limits(**limits)
        episodes[episode] = environment
        reset = getattr(environment, "reset", None)
        return as_messages((yield reset()), "reset()") if reset else []
    if operation == "step":
        return as_turn((yield episodes[episode].step(*args)), "step(message)")
    if operation == "state":
        state = getattr(episodes[episode], "state", None)
        return checked((yield state()), "state()", MAX_INFO_BYTES) if callable(state) else None
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
            # One loop for all calls, so that connections that an environment keeps stay usable.
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
    done, reward = scalar(value.done), scalar(value.reward)
    if not isinstance(done, bool):
        raise UserError(f"{name}: Turn.done must be a bool, not {type(done).__name__}")
    if not isinstance(reward, (bool, int, float)) or not abs(reward) <= FLOAT32_MAX:
        raise UserError(f"{name}: Turn.reward must be a finite number, not {reward!r:.100}")
    if not isinstance(value.info, dict):
        raise UserError(f"{name}: Turn.info must be a dict, not {type(value.info).__name__}")
    if not messages and not done:
        raise UserError(f"{name} has no message and does not end the episode (None ends it)")
    info = checked(value.info, f"{name}: Turn.info", MAX_INFO_BYTES)
    return Turn(messages, done, float(reward), info)


def as_messages(value: Any, name: str) -> list[Message]:
    """Returns plain messages: None becomes no message, a str one user message. Raises UserError for anything else."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} must be a list of messages, not {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict):
            raise UserError(f"{name} must hold dicts, not {type(message).__name__}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise UserError(f"{name}: a message needs a str as {field!r}: {message!r:.200}")
    messages = plain(list(value))
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        shown = ascii(error.object[error.start : error.end])
        raise UserError(
            f"{name}: the text holds {shown}, half of a character, which is no valid Unicode; "
            "decode bytes with errors='replace'"
        ) from None
    return messages
