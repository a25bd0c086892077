"""Reward 1.0 for the right letter of a multiple-choice question."""

from __future__ import annotations

import re

from rftjax.types import Score, Task, Trajectory

# Tried in this order, the last match of the first that matches: "answer is (B)", "\boxed{B}",
# "B) Paris" at the start, "(B)" or "**B**" anywhere, the letter alone on the last line.
_FORMS = (
    re.compile(r"(?i:\banswer\b\W*(?:(?:is|was)\b)?)\W*([A-Z])(?![\w'])"),
    re.compile(r"\\boxed\{\W*([A-Z])\W*\}"),
    re.compile(r"\A\W*([A-Z])(?:[).:,]|\*\*|\s*\Z|\s*\n)"),
    re.compile(r"(?:\(([A-Z])\))|(?:\*\*([A-Z])\*\*)"),
    re.compile(r"(?:\A|\n)\W*([A-Z])\W*\Z"),
)


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Compares the chosen letter with the row's `answer`: a letter, or an index counted from 0.

    The part `format` is 1.0 where one of the usual ways of naming a letter was found.
    """
    wanted = _wanted(task)
    got = _chosen(trajectory.completion)
    reason = "" if got else "no letter found"
    return Score(float(got == wanted), {"format": float(bool(got))}, reason=reason)


def _wanted(task: Task) -> str:
    answer = task.data.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < 26:
        return chr(ord("A") + answer)
    letter = answer.strip(" ().:\n").upper() if isinstance(answer, str) else ""
    if not re.fullmatch("[A-Z]", letter):
        raise ValueError(
            f"task {task.id!r}: field 'answer' is {answer!r}; "
            "choice needs a letter, or an index from 0 to 25"
        )
    return letter


def _chosen(completion: str) -> str:
    """Letter that the completion names, empty where it names none."""
    for form in _FORMS:
        found = list(form.finditer(completion))
        if found:
            return next(group for group in found[-1].groups() if group)
    return ""
