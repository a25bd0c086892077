"""The forms of this project: `evaluate(task, trajectory)` and `evaluate_group(task, trajectories)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rftjax.errors import UserError
from rftjax.evaluators.forms.form import GROUP, Form, accepts, is_coroutine
from rftjax.types import Trajectory


def is_group(evaluate: Callable[..., Any]) -> bool:
    """Says whether the function takes the samples of a group: its second parameter is called `trajectories`."""
    return "trajectories" in accepts(evaluate)[0]


def group(evaluate: Callable[..., Any]) -> Form:
    """Returns the form of a function that gets the valid samples of a draw and returns a result for each."""
    _check(evaluate, "trajectories")

    def rate(trajectories: Sequence[Trajectory]) -> Any:
        return evaluate(trajectories[0].task, list(trajectories))

    return Form("evaluate_group", _same_kind(rate, evaluate), GROUP, is_coroutine(evaluate))


def single(evaluate: Callable[..., Any]) -> Form:
    """Returns the form of a function that gets one sample and returns a number or a Score."""
    _check(evaluate, "trajectory")

    def rate(trajectories: Sequence[Trajectory]) -> Any:
        results = [evaluate(one.task, one) for one in trajectories]
        return _awaited(results) if any(map(inspect.isawaitable, results)) else results

    return Form("evaluate", _same_kind(rate, evaluate), concurrent=is_coroutine(evaluate))


def _same_kind(rate: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a coroutine function where the user's function is one, so that its calls run at once."""

    async def rate_async(trajectories: Sequence[Trajectory]) -> Any:
        return await rate(trajectories)

    return rate_async if is_coroutine(evaluate) else rate


async def _awaited(results: list[Any]) -> list[Any]:
    return [await one if inspect.isawaitable(one) else one for one in results]


def _check(evaluate: Callable[..., Any], second: str) -> None:
    try:
        names = [*inspect.signature(evaluate).bind("task", second).arguments]
    except TypeError as error:
        raise UserError(
            f"evaluator: must be callable as evaluate(task, {second}), but {error}"
        ) from None
    except ValueError:  # no signature available
        return
    if names == [second, "task"]:
        raise UserError(
            f"evaluator: is called as evaluate(task, {second}), but names its arguments the other way round"
        )
