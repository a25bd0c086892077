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
import re
import typing
from collections.abc import Callable, Generator, Hashable
from typing import Any

from rftjax.errors import UserError
from rftjax.types import Message, Task, Turn
from rftjax.workers import WorkerError, Workers

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
    schemas = _plain(getattr(target, "schemas", []))
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
    return Turn(messages, done, float(reward), _plain(value.info))


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
    return _plain(list(value))


def _plain(value: Any) -> Any:
    """Copies a value as what JSON knows; anything else becomes its text."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return repr(value)


_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_JSON_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}


class Tools:
    """Makes environments in which the model calls functions; made by `tools`.

    `schemas` describes the functions as chat templates want it.
    """

    def __init__(self, functions: tuple[Callable[..., Any], ...]):
        self.functions = {function.__name__: function for function in functions}
        self.schemas = [_schema(function) for function in functions]
        self.asynchronous = any(inspect.iscoroutinefunction(function) for function in functions)

    def __call__(self, task: Task, seed: int) -> Any:
        """Returns the environment of one episode."""
        return ToolEpisode(self, task)


def tools(*functions: Callable[..., Any]) -> Tools:
    """Makes an environment out of functions: a user's file says `environment = tools(search, calculator)`.

    The model calls one by `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several if it likes, and gets a
    message of role "tool" for each; what a function raises is told to the model. An answer without a call ends the
    episode. A parameter named `task` is filled with the episode's task. Functions may be coroutine functions.
    """
    return Tools(functions)


class ToolEpisode:
    """One episode with tools."""

    def __init__(self, tools: Tools, task: Task):
        self._tools, self._task = tools, task
        if tools.asynchronous:
            self.step = self._step_async

    def step(self, message: Message) -> Any:
        """Runs the calls of one assistant message in their order."""
        calls = _tool_calls(message)
        answers = [_tool_message(call, self._begin(call)) for call in calls]
        return Turn(answers, done=not calls)

    async def _step_async(self, message: Message) -> Turn:
        """Runs the calls of one assistant message all at once."""
        calls = _tool_calls(message)
        results = await asyncio.gather(*(self._run_async(call) for call in calls))
        return Turn(
            [_tool_message(call, result) for call, result in zip(calls, results, strict=True)],
            done=not calls,
        )

    async def _run_async(self, call: dict[str, Any]) -> Any:
        function = self._tools.functions.get(call.get("name", ""))
        if not inspect.iscoroutinefunction(function):
            return await asyncio.to_thread(self._begin, call)  # the others go on meanwhile
        result = self._begin(call)
        try:
            return await result if inspect.isawaitable(result) else result
        except Exception as error:
            return _told(error)

    def _begin(self, call: dict[str, Any]) -> Any:
        try:
            if "problem" in call:
                raise UserError(call["problem"])
            name, arguments = call["name"], dict(call["arguments"])
            if name not in self._tools.functions:
                known = ", ".join(self._tools.functions)
                raise UserError(f"there is no tool {name!r}; there is {known}")
            function = self._tools.functions[name]
            if "task" in _parameters(function):
                arguments["task"] = self._task
            inspect.signature(function).bind(**arguments)
            return function(**arguments)
        except Exception as error:
            return _told(error)


def _told(error: Exception) -> str:
    return f"Error: {type(error).__name__}: {error}"[:1000]


def _tool_message(call: dict[str, Any], result: Any) -> Message:
    content = result if isinstance(result, str) else json.dumps(_plain(result), ensure_ascii=False)
    message = {"role": "tool", "content": content}
    return message | {name: call[name] for name in ("name", "tool_call_id") if call.get(name)}


def _tool_calls(message: Message) -> list[dict[str, Any]]:
    """Reads the calls of a message, out of its `tool_calls` or else its text; `problem` says what is wrong with one."""
    calls = []
    for given in message.get("tool_calls") or []:
        call = _tool_call(given.get("function", given))
        calls.append(call | ({"tool_call_id": given["id"]} if given.get("id") else {}))
    if calls:
        return calls
    for text in _CALL.findall(message.get("content") or ""):
        try:
            calls.append(_tool_call(json.loads(text)))
        except ValueError as error:
            calls.append({"problem": f"the tool call is not valid JSON: {error}"})
    return calls


def _tool_call(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return {"problem": 'a tool call must be {"name": ..., "arguments": {...}}'}
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's format has JSON inside JSON
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            return {"name": value["name"], "problem": f"the arguments are not valid JSON: {error}"}
    if not isinstance(arguments, dict):
        return {"name": value["name"], "problem": "the arguments must be a JSON object"}
    return {"name": value["name"], "arguments": arguments}


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describes a function in OpenAI's format from its signature and docstring."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations that do not resolve only cost their types
        hints = {}
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "task" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = hints.get(name)
        json_type = _JSON_TYPES.get(typing.get_origin(kind) or kind) if kind else None
        properties[name] = {"type": json_type} if json_type else {}
        if parameter.default is parameter.empty:
            required.append(name)
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": inspect.getdoc(function) or "",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
