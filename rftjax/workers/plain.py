"""Plain data, that is data JSON can represent: the only kind that leaves a worker process.

Worker processes import this module: standard library only.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

from rftjax.errors import UserError

MAX_DEPTH = 100
FLOAT32_MAX = (
    2 - 2**-23
) * 2.0**127  # rewards and advantages are float32; larger ones would be infinite


def plain(value: Any, depth: int = 0) -> Any:
    """Copies a value as plain data: arrays become lists, records of dataclasses and Pydantic dicts, objects of other
    classes their repr."""
    return _copy(value, "", depth, lambda other, _: repr(other))


def scalar(value: Any) -> Any:
    """Returns a 0-d array or scalar of NumPy, JAX or PyTorch as a Python number, anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def checked(value: Any, name: str, limit_bytes: int) -> Any:
    """Copies plain data; raises UserError for an object of another class and for more than `limit_bytes` as JSON.

    Tuples, sets, NumPy arrays and scalars, enumerations, dataclasses and models of Pydantic count as plain, and keys
    become text. `name` is what the message calls it.
    """

    def refuse(other: Any, place: str) -> Any:
        raise UserError(
            f"{name}{place} must be plain data (numbers, text, lists, dicts), not a {type(other).__name__}; "
            "convert it, with str() for example"
        )

    copied = _copy(value, "", 0, refuse)
    size_bytes = len(json.dumps(copied))
    if size_bytes > limit_bytes:
        raise UserError(
            f"{name} takes {size_bytes} bytes as JSON, more than the {limit_bytes} allowed; "
            "keep what the evaluator needs, and write the rest to a file"
        )
    return copied


def _copy(value: Any, place: str, depth: int, other: Any) -> Any:
    if depth > MAX_DEPTH:
        raise UserError(f"a value is nested more than {MAX_DEPTH} levels deep; make it flatter")
    if isinstance(value, dict):
        return {
            str(name): _copy(part, f"{place}[{name!r:.40}]", depth + 1, other)
            for name, part in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [
            _copy(part, f"{place}[{index}]", depth + 1, other) for index, part in enumerate(value)
        ]
    if isinstance(value, enum.Enum):
        return _copy(value.value, place, depth + 1, other)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if hasattr(value, "tolist"):
        return _copy(value.tolist(), place, depth + 1, other)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        return _copy(fields, place, depth + 1, other)
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return _copy(value.model_dump(mode="json"), place, depth + 1, other)
    return other(value, place)
