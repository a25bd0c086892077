"""The decorator `evaluation_test`: it keeps its arguments beside the function, which is called with rows."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluationRow

_DEFAULTS: dict[str, Any] = {
    "completion_params": None,
    "input_messages": None,
    "input_dataset": None,
    "input_rows": None,
    "data_loaders": None,
    "rollout_processor": None,
    "rollout_processor_kwargs": None,
    "evaluation_test_kwargs": None,
    "aggregation_method": "mean",
    "passed_threshold": None,
    "num_runs": 1,
    "mode": "pointwise",
    "preprocess_fn": None,
}


def default_dataset_adapter(rows: list[dict[str, Any]]) -> list[EvaluationRow]:
    """Makes an EvaluationRow of each row, whose fields become its own."""
    return [EvaluationRow(**row) for row in rows]


def evaluation_test(**settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator; the function then takes one row (mode "pointwise") or a list of rows, and is awaited."""
    kept = _DEFAULTS | {"dataset_adapter": default_dataset_adapter} | settings
    mode = kept["mode"]
    if mode not in ("pointwise", "groupwise", "all"):
        raise ValueError(f"mode must be pointwise, groupwise or all, not {mode!r}")
    name = "row" if mode == "pointwise" else "rows"

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if name not in inspect.signature(function).parameters:
            raise ValueError(
                f"in mode {mode}, {function.__name__} must have a parameter named {name!r}"
            )

        @functools.wraps(function)
        async def called(rows: Any) -> Any:
            result = function(**{name: rows})
            return await result if inspect.isawaitable(result) else result

        vars(called)["__ep_params__"] = types.SimpleNamespace(**kept)
        vars(called)["_origin_func"] = function
        return called

    return decorate
