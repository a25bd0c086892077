"""Rubrics of the package verifiers (its classic form, 0.1): an environment's, or that of what `load_environment` makes.

Reward functions get what they ask for by name: `prompt`, `completion`, `answer`, `info`, `task`, `state`, `parser` and
the row's other fields; with plural names they get lists of a whole group. Weights are the rubric's; a function of
weight 0 is a metric. The package makes a failing function a 0.0; here it costs the sample, as with every other form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rftjax.errors import UserError
from rftjax.evaluators.forms.form import GROUP, SAMPLE, Form, accepts, number
from rftjax.types import Score, Trajectory

_PLURAL = {
    "prompts": "prompt",
    "completions": "completion",
    "answers": "answer",
    "states": "state",
    "tasks": "task",
    "infos": "info",
}
Term = tuple[
    Callable[..., Any], float, Mapping[str, Any]
]  # function, weight, objects of its rubric


def rubric_of(found: Any) -> Any:
    """Returns the rubric of an environment, of a function `load_environment`, or a rubric itself; else None."""
    if getattr(found, "__name__", "") == "load_environment" and callable(found):
        found = found()
    found = getattr(found, "rubric", found)
    return found if hasattr(found, "rubrics") or {"funcs", "weights"} <= set(dir(found)) else None


def form(rubric: Any) -> Form:
    """Returns the form of a rubric, of whole groups where one of its functions takes lists."""
    terms = list(_terms(rubric))
    if not terms:
        raise UserError("evaluator: the environment's rubric has no reward functions; add one")
    scope = GROUP if any(_is_group(function) for function, _, _ in terms) else SAMPLE

    async def rate(trajectories: Sequence[Trajectory]) -> list[Score]:
        states = [_state(one) for one in trajectories]
        found = [await _values(term, states) for term in terms]
        return [_score(terms, values) for values in zip(*found, strict=True)]

    def rate_later(trajectories: Sequence[Trajectory]) -> Any:
        return rate(trajectories)

    concurrent = all(inspect.iscoroutinefunction(function) for function, _, _ in terms)
    return Form("verifiers rubric", rate if concurrent else rate_later, scope, concurrent)


def _terms(rubric: Any) -> Any:
    for one in getattr(rubric, "rubrics", None) or [rubric]:
        if one is not rubric and hasattr(one, "rubrics"):
            yield from _terms(one)
            continue
        objects = getattr(one, "class_objects", {})
        for function, weight in zip(one.funcs, one.weights, strict=True):
            yield function, float(weight), objects


def _is_group(function: Callable[..., Any]) -> bool:
    return bool(set(_PLURAL) & set(accepts(function)[0]))


async def _values(term: Term, states: Sequence[dict[str, Any]]) -> list[Any]:
    """Returns what a function says of each sample, raising what it raises."""
    function, _, objects = term
    if _is_group(function):
        lists = {many: [state.get(one) for state in states] for many, one in _PLURAL.items()}
        lists["states"] = list(states)
        results = await _called(function, lists | dict(objects))
        if len(results) != len(states):
            name = getattr(function, "__name__", "a group reward")
            raise ValueError(f"{name} returned {len(results)} results for {len(states)} samples")
        return list(results)
    given = [{**state["input"], **state, **objects, "state": state} for state in states]
    return [await _called(function, one) for one in given]


async def _called(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    names, any_name = accepts(function)
    result = function(**(given if any_name else {k: v for k, v in given.items() if k in names}))
    return await result if inspect.isawaitable(result) else result


def _state(trajectory: Trajectory) -> dict[str, Any]:
    task = trajectory.task
    completion = trajectory.messages[len(task.messages) :]
    return {
        "prompt": task.messages if task.prompt is None else task.prompt,
        "completion": completion if task.prompt is None else trajectory.completion,
        "answer": task.data.get("answer", ""),
        "info": task.data.get("info", {}),
        "task": task.data.get("task", "default"),
        "input": dict(task.data),
        "trajectory": [],
        "turn": trajectory.turns,
        "is_truncated": trajectory.truncated,
    }


def _score(terms: Sequence[Term], values: Sequence[Any]) -> Score:
    reward, parts, metrics = 0.0, {}, {}
    for (function, weight, _), value in zip(terms, values, strict=True):
        name = getattr(function, "__name__", type(function).__name__)
        found = number(value, f"the result of {name}")
        reward += weight * found
        (parts if weight else metrics)[name] = found
    return Score(reward, parts, metrics=metrics)
