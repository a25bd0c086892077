"""Reward 1.0 for a completion that contains `answer` as words, apart from case and amount of white space.

"1420", "42nd" and "4.42" do not contain "42". For final answers use `number`, `math` or `choice`: a text that contains
the answer may contain others too.
"""

from __future__ import annotations

import re

from rftjax.types import Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> float:
    """Looks for the row's `answer`, or for any one of a list of answers."""
    answer = task.data.get("answer")
    accepted = answer if isinstance(answer, (list, tuple)) else [answer]
    wanted = [_folded(str(one)) for one in accepted if one is not None]
    if not wanted or not all(wanted):
        raise ValueError(
            f"task {task.id!r}: field 'answer' is {answer!r}; contains needs a text, not empty"
        )
    text = _folded(trajectory.answer)
    return float(any(_stands(one, text) for one in wanted))


def _stands(words: str, text: str) -> bool:
    """Whether the words stand in the text without a Latin letter or digit, or a number's point, next to them."""
    before = r"(?<![a-z0-9])(?<![0-9][.,])" if re.match("[a-z0-9]", words) else ""
    behind = r"(?![a-z0-9]|[.,][0-9])" if re.search(r"[a-z0-9]\Z", words) else ""
    return re.search(before + re.escape(words) + behind, text) is not None


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
