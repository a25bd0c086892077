"""What every form is turned into, and how its results become scores."""

from __future__ import annotations

import dataclasses
import decimal
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from rftjax.types import Score, Trajectory
from rftjax.workers.plain import FLOAT32_MAX, scalar

# What one call of an evaluator gets: a sample, the samples of a draw, or all that are scored together.
SAMPLE, GROUP, ALL = SCOPES = ("sample", "group", "all")

Rate = Callable[[Sequence[Trajectory]], Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """An evaluator: `rate` gets the trajectories of a call and returns a list of results, or an awaitable of one.

    `kind` names the form. With a `separable` one a call that failed may be repeated for each sample alone.
    """

    kind: str
    rate: Rate
    scope: str = SAMPLE
    concurrent: bool = False  # `rate` is a coroutine function: many calls at once
    separable: bool = False


class Pass:
    """The result of an evaluator that does not score a sample; a sum leaves it out."""


PASS = Pass()


def scores(results: Any, count: int) -> list[Score]:
    """Returns the results of a call as scores; raises ValueError for another number of them than `count`.

    A result that is no score makes its own sample invalid; in a call with one sample it raises ValueError.
    """
    if not isinstance(results, (list, tuple)) and not hasattr(results, "tolist"):
        raise ValueError(
            f"the evaluator must return a list of {count} results, not {type(results).__name__}"
        )
    results = list(results)
    if len(results) != count:
        raise ValueError(
            f"the evaluator returned {len(results)} results for {count} samples; return one a sample, in their order"
        )
    if count == 1:
        return [as_score(results[0])]
    found = []
    for result in results:
        try:
            found.append(as_score(result))
        except ValueError as error:
            found.append(invalid(f"ValueError: {error}"))
    return found


def accepts(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Returns the parameters that can be given by name, and whether the function takes any other name too."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return [], True
    named = [
        one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    return named, any(one.kind is one.VAR_KEYWORD for one in parameters)


def is_coroutine(function: Any) -> bool:
    """Says whether a function, or an object that is called, returns coroutines."""
    call = type(function).__call__ if callable(function) else None
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def invalid(reason: str) -> Score:
    """Returns the score of a sample that has none."""
    return Score(0.0, valid=False, reason=reason)


def as_score(value: Any) -> Score:
    """Returns an evaluator's result as a Score of plain numbers; raises ValueError for anything else."""
    if value is PASS:
        return invalid("the evaluator returned None: it does not score this sample")
    if not isinstance(value, Score):
        return Score(number(value, "the evaluator's result"))
    valid = scalar(value.valid)  # a NumPy comparison gives a NumPy bool
    if not isinstance(valid, bool) or not isinstance(value.reason, (str, type(None))):
        raise ValueError("Score.valid must be a bool and Score.reason a str")
    if not valid:
        return invalid(value.reason or "the evaluator calls it invalid")
    fields = {"parts": value.parts, "metrics": value.metrics}
    for field, found in fields.items():
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"Score.{field} must be a dict of names and numbers")
    parts, metrics = (
        {name: number(one, f"Score.{field}[{name!r}]") for name, one in found.items()}
        for field, found in fields.items()
    )
    return Score(number(value.reward, "Score.reward"), parts, True, value.reason or "", metrics)


# Advice by the type of a result that is no number.
_WAYS_OUT = {
    "NoneType": "return one on every path",
    "dict": "return Score(reward, parts={...}, metrics={...})",
    "tuple": "return Score(reward, parts={...}), or the reward alone",
    "str": "convert it with float()",
}


def number(value: Any, name: str) -> float:
    """Returns a finite number as a float; raises ValueError, which calls it `name`, for anything else."""
    given, value = value, scalar(value)
    if not isinstance(value, (numbers.Real, decimal.Decimal)):
        kind = type(given).__name__
        shape = f" of shape {tuple(given.shape)}" if hasattr(given, "shape") else ""
        way_out = f"; {_WAYS_OUT[kind]}" if kind in _WAYS_OUT else ""
        raise ValueError(f"{name} must be a number, not {kind}{shape}{way_out}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, not {found}")
    if abs(found) > FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32, not {found}")
    return found


def numeric(values: Any) -> dict[str, float]:
    """Returns the entries of a dict that are finite numbers, as metrics."""
    found = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        try:
            found[str(name)] = number(value, "")
        except ValueError:
            continue
    return found
