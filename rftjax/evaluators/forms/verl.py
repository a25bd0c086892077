"""verl's reward functions: `compute_score(data_source, solution_str, ground_truth, extra_info)`.

A row has `data_source`, `reward_model` with its `ground_truth`, and `extra_info`, as in verl's Parquet files; a row
without them gives `ground_truth` or `answer` directly. The function returns a number, or a dict with `score`, whose
other numbers are recorded as metrics. The form with plural names, which gets lists, is the one of verl's batch manager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rftjax.evaluators.forms.form import GROUP, Form, accepts, is_coroutine, numeric
from rftjax.types import Score, Task, Trajectory

_ONE: tuple[str, ...] = ("data_source", "solution_str", "ground_truth", "extra_info")
_MANY: tuple[str, ...] = ("data_sources", "solution_strs", "ground_truths", "extra_infos")


def matches(function: Any) -> bool:
    """Says whether a function takes a solution by verl's names."""
    return callable(function) and bool({_ONE[1], _MANY[1]} & set(accepts(function)[0]))


def form(compute_score: Callable[..., Any]) -> Form:
    """Returns the form of a `compute_score`, of one sample or of lists."""
    names, any_name = accepts(compute_score)
    many = _MANY[1] in names

    def arguments(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        rows = [_row(one) for one in trajectories]
        columns = [list(column) for column in zip(*rows, strict=True)]
        given = (
            dict(zip(_MANY, columns, strict=True))
            if many
            else dict(zip(_ONE, rows[0], strict=True))
        )
        return given if any_name else {name: given[name] for name in names if name in given}

    def results(value: Any) -> list[Any]:
        return [_result(one) for one in value] if many else [_result(value)]

    def rate(trajectories: Sequence[Trajectory]) -> list[Any]:
        return results(compute_score(**arguments(trajectories)))

    async def rate_async(trajectories: Sequence[Trajectory]) -> list[Any]:
        return results(await compute_score(**arguments(trajectories)))

    concurrent = is_coroutine(compute_score)
    return (
        Form("verl", rate_async if concurrent else rate, GROUP, concurrent, separable=True)
        if many
        else Form("verl", rate_async if concurrent else rate, concurrent=concurrent)
    )


def _row(trajectory: Trajectory) -> tuple[Any, str, Any, dict[str, Any]]:
    task = trajectory.task
    extra = task.data.get("extra_info")
    info = dict(extra) if isinstance(extra, Mapping) else {}
    info |= {"num_turns": len(trajectory.messages), "rollout_reward_scores": {}}
    return task.data.get("data_source", ""), _solution(trajectory), _truth(task), info


def _solution(trajectory: Trajectory) -> str:
    """Returns the text behind the prompt, that of tools between two turns included."""
    if trajectory.turns < 2:
        return trajectory.completion
    said = trajectory.messages[len(trajectory.task.messages) :]
    return "\n".join(str(message.get("content") or "") for message in said)


def _truth(task: Task) -> Any:
    model = task.data.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        return model["ground_truth"]
    for name in ("ground_truth", "answer"):
        if name in task.data:
            return task.data[name]
    raise ValueError(
        f"task {task.id!r}: a verl evaluator needs reward_model.ground_truth, ground_truth or answer in the row; it has"
        f" {', '.join(task.data) or 'no further fields'}"
    )


def _result(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "score" not in value:
        raise ValueError(
            f"compute_score returned a dict without 'score': {', '.join(map(str, value))}"
        )
    return Score(value["score"], metrics=numeric({k: v for k, v in value.items() if k != "score"}))
