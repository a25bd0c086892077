"""Reward 1.0 for a completion equal to `answer`, apart from the amount of white space."""

from __future__ import annotations

from rftjax.types import Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> float:
    """Compares with the row's `answer`, or with each of a list of answers."""
    answer = task.data.get("answer")
    if answer is None or answer in ([], ()):
        raise ValueError(f"task {task.id!r} has no field 'answer', which exact_match compares with")
    accepted = answer if isinstance(answer, (list, tuple)) else [answer]
    return float(_squeezed(trajectory.answer) in [_squeezed(str(one)) for one in accepted])


def _squeezed(text: str) -> str:
    return " ".join(text.split())
