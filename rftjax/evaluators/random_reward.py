"""The random-reward control: a training run on it must not improve at the task."""

from __future__ import annotations

import hashlib
import json

from rftjax.types import Task, Trajectory


def evaluate(task: Task, trajectory: Trajectory) -> float:
    """Tosses a fair coin (1.0 or 0.0) that depends on task id, draw, sample and completion alone.

    The same rollout gets the same reward in any process and after a resume.
    """
    key = json.dumps([task.id, trajectory.draw, trajectory.sample, trajectory.completion])
    return float(hashlib.blake2b(key.encode(), digest_size=8).digest()[0] & 1)
