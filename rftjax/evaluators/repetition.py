"""The share of a completion that is no repetition: distinct among all groups of three words."""

from __future__ import annotations

import re

from rftjax.types import Task, Trajectory

SIZE = 3  # words of a group


def evaluate(task: Task, trajectory: Trajectory) -> float:
    """Returns 1.0 for a text without a repeated group of words, near 0.0 for one that says the same again and again.

    A text too short for a group gets 1.0: add an evaluator of the answer itself, or empty answers win.
    """
    words = re.findall(r"\w+", trajectory.completion.lower())
    groups = list(zip(*(words[start:] for start in range(SIZE)), strict=False))
    return len(set(groups)) / len(groups) if groups else 1.0
