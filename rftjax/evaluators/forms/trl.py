"""TRL's reward functions: `reward(prompts, completions, **columns)` returns a list of float or None.

As in TRL, everything is passed by name: the columns are the row's other fields, one value a completion; rows with
`messages` give lists of messages, rows with a plain `prompt` give texts; None says that the function does not score a
sample. A function gets the samples of one group, where TRL passes those of several.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from rftjax.evaluators.forms.form import GROUP, PASS, Form, accepts, is_coroutine, numeric
from rftjax.types import Message, Score, Trajectory

_MARKS = {"completions", "completion_ids"}


def matches(function: Any) -> bool:
    """Says whether a function takes completions by TRL's names."""
    return callable(function) and bool(_MARKS & set(accepts(function)[0]))


def form(reward: Callable[..., Any]) -> Form:
    """Returns the form of a reward function; it is separable, since most of them look at each sample alone."""
    names, any_name = accepts(reward)

    def arguments(trajectories: Sequence[Trajectory]) -> tuple[dict[str, Any], _Logs]:
        logs = _Logs(len(trajectories))
        columns = {name for one in trajectories for name in one.task.data}
        given = {name: [one.task.data.get(name) for one in trajectories] for name in columns}
        step = max(version for one in trajectories for version in _versions(one))
        given |= {
            "prompts": [_prompt(one) for one in trajectories],
            "completions": [_completion(one) for one in trajectories],
            "completion_ids": [completion_ids(one) for one in trajectories],
            "trainer_state": types.SimpleNamespace(global_step=step, log_history=[]),
            "log_extra": logs.extra,
            "log_metric": logs.metric,
        }
        return given if any_name else {name: given[name] for name in names if name in given}, logs

    def rate(trajectories: Sequence[Trajectory]) -> Any:
        given, logs = arguments(trajectories)
        return logs.with_metrics(reward(**given))

    async def rate_async(trajectories: Sequence[Trajectory]) -> Any:
        given, logs = arguments(trajectories)
        return logs.with_metrics(await reward(**given))

    concurrent = is_coroutine(reward)
    return Form("TRL", rate_async if concurrent else rate, GROUP, concurrent, separable=True)


class _Logs:
    """What a reward function logs in a call, recorded as metrics of its samples."""

    def __init__(self, count: int) -> None:
        self._each: list[dict[str, float]] = [{} for _ in range(count)]

    def metric(self, name: str, value: Any) -> None:
        for each in self._each:
            each |= numeric({name: value})

    def extra(self, column: str, values: Any) -> None:
        for each, value in zip(self._each, values, strict=False):
            each |= numeric({column: value})

    def with_metrics(self, results: Any) -> Any:
        """Returns the rewards, None as PASS, with what was logged."""
        if not isinstance(results, (list, tuple)) or len(results) != len(self._each):
            return results  # what is wrong with it is said where it is looked at
        return [
            PASS if result is None else Score(result, metrics=metrics) if metrics else result
            for result, metrics in zip(results, self._each, strict=True)
        ]


def completion_ids(trajectory: Trajectory) -> list[int]:
    """Returns the tokens behind the prompt, those of tools and environments between two turns included."""
    found: list[int] = []
    for sequence in trajectory.sequences:
        first = sequence.sampled.index(True) if True in sequence.sampled else len(sequence.tokens)
        found += sequence.tokens[first:]
    return found


def _versions(trajectory: Trajectory) -> list[int]:
    return [0, *(version for one in trajectory.sequences for version in one.policy_version)]


def _prompt(trajectory: Trajectory) -> str | list[Message]:
    return trajectory.task.messages if trajectory.task.prompt is None else trajectory.task.prompt


def _completion(trajectory: Trajectory) -> str | list[Message]:
    if trajectory.task.prompt is not None:
        return trajectory.completion
    return trajectory.messages[len(trajectory.task.messages) :]
