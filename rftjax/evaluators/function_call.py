"""Reward 1.0 for exactly the tool calls that the row wants."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rftjax.types import Score, Task, Trajectory

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Compares names and arguments with the row's `calls`, in any order; an empty list wants no call.

    A call of the row is {"name", "arguments"}, or stands in OpenAI's form under "function"; arguments are an object or
    its JSON text. Those of the model stand in the last message's `tool_calls`, in <tool_call> tags, or as the JSON of
    the whole completion. Parts: `format` is 1.0 where every call can be read, `names` for the right names.
    """
    given = task.data.get("calls")
    wanted = [_call(one) for one in given] if isinstance(given, (list, tuple)) else [None]
    if None in wanted:
        raise ValueError(
            f"task {task.id!r}: field 'calls' is {given!r}; it must be a list of objects with name and arguments"
        )
    made = [_call(one) for one in _made(trajectory)]
    found = [one for one in made if one is not None]
    right = sorted(map(_key, found)) == sorted(_key(one) for one in wanted if one)
    names = sorted(name for name, _ in found) == sorted(one[0] for one in wanted if one)
    read = len(found) == len(made)
    parts = {"format": float(read), "names": float(names and read)}
    return Score(float(right and read), parts, reason=f"{len(made)} calls, {len(wanted)} wanted")


def _made(trajectory: Trajectory) -> list[Any]:
    """Returns the model's calls, None for one that is not JSON."""
    said = [one for one in trajectory.messages if one.get("role") == "assistant"]
    if said and said[-1].get("tool_calls"):
        return list(said[-1]["tool_calls"])
    text = trajectory.answer
    if tagged := _TAGGED.findall(text):
        return [_json(one) for one in tagged]
    fenced = _FENCED.fullmatch(text.strip())
    value = _json(fenced[1] if fenced else text)
    values = value if isinstance(value, list) else [value]
    return values if values and all(map(_call, values)) else []


def _call(value: Any) -> tuple[str, Any] | None:
    """Returns name and arguments, None for anything else."""
    if not isinstance(value, Mapping):
        return None
    inner = value.get("function", value)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        return None
    arguments = inner.get("arguments", inner.get("parameters", {}))
    arguments = _json(arguments or "{}") if isinstance(arguments, str) else arguments
    return (inner["name"], arguments) if isinstance(arguments, Mapping) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _key(call: tuple[str, Any]) -> str:
    """Returns a text that is the same for equal calls: 1 and 1.0 are, 1 and true are not."""
    return json.dumps([call[0], _normal(call[1])], sort_keys=True)


def _normal(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _normal(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_normal(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
