"""Held-out evaluation with sampling settings of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rftjax.rollout import Limits, Rollout
from rftjax.scoring import Scorer
from rftjax.types import Task, Trajectory

STREAM = 1  # the noise stream of the held-out set: the same noise at every evaluation


def evaluate(
    tasks: Sequence[Task],
    samples: int,
    limits: Limits,
    rollout: Rollout,
    scorer: Scorer,
    *,
    pass_k: Sequence[int] = (),
    pass_reward: float = 1.0,
) -> tuple[dict[str, float], list[Trajectory]]:
    """Samples and scores every held-out task; returns metrics and trajectories.

    `eval/reward` is the mean over tasks of the mean over each task's valid samples, `eval/reward_stderr` the standard
    error of that mean over tasks. `eval/pass_at_K`, for each K of `pass_k`, is the chance that one of K samples has a
    reward of at least `pass_reward`, over the tasks with K valid samples.
    Raises EvaluatorError above the allowed share of failures.
    """
    draws = list(enumerate(tasks))
    trajectories = rollout(draws, samples, limits, stream=STREAM, on_finish=scorer.submit)
    scorer.check(scorer.gather(trajectories))
    by_task: dict[int, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.score is not None and trajectory.score.valid:
            by_task.setdefault(trajectory.draw, []).append(trajectory.score.reward)
    means = [math.fsum(rewards) / len(rewards) for rewards in by_task.values()]
    mean, stderr = mean_and_stderr(means)
    truncated = sum(trajectory.finish_reason == "length" for trajectory in trajectories)
    metrics = {
        "eval/reward": mean,
        "eval/reward_stderr": stderr,
        "eval/tasks": float(len(means)),
        "eval/truncated_share": truncated / max(len(trajectories), 1),
    }
    for k in pass_k:
        chances = [
            pass_at_k(len(rewards), sum(value >= pass_reward for value in rewards), k)
            for rewards in by_task.values()
            if len(rewards) >= k
        ]
        mean, stderr = mean_and_stderr(chances)
        metrics |= {f"eval/pass_at_{k}": mean, f"eval/pass_at_{k}_stderr": stderr}
    parts: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.score is not None and trajectory.score.valid:
            for name, value in trajectory.score.parts.items():
                parts.setdefault(name, []).append(value)
    metrics |= {f"eval/part/{name}": math.fsum(v) / len(v) for name, v in parts.items()}
    return metrics, trajectories


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Returns the unbiased estimate 1 - C(samples - right, k) / C(samples, k) (Chen et al. 2021)."""
    if not 1 <= k <= samples:
        raise ValueError(f"eval.pass_k: {k} must be between 1 and the {samples} samples of a task")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean (NaN of none) and the standard error of it (0 of one)."""
    count = len(values)
    mean = math.fsum(values) / count if count else math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return mean, math.sqrt(variance / max(count, 1))
