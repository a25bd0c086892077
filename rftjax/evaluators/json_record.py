"""Reward 1.0 for a completion that is exactly one JSON object equal to `record`."""

from __future__ import annotations

import json
from typing import Any

from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Rewards strict equality with the row's `record` (an object, or its JSON text).

    Parts: `format` is 1.0 for one JSON object and nothing else, `keys` is 1.0 for the right set of
    keys, `fields` is the share of right fields among those of either record.
    """
    wanted = task.data.get("record")
    if isinstance(wanted, str):
        wanted = _parsed(wanted)
    if not isinstance(wanted, dict):
        raise ValueError(
            f"task {task.id!r}: field 'record' is {task.data.get('record')!r}; "
            "it must be a JSON object"
        )
    got = _parsed(trajectory.answer)
    if not isinstance(got, dict):
        return Score(0.0, {"format": 0.0, "keys": 0.0, "fields": 0.0}, reason="not one JSON object")
    names = wanted.keys() | got.keys()
    right = sum(k in wanted and k in got and _same(wanted[k], got[k]) for k in names)
    parts = {
        "format": 1.0,
        "keys": float(wanted.keys() == got.keys()),
        "fields": right / len(names) if names else 1.0,
    }
    return Score(float(right == len(names)), parts)


def _parsed(text: str) -> Any:
    """Value of a JSON text; None for what is not JSON, repeats a key, or holds NaN or infinity."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is repeated")
    return fields


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
