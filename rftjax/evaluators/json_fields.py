"""Partial credit for a JSON record: the reward is the share of right fields."""

from __future__ import annotations

import dataclasses

from rftjax.evaluators import json_record
from rftjax.types import Score, Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Scores as `json_record` does, but rewards its part `fields`.

    The strict equality becomes the part `exact`. A surplus field counts as a wrong one, so that
    inventing keys does not pay.
    """
    score = json_record.evaluate(task, trajectory)
    parts = {**score.parts, "exact": score.reward}
    return dataclasses.replace(score, reward=score.parts["fields"], parts=parts)
