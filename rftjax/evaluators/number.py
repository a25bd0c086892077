"""Reward 1.0 when the last number of the completion equals `answer`."""

from __future__ import annotations

import decimal
import re

from rftjax.types import Score, Task, Trajectory

# A sign counts only where no word ends before it ("5-3" holds 5 and 3), commas only between groups
# of three digits.
_NUMBER = re.compile(
    r"(?<!\w)(?<![0-9]\.)[-+\u2212]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Compares as exact decimals; of the row's `answer` too, the last number counts."""
    wanted = _last_number(str(task.data.get("answer", "")))
    if wanted is None:
        raise ValueError(
            f"task {task.id!r}: field 'answer' is {task.data.get('answer')!r}; "
            "it must hold a number"
        )
    got = _last_number(trajectory.completion)
    parts = {"format": float(got is not None)}
    return Score(reward=float(got == wanted), parts=parts)


def _last_number(text: str) -> decimal.Decimal | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return decimal.Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
    except decimal.InvalidOperation:  # an exponent of some twenty digits
        return None
