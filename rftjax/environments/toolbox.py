"""Tools: an environment in which the model calls the user's functions.

Pydantic makes the schemas for chat templates and converts JSON arguments to the annotated types. It is imported only
when tools are made, so that workers without tools start fast.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Any

from rftjax.environments.calls import Call, tool_calls
from rftjax.environments.limits import Late, Limits, interrupted_after
from rftjax.errors import UserError
from rftjax.types import Message, Task, Turn
from rftjax.workers.plain import plain

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Params):\s*$")
_ENTRY = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_FIELD = re.compile(r"^:param\s+(?:[^:]*\s)?(\w+):\s*(.*)$")


def tools(*sources: Callable[..., Any]) -> Tools:
    """Makes an environment from functions: a user's file has `environment = tools(search, calculator)`.

    The model writes one or more calls as its chat template teaches (`environments.calls` lists the formats) and gets a
    message of role "tool" for each, which holds the result or the exception. An answer without a call ends the episode.
    Arguments are converted to the annotated types. A parameter named `task` gets the episode's task. Coroutine
    functions work too. A source may also be another such environment, of an MCP server for example.
    """
    joined = [source for source in sources if isinstance(source, Tools)]
    functions = [source for source in sources if not isinstance(source, Tools)]
    functions += [tool.function for other in joined for tool in other.tools.values()]
    return Tools(functions, [server for other in joined for server in other.servers])


class Tools:
    """A factory of tool environments, made by `tools`; `schemas` describes the tools for chat templates."""

    has_state = False

    def __init__(self, functions: Sequence[Callable[..., Any]], servers: Sequence[Any] = ()):
        self.tools: dict[str, Tool] = {}
        for function in functions:
            tool = Tool(function)
            if tool.name in self.tools:
                raise UserError(
                    f"tools: two functions are named {tool.name!r}, and the model calls them by name; rename one"
                )
            self.tools[tool.name] = tool
        self.servers = list(servers)
        concurrent = bool(servers) or any(tool.asynchronous for tool in self.tools.values())
        self.asynchronous = concurrent

    @functools.cached_property
    def schemas(self) -> list[dict[str, Any]]:
        """The schemas of functions and of servers, which are started once to say theirs."""
        found = [tool.schema for tool in self.tools.values()]
        for server in self.servers:
            found += server.schemas
        names = collections.Counter(schema["function"]["name"] for schema in found)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise UserError(
                f"tools: two tools are named {', '.join(twice)}, and the model calls them by name; "
                "give one server a prefix, as in mcp(..., prefix='files_')"
            )
        return found

    def __call__(self, task: Task, seed: int) -> Any:
        """Returns the environment of one episode."""
        return ToolEpisode(self, task)


class Tool:
    """One function with its schema and the converters of its parameters."""

    def __init__(self, function: Callable[..., Any]):
        name = getattr(function, "__name__", "")
        if not callable(function) or not _NAME.fullmatch(name):
            raise UserError(
                f"tools: {function!r:.100} must be a function with a name that the model can call; "
                "define it with `def name(...)`"
            )
        self.name, self.function = name, function
        self.asynchronous = inspect.iscoroutinefunction(function)
        self.parameters = {
            name: parameter
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        summary, described = _documentation(inspect.getdoc(function) or "")
        self._converters: dict[str, Any] = {}
        properties, required = {}, []
        hints = _hints(function)
        for name, parameter in self.parameters.items():
            if name == "task":
                continue
            converter = _converter(hints[name]) if name in hints else None
            properties[name] = _json_schema(converter) if converter else {}
            if converter:
                self._converters[name] = converter
            if described.get(name):
                properties[name]["description"] = described[name]
            if parameter.default is parameter.empty:
                required.append(name)
        self.schema = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": summary,
                "parameters": {"type": "object", "properties": properties, "required": required},
            },
        }

    def bind(self, arguments: dict[str, Any], task: Task) -> inspect.BoundArguments:
        """Returns the arguments of a call, of the annotated types; raises ValueError or TypeError for wrong ones."""
        arguments = {name: self._convert(name, value) for name, value in arguments.items()}
        if "task" in self.parameters:
            arguments["task"] = task
        positional = []
        for name, parameter in self.parameters.items():
            if parameter.kind is parameter.POSITIONAL_ONLY and name in arguments:
                positional.append(arguments.pop(name))
        return inspect.signature(self.function).bind(*positional, **arguments)

    def _convert(self, name: str, value: Any) -> Any:
        converter = self._converters.get(name)
        if converter is None:
            return value
        try:
            return converter.validate_python(value)
        except ValueError as error:
            if isinstance(value, str):  # models write "2" for 2, and lists as text
                with contextlib.suppress(ValueError):
                    return converter.validate_json(value)
            problems = [_problem(name, problem) for problem in getattr(error, "errors", list)()]
            raise ValueError("; ".join(problems[:3]) or f"{name}: {error}") from None


class ToolEpisode:
    """One episode with tools."""

    limits = Limits()

    def __init__(self, tools: Tools, task: Task):
        self._tools, self._task, self._servers = tools.tools, task, tools.servers
        self._remote: dict[str, Any] = {}  # the open session of each tool of a server
        self._sessions: list[Any] = []
        if tools.asynchronous:
            self.step = self._step_async
        if tools.servers:
            self.reset, self.close = self._reset_async, self._close_async

    async def _reset_async(self) -> None:
        """Opens a session of every server."""
        for server in self._servers:
            session = await server.open()
            self._sessions.append(session)
            self._remote |= dict.fromkeys(server.tools, session)

    async def _close_async(self) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions))

    def step(self, message: Message) -> Any:
        """Runs the calls of one assistant message in their order."""
        calls = self._calls(message)
        answers = [_tool_message(call, self._run(call)) for call in calls]
        return Turn(answers, done=not calls)

    async def _step_async(self, message: Message) -> Turn:
        """Runs the calls of one assistant message concurrently."""
        calls = self._calls(message)
        results = await asyncio.gather(*(self._run_in_time(call) for call in calls))
        return Turn(
            [_tool_message(call, result) for call, result in zip(calls, results, strict=True)],
            done=not calls,
        )

    def _calls(self, message: Message) -> list[Call]:
        """Returns the calls of a message; those beyond the limit have a problem in place of arguments."""
        return self.limits.first(tool_calls(message, self._names()))

    def _names(self) -> list[str]:
        return [*self._tools, *self._remote]

    def _run(self, call: Call) -> Any:
        try:
            with interrupted_after(self.limits.tool_timeout_s):
                return self._begin(call)
        except Late:
            return _told(TimeoutError(self.limits.late))

    async def _run_in_time(self, call: Call) -> Any:
        work = asyncio.ensure_future(self._run_async(call))
        try:
            done, _ = await asyncio.wait({work}, timeout=self.limits.tool_timeout_s or None)
            if done:
                return work.result()
        finally:
            work.cancel()  # also with the step; not waited for: it may ignore that
        return _told(TimeoutError(self.limits.late))

    async def _run_async(self, call: Call) -> Any:
        session = self._remote.get(call.get("name", ""))
        if session is not None and "problem" not in call:
            return await session.call(call["name"], call["arguments"])
        tool = self._tools.get(call.get("name", ""))
        if tool is None or not tool.asynchronous:
            return await asyncio.to_thread(self._begin, call)  # does not block the other calls
        result = self._begin(call)
        try:
            return await result if inspect.isawaitable(result) else result
        except Exception as error:
            return _told(error)

    def _begin(self, call: Call) -> Any:
        try:
            if "problem" in call:
                raise UserError(call["problem"])
            if call["name"] not in self._tools:
                known = ", ".join(self._names())
                raise UserError(f"there is no tool {call['name']!r}; there is {known}")
            tool = self._tools[call["name"]]
            bound = tool.bind(call["arguments"], self._task)
            return tool.function(*bound.args, **bound.kwargs)
        except Exception as error:
            return _told(error)


def _told(error: Exception) -> str:
    # UserError is a ValueError of this package; models know the name ValueError.
    name = "ValueError" if isinstance(error, UserError) else type(error).__name__
    return f"Error: {name}: {error}"[:1000]


def _tool_message(call: dict[str, Any], result: Any) -> Message:
    content = result if isinstance(result, str) else json.dumps(plain(result), ensure_ascii=False)
    message = {"role": "tool", "content": content}
    return message | {name: call[name] for name in ("name", "tool_call_id") if call.get(name)}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # without resolvable annotations, arguments are not converted
        return {}


def _converter(kind: Any) -> Any:
    """Returns Pydantic's adapter for a type, None for an unsupported type."""
    import pydantic

    config = pydantic.ConfigDict(coerce_numbers_to_str=True)
    try:
        try:
            return pydantic.TypeAdapter(kind, config=config)
        except pydantic.PydanticUserError:  # a model or dataclass has a configuration of its own
            return pydantic.TypeAdapter(kind)
    # An annotation may run any code of its own; its arguments are then not converted.
    except Exception:
        return None


def _json_schema(converter: Any) -> dict[str, Any]:
    try:
        schema = converter.json_schema()
    except Exception:  # a type without a JSON schema
        return {}
    return inlined(schema)


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a JSON schema as chat templates need it: without references, titles and defaults."""
    return _inlined(schema, schema.get("$defs", {}), ())


def _inlined(schema: Any, definitions: dict[str, Any], outer: tuple[str, ...]) -> Any:
    if isinstance(schema, list):
        return [_inlined(part, definitions, outer) for part in schema]
    if not isinstance(schema, dict):
        return schema
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    if name:
        if name in outer or name not in definitions:  # a recursive type
            return {"type": "object"}
        return _inlined(definitions[name], definitions, (*outer, name))
    inlined: dict[str, Any] = {}
    for key, part in schema.items():
        if key == "properties":  # its keys are names, and "title" may be one
            inlined[key] = {name: _inlined(kind, definitions, outer) for name, kind in part.items()}
        elif key in ("enum", "const", "required", "examples"):
            inlined[key] = part
        elif key not in ("$defs", "title", "default"):
            inlined[key] = _inlined(part, definitions, outer)
    return inlined


def _problem(name: str, problem: dict[str, Any]) -> str:
    place = "".join(f"[{part!r}]" for part in problem["loc"])
    return f"{name}{place}: {problem['msg']}, not {problem['input']!r:.100}"


def _documentation(text: str) -> tuple[str, dict[str, str]]:
    """Splits a docstring, in Google or Sphinx style, into the function's description and those of its parameters."""
    kept: list[str] = []
    described: dict[str, str] = {}
    inside, current, margin = False, "", 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        field, entry = _FIELD.match(line), _ENTRY.match(line.strip())
        if field:
            current, inside, margin = field[1], False, indent
            described[current] = field[2]
        elif _SECTION.match(line):
            inside, current, margin = True, "", 0
        elif inside and entry and indent and (not current or indent <= margin):
            current, margin = entry[1], indent
            described[current] = entry[2]
        elif current and line.strip() and indent > margin:
            described[current] += " " + line.strip()
        elif inside and not line.strip():
            continue
        else:
            inside, current = False, ""
            if not re.match(r"^:(type|rtype|return|returns|raises)\b", line):
                kept.append(line)
    summary = re.sub(r"\n{3,}", "\n\n", textwrap.dedent("\n".join(kept))).strip()
    return summary, {name: " ".join(said.split()) for name, said in described.items()}
