"""Reward 1.0 for a completion that contains `answer`, apart from case and amount of white space."""

from __future__ import annotations

from rftjax.types import Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> float:
    """Looks for the row's `answer`; a list of answers means that any of them is enough."""
    answer = task.data.get("answer")
    accepted = answer if isinstance(answer, (list, tuple)) else [answer]
    wanted = [_folded(str(one)) for one in accepted if one is not None]
    if not wanted or not all(wanted):
        raise ValueError(
            f"task {task.id!r}: field 'answer' is {answer!r}; contains needs a text, not empty"
        )
    text = _folded(trajectory.completion)
    return float(any(one in text for one in wanted))


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
