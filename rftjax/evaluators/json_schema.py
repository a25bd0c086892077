"""Reward 1.0 for one JSON value that follows `schema`, by the package jsonschema, an optional extra of this project."""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Checks the whole completion against the row's `schema` (an object or its JSON text, of any draft that it names).

    Parts: `format` is 1.0 for JSON, `schema` for a value that follows the schema; the reason names the first place that
    does not. A reference to another address is not followed.
    """
    given = task.data.get("schema")
    text = given if isinstance(given, str) else json.dumps(given, sort_keys=True)
    try:
        validator = _validator(text)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"task {task.id!r}: field 'schema' is {str(given)[:200]!r}, which is no JSON Schema: {error}"
        ) from None
    try:
        value = json.loads(trajectory.answer, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        return Score(0.0, {"format": 0.0, "schema": 0.0}, reason=f"not JSON: {error}"[:200])
    first = next(validator.iter_errors(value), None)
    if first is None:
        return Score(1.0, {"format": 1.0, "schema": 1.0})
    reason = f"{first.json_path}: {first.message}"[:200]
    return Score(0.0, {"format": 1.0, "schema": 0.0}, reason=reason)


@functools.lru_cache(1024)
def _validator(text: str) -> Any:
    try:
        package = importlib.import_module("jsonschema")
        registry = importlib.import_module("referencing").Registry()  # fetches nothing
    except ImportError as error:
        raise RuntimeError(
            "evaluator='rftjax.evaluators.json_schema:evaluate' needs the package jsonschema: "
            f"pip install 'rftjax[evaluators]' ({error})"
        ) from error
    schema = json.loads(text)
    if not isinstance(schema, (dict, bool)):
        raise ValueError("it must be an object")
    kind = package.validators.validator_for(schema, default=package.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except package.SchemaError as error:
        raise ValueError(error.message) from None
    return kind(schema, registry=registry)


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
