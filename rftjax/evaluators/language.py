"""Reward 1.0 for a completion in the language `language`, by py3langid, an optional extra of this project."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Compares the likeliest language with the row's `language`, an ISO 639-1 code like "de", or a list of them.

    A completion without a letter gets 0.0. The reason names the language that was found. Short texts are often taken
    for another language: use it for answers of a sentence or more.
    """
    given = task.data.get("language")
    wanted = given if isinstance(given, (list, tuple)) else [given]
    package, known = _identifier()
    if not wanted or not all(one in known for one in wanted):
        raise ValueError(
            f"task {task.id!r}: field 'language' is {given!r}; it must be one of {', '.join(sorted(known))}"
        )
    if not any(letter.isalpha() for letter in trajectory.answer):
        return Score(0.0, reason="no text")
    found = str(package.classify(trajectory.answer)[0])
    return Score(float(found in wanted), reason=found)


@functools.cache
def _identifier() -> tuple[Any, frozenset[str]]:
    """Returns the package and the codes that it knows."""
    try:
        package = importlib.import_module("py3langid")
    except ImportError as error:
        raise RuntimeError(
            "evaluator='rftjax.evaluators.language:evaluate' needs the package py3langid: "
            f"pip install 'rftjax[evaluators]' ({error})"
        ) from error
    return package, frozenset(code for code, _ in package.rank("any text"))
