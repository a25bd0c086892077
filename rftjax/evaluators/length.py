"""Reward 1.0 for a completion whose number of words is within the row's bounds, less the further it is beyond them."""

from __future__ import annotations

from typing import Any

from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Falls linearly from a bound, `min_words` or `max_words`, to 0.0 at no word and at twice the most.

    The metric `words` is their number, words being what white space parts.
    """
    least, most = (_bound(task, name) for name in ("min_words", "max_words"))
    if least is None and most is None:
        raise ValueError(
            f"task {task.id!r} has neither 'min_words' nor 'max_words', one of which length needs"
        )
    if least is not None and most is not None and least > most:
        raise ValueError(f"task {task.id!r}: min_words={least} must not be above max_words={most}")
    words = len(trajectory.completion.split())
    reward = 1.0
    if least is not None and words < least:
        reward = words / least
    elif most is not None and words > most:
        reward = max(0.0, 2 - words / most) if most else 0.0
    return Score(reward, {"length": float(reward == 1.0)}, metrics={"words": float(words)})


def _bound(task: Task, name: str) -> int | None:
    value: Any = task.data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"task {task.id!r}: field {name!r} is {value!r}; it must be a number of words"
        )
    return value
