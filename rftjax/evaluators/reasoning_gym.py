"""Reward of the package reasoning-gym's own verifiers, an optional extra of this project."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

from rftjax.types import Score, Task, Trajectory

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Scores the last <answer> tag's text, or without one the whole completion, from 0.0 to 1.0.

    The row holds the package's entry (question, answer, metadata with its `source_dataset`) under
    `entry`, or as fields of its own.
    """
    entry = task.data.get("entry", task.data)
    metadata = entry.get("metadata") if isinstance(entry, dict) else None
    name = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            f"task {task.id!r} has no 'entry' of reasoning-gym whose metadata "
            "name its 'source_dataset'"
        )
    tagged = _ANSWER.findall(trajectory.answer)
    answer = (tagged[-1] if tagged else trajectory.answer).strip()
    reward = _verifier(name)(answer, entry)
    return Score(float(reward), {"solved": float(reward == 1.0), "tagged": float(bool(tagged))})


@functools.cache
def _verifier(name: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        package = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(
            "evaluator='rftjax.evaluators.reasoning_gym:evaluate' needs the package reasoning-gym: "
            f"pip install 'rftjax[reasoning-gym]' ({error})"
        ) from error
    return package.get_score_answer_fn(name)
