"""Eval Protocol's evaluators: a function under `@evaluation_test`, as its file has it.

The decorated function is called with rows, made by its own dataset adapter of what the task's row holds, with the
sampled conversation as their messages: one row ("pointwise"), those of a draw ("groupwise"), or all that are scored
together ("all"). The classes are those of the package `eval-protocol`, or of its stand-in where it is not installed.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

from rftjax.evaluators.forms.form import ALL, GROUP, SAMPLE, Form, invalid
from rftjax.types import Score, Trajectory

_SCOPES = {"pointwise": SAMPLE, "groupwise": GROUP, "all": ALL}


def matches(found: Any) -> bool:
    """Says whether a function was decorated."""
    return callable(found) and hasattr(found, "__ep_params__")


def form(test: Any) -> Form:
    """Returns the form of a decorated function; with a plain function one call runs at a time."""
    settings = test.__ep_params__
    scope = _SCOPES[str(settings.mode)]
    function = getattr(test, "_origin_func", test)
    extra = _first(settings.evaluation_test_kwargs)

    async def rate(trajectories: Sequence[Trajectory]) -> list[Any]:
        rows = [_row(one, settings) for one in trajectories]
        given = rows[0] if scope == SAMPLE else rows
        called = function(given, **extra) if extra else test(given)
        returned = await called if inspect.isawaitable(called) else called
        return _scores([returned] if scope == SAMPLE else returned, rows)

    def rate_later(trajectories: Sequence[Trajectory]) -> Any:
        return rate(trajectories)

    concurrent = inspect.iscoroutinefunction(function)
    kind = f"Eval Protocol, {settings.mode}"
    return Form(kind, rate if concurrent else rate_later, scope, concurrent)


def _first(sets: Any) -> dict[str, Any]:
    """Returns the first set of arguments that a test is to be called with."""
    return dict((sets or [None])[0] or {})


def _row(trajectory: Trajectory, settings: Any) -> Any:
    task = trajectory.task
    models = importlib.import_module("eval_protocol.models")
    rows = settings.dataset_adapter([{**task.data, "messages": task.messages}])
    rows = settings.preprocess_fn(rows) if settings.preprocess_fn else rows
    if not rows:
        raise ValueError(f"task {task.id!r}: the dataset adapter made no row of it")
    row = rows[0]
    row.messages = [models.Message.model_validate(dict(one)) for one in trajectory.messages]
    data = row.input_metadata
    data.row_id = data.row_id or task.id
    data.completion_params = data.completion_params or _first(settings.completion_params)
    data.session_data = {**(data.session_data or {}), "mode": settings.mode}
    row.execution_metadata.rollout_id = f"{trajectory.draw}_{trajectory.sample}"
    row.execution_metadata.finish_reason = trajectory.finish_reason
    row.rollout_status = models.Status.rollout_finished()
    return row


def _scores(returned: Any, rows: Sequence[Any]) -> list[Any]:
    """Returns a score for each of the rows that were given, whatever the order of those that came back."""
    if not isinstance(returned, list) or not all(
        hasattr(one, "evaluation_result") for one in returned
    ):
        raise ValueError(
            "an evaluation test must return the rows that it was given, each with its evaluation_result"
        )
    found = {one.execution_metadata.rollout_id: one.evaluation_result for one in returned}
    return [_score(found.get(row.execution_metadata.rollout_id)) for row in rows]


def _score(result: Any) -> Score:
    if result is None:
        return invalid("the evaluation test set no evaluation_result for this row")
    if not result.is_score_valid:
        return invalid(result.reason or result.error or "its score is not valid")
    parts = {name: one.score for name, one in result.metrics.items()}
    steps = [float(one.base_reward) for one in result.step_outputs or ()]
    metrics = {"step_rewards": math.fsum(steps)} if steps else {}
    return Score(result.score, parts, reason=result.reason or "", metrics=metrics)
