"""Partial credit for a completion that is nearly `answer`, by rapidfuzz, an optional extra of this project."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Rewards the normalised similarity of edits with the row's `answer`, or with the nearest of a list of answers.

    Case and the amount of white space do not count. A similarity below the row's `min_similarity` (from 0.0 to 1.0) is
    a reward of 0.0. The part `exact` is 1.0 for an equal text.
    """
    answer = task.data.get("answer")
    accepted = answer if isinstance(answer, (list, tuple)) else [answer]
    wanted = [_folded(str(one)) for one in accepted if one is not None]
    least = task.data.get("min_similarity", 0.0)
    if not wanted or not all(wanted):
        raise ValueError(
            f"task {task.id!r}: field 'answer' is {answer!r}; fuzzy_match needs a text, not empty"
        )
    if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 <= least <= 1:
        raise ValueError(
            f"task {task.id!r}: field 'min_similarity' is {least!r}; it must be a number from 0.0 to 1.0"
        )
    text = _folded(trajectory.answer)
    near = max(_package().Indel.normalized_similarity(text, one) for one in wanted)
    return Score(near if near >= least else 0.0, {"exact": float(text in wanted)})


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


@functools.cache
def _package() -> Any:
    try:
        return importlib.import_module("rapidfuzz.distance")
    except ImportError as error:
        raise ValueError(
            "evaluator='rftjax.evaluators.fuzzy_match:evaluate' needs the package rapidfuzz: "
            f"pip install 'rftjax[evaluators]' ({error})"
        ) from error
