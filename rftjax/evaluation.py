"""Held-out evaluation with sampling settings of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rftjax.rollout import Limits, Rollout
from rftjax.scoring import Scorer
from rftjax.types import Task, Trajectory

STREAM = 1  # the noise stream of the held-out set: the same noise at every evaluation


def evaluate(
    tasks: Sequence[Task], samples: int, limits: Limits, rollout: Rollout, scorer: Scorer
) -> tuple[dict[str, float], list[Trajectory]]:
    """Samples and scores every held-out task; returns metrics and trajectories.

    `eval/reward` is the mean over tasks of the mean over each task's valid samples, `eval/reward_stderr` the standard
    error of that mean over tasks. Raises EvaluatorError above the allowed share of failures.
    """
    draws = list(enumerate(tasks))
    trajectories = rollout(draws, samples, limits, stream=STREAM, on_finish=scorer.submit)
    scorer.check(scorer.gather(trajectories))
    by_task: dict[int, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.score is not None and trajectory.score.valid:
            by_task.setdefault(trajectory.draw, []).append(trajectory.score.reward)
    means = [math.fsum(rewards) / len(rewards) for rewards in by_task.values()]
    count = len(means)
    mean = math.fsum(means) / count if count else math.nan
    variance = math.fsum((value - mean) ** 2 for value in means) / max(count - 1, 1)
    truncated = sum(trajectory.finish_reason == "length" for trajectory in trajectories)
    metrics = {
        "eval/reward": mean,
        "eval/reward_stderr": math.sqrt(variance / max(count, 1)),
        "eval/tasks": float(count),
        "eval/truncated_share": truncated / max(len(trajectories), 1),
    }
    parts: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.score is not None and trajectory.score.valid:
            for name, value in trajectory.score.parts.items():
                parts.setdefault(name, []).append(value)
    metrics |= {f"eval/part/{name}": math.fsum(v) / len(v) for name, v in parts.items()}
    return metrics, trajectories
