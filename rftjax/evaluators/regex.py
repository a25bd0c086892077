"""Reward 1.0 for a completion in which the regular expression `pattern` matches."""

from __future__ import annotations

import re

from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    r"""Searches for the row's `pattern` (anchor it with \A and \Z to match the whole completion).

    Where the row has an `answer` too, the first group of the last match must equal it (the whole
    match where the pattern has no group), outer white space aside; the part `format` then says
    whether the pattern matched.
    """
    pattern = task.data.get("pattern")
    if not isinstance(pattern, str):
        raise ValueError(f"task {task.id!r}: field 'pattern' is {pattern!r}; it must be a text")
    try:
        matches = list(re.finditer(pattern, trajectory.completion))
    except re.error as error:
        raise ValueError(
            f"task {task.id!r}: field 'pattern' is {pattern!r}, not a regular expression: {error}"
        ) from error
    parts = {"format": float(bool(matches))}
    answer = task.data.get("answer")
    if not matches or answer is None:
        return Score(parts["format"], parts)
    last = matches[-1]
    got = last.group(1 if last.re.groups else 0) or ""
    return Score(float(got.strip() == str(answer).strip()), parts)
