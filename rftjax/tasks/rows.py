"""Checks rows and makes tasks of them; digests of values that are equal in every process."""

from __future__ import annotations

import collections
import dataclasses
import decimal
import hashlib
import json
import math
import numbers
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rftjax.types import Message, Task

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_DEPTH = 100
_SHOWN_FIELDS = 12


class Checker:
    """Makes tasks of the rows of one source; `weight` and `temperature` name the row fields for these settings."""

    def __init__(self, *, weight: str = "", temperature: str = "") -> None:
        self._names = {"weight": weight, "temperature": temperature}
        self._missing = {own: name for own, name in self._names.items() if name}
        self._ids: collections.Counter[str] = collections.Counter()
        self._fields: list[str] = []

    def task(self, row: Any) -> tuple[Task | None, list[str]]:
        """Returns the task of a row and no faults, or None and its faults as "field: rule"."""
        if not isinstance(row, dict):
            return None, [f"row: must be an object with messages or prompt, is a {_kind(row)}"]
        self._fields = self._fields or [str(name) for name in row]
        problems = [
            f"{key!r}: a field's name must be a text" for key in row if not isinstance(key, str)
        ]
        if row.get("messages") is None and row.get("prompt") is None:
            row = _of_responses(row)
        messages: Any = row.get("messages")
        prompt: Any = row.get("prompt")
        if messages is None and isinstance(prompt, (list, tuple)):  # as TRL and verl write them
            messages, prompt = prompt, None
        if messages is None and prompt is None:
            problems.append(_neither(row))
        elif messages is not None and prompt is not None:
            problems.append("prompt: stands beside messages; a row has one of the two")
        elif prompt is not None:
            problems += _prompt_problems(prompt)
        else:
            messages, found = _checked_messages(messages)
            problems += found
        own = {name: self._own(row, name, problems) for name in self._names}
        given = row.get("id")
        if isinstance(given, bool) or not isinstance(given, (str, numbers.Integral, type(None))):
            problems.append(
                f"id: must be a text or a whole number, is a {_kind(given)}; give it another name with tasks.map"
            )
        if _deeper(row, MAX_DEPTH):
            problems.append(f"row: is nested more than {MAX_DEPTH} levels deep; make it flatter")
        else:
            problems += _pickling_problems(row)
        if problems:
            return None, problems
        data = {key: value for key, value in row.items() if key not in ("messages", "prompt")}
        if messages is None:
            messages = [{"role": "user", "content": prompt}]
        name = (
            str(given) if given not in (None, "") else digest([messages, prompt is None, data])[:16]
        )
        return Task(self._unique(name), messages, data, prompt, **own), []

    def unused_field(self) -> str:
        """Returns an error text where no row has the named weight or temperature field, else ""."""
        return "; ".join(
            f"tasks.{own}={name!r}: must name a field of the rows, which have {', '.join(self._fields)}, "
            "and is in none"
            for own, name in self._missing.items()
        )

    def _own(self, row: Mapping[str, Any], own: str, problems: list[str]) -> float:
        """Reads the weight or temperature of a row; a missing or empty field gives the default."""
        default = 1.0 if own == "weight" else 0.0
        name = self._names[own]
        value = row.get(name) if name else None
        if value is None or value == "":
            return default
        self._missing.pop(own, None)
        try:
            if isinstance(value, bool) or not isinstance(
                value, (str, numbers.Real, decimal.Decimal)
            ):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            problems.append(f"{name}: must be a number for tasks.{own}, is {value!r:.80}")
            return default
        if not math.isfinite(number) or number < 0 or (own == "temperature" and number == 0):
            rule = "at least 0" if own == "weight" else "above 0"
            problems.append(f"{name}: must be finite and {rule} for tasks.{own}, is {value!r:.80}")
        return number

    def _unique(self, name: str) -> str:
        """Appends a number to an id that an earlier row has."""
        unique = name
        while unique in self._ids:
            self._ids[name] += 1
            unique = f"{name}-{self._ids[name]}"
        self._ids[unique] += 1
        return unique


def mapping_of(found: Callable[..., Any]) -> Callable[[Any], Any]:
    """Returns the mapping function, for one of Eval Protocol's tests the messages that its dataset adapter makes."""
    adapter = getattr(getattr(found, "__ep_params__", None), "dataset_adapter", None)
    if adapter is None:
        return found

    def adapted(row: Any) -> Any:
        (made,) = adapter([row])
        messages = [one.model_dump(exclude_none=True) for one in made.messages]
        return {key: value for key, value in row.items() if key != "prompt"} | {
            "messages": messages
        }

    return adapted


def mapped(mapping: Callable[[Any], Any], row: Any, name: str) -> tuple[Any, str]:
    """Applies the user's mapping function; returns the new row and a problem, "" for none."""
    try:
        value = mapping(row)
    except Exception as error:  # reported as a fault of this row
        fields = f" (the row's fields: {_fields(row)})" if isinstance(row, dict) else ""
        return None, f"map: {name} raised {type(error).__name__}: {error}{fields}"
    if value is not None and not isinstance(value, dict):
        return None, f"map: {name} returned a {type(value).__name__}; it must be a dict or None"
    return value, ""


def _of_responses(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of NeMo Gym, which holds parameters of OpenAI's Responses API, with messages and tools."""
    params = row.get("responses_create_params")
    if not isinstance(params, dict) or not params.get("input"):
        return row
    given = params["input"]
    first = [{"role": "system", "content": text}] if (text := params.get("instructions")) else []
    asked = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    names = ("name", "description", "parameters")
    tools = [
        {"type": "function", "function": {name: tool[name] for name in names if name in tool}}
        for tool in params.get("tools") or []
    ]
    return row | {"messages": [*first, *asked]} | ({"tools": tools} if tools else {})


def _fields(row: Mapping[Any, Any]) -> str:
    names = [str(name) for name in row]
    more = f" and {len(names) - _SHOWN_FIELDS} more" if len(names) > _SHOWN_FIELDS else ""
    return ", ".join(names[:_SHOWN_FIELDS]) + more if names else "none"


def _neither(row: Mapping[Any, Any]) -> str:
    return (
        f"messages: is missing, as is prompt; the row's fields are {_fields(row)}. tasks.map='file.py:name' names a "
        "function that makes a row with messages (or prompt) of it"
    )


def _prompt_problems(prompt: Any) -> list[str]:
    if not isinstance(prompt, str):
        return [f"prompt: must be a text or a list of messages, is a {_kind(prompt)}"]
    return ["prompt: must not be empty"] if not prompt else _text_problems("prompt", prompt)


def _checked_messages(messages: Any) -> tuple[list[Message], list[str]]:
    """Returns the messages as chat templates take them, and their faults."""
    if not isinstance(messages, (list, tuple)):
        way_out = "; tasks.map can parse it" if isinstance(messages, str) else ""
        return [], [f"messages: must be a list of messages, is a {_kind(messages)}{way_out}"]
    if not messages:
        return [], ["messages: must not be empty"]
    problems: list[str] = []
    checked: list[Message] = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if isinstance(message, dict):
            message = _message(message)
            problems += _message_problems(name, message)
            checked.append({"content": "", **message} if "content" not in message else message)
        else:
            problems.append(
                f"{name}: must be an object with role and content, is a {_kind(message)}"
            )
    last = f"messages[{len(messages) - 1}]"
    if not problems and checked[-1]["role"] == "assistant":
        problems.append(
            f"{last}.role: the last must not be the assistant's, for "
            "the model answers it; a reference answer goes into a field of its own"
        )
    elif not problems and not checked[-1]["content"].strip():
        problems.append(f"{last}.content: the last must not be empty")
    return checked, problems


def _message(message: Mapping[str, Any]) -> Message:
    """Drops empty fields (None, no calls, empty names) and joins the text parts of the content."""
    kept = {key: value for key, value in message.items() if value is not None}
    for key in ("tool_calls", "name", "tool_call_id"):
        if key in kept and isinstance(kept[key], (str, list, tuple)) and not kept[key]:
            del kept[key]
    calls = kept.get("tool_calls")
    if isinstance(calls, (list, tuple)):
        kept["tool_calls"] = [
            {k: v for k, v in one.items() if v is not None} if isinstance(one, dict) else one
            for one in calls
        ]
    parts = kept.get("content")
    if isinstance(parts, (list, tuple)) and all(_is_text_part(part) for part in parts):
        kept["content"] = "".join(part if isinstance(part, str) else part["text"] for part in parts)
    return kept


def _is_text_part(part: Any) -> bool:
    if isinstance(part, dict):
        return part.get("type", "text") in ("text", "input_text", "output_text") and isinstance(
            part.get("text"), str
        )
    return isinstance(part, str)


def _message_problems(name: str, message: Message) -> list[str]:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    problems = []
    if role not in ROLES:
        way_out = "" if role is not None else f" (the message's fields: {_fields(message)})"
        problems.append(f"{name}.role: must be one of {', '.join(ROLES)}, is {role!r}{way_out}")
    if calls is not None and role != "assistant":
        problems.append(f"{name}.tool_calls: only the assistant calls tools, the role is {role!r}")
    elif calls is not None and not (
        isinstance(calls, list) and all(isinstance(one, dict) for one in calls)
    ):
        problems.append(f"{name}.tool_calls: must be a list of objects")
    if isinstance(content, str):
        problems += _text_problems(f"{name}.content", content)
    elif isinstance(content, (list, tuple)):
        for index, part in enumerate(content):
            if not _is_text_part(part):
                kind = part.get("type") if isinstance(part, dict) else _kind(part)
                problems.append(
                    f"{name}.content[{index}]: must be a text part, is {kind!r}; models here read text only"
                )
    elif content is not None or not (role == "assistant" and calls):
        problems.append(f"{name}.content: must be a text, is a {_kind(content)}")
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key), (str, type(None))):
            problems.append(f"{name}.{key}: must be a text, is a {_kind(message[key])}")
    return problems


def _text_problems(name: str, text: str) -> list[str]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return [f"{name}: holds half of a surrogate pair at character {error.start}"]
    return []


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and records are nested more than `limit` levels deep."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            one
            for found in level
            if isinstance(found, (dict, list, tuple))
            for one in (found.values() if isinstance(found, dict) else found)
        ]
    return bool(level)


def _pickling_problems(row: Mapping[Any, Any]) -> list[str]:
    """Names the fields that cannot be sent to the worker processes of evaluators and environments."""
    problems = []
    for name, value in row.items():
        try:
            pickle.dumps(value)
        # A value decides itself how it is pickled, so that it may raise anything; the row is refused with what it says.
        except Exception as error:
            problems.append(
                f"{name}: cannot be sent to an evaluator, is a {_kind(value)} ({error}); write plain data"
            )
    return problems


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# ---- Digests


def digest(value: Any) -> str:
    """Returns a hash that is equal for equal values in every process, whatever the order of keys."""
    return hashlib.sha256(_canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any, inside: tuple[int, ...] = ()) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 10_000:
        return hex(value)  # Python refuses to write so many decimal digits
    if value is None or isinstance(value, (str, int, float)):
        return json.dumps(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"bytes:{hashlib.sha256(value).hexdigest()}"
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))

    def of(one: Any) -> str:
        return _canonical(one, inside)

    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{of(key)}:{of(one)}" for key, one in value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(of, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(map(of, value))) + "}"
    if isinstance(value, (np.ndarray, np.generic)):
        return of(value.tolist())
    return _canonical_object(value, of)


def _canonical_object(value: Any, of: Callable[[Any], str]) -> str:
    """Text of an object from its contents, because its repr may hold an address that differs between processes."""
    name = type(value).__qualname__
    images = sys.modules.get("PIL.Image")
    if images is not None and isinstance(value, images.Image):
        return f"image:{value.mode}{value.size}{of(value.tobytes())}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return name + of({one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
    text = repr(value)
    if type(value).__repr__ is not object.__repr__ and not re.search(r"\bat 0x[0-9a-fA-F]+", text):
        return text
    names: Sequence[str] = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    return name + of({one: getattr(value, one) for one in names if hasattr(value, one)})
