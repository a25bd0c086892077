"""Held-out evaluation with sampling settings of its own.

Every number is a mean over tasks of each task's mean, and its standard error is that of a mean over tasks: the samples
of one task are not independent.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rftjax.devices import processes
from rftjax.errors import UserError
from rftjax.monitor.rollouts import commonest, mean_by_name
from rftjax.rollout import Sampling
from rftjax.run.sampling import sampling_params
from rftjax.run.shares import scored_by_all
from rftjax.scoring import Scorer, answered
from rftjax.types import SamplingParams, Score, Task, Trajectory

log = logging.getLogger(__name__)

MAIN = "heldout"  # the set of `tasks.heldout`, whose metrics carry no name


def set_field(name: str) -> str:
    """Returns how errors name a held-out set."""
    return "tasks.heldout" if name == MAIN else f"eval.sets[{name}]"


class HeldOut:
    """The held-out sets of a run by name, when they are due, and their evaluation with the sampler's weights."""

    def __init__(
        self,
        config: ConfigDict,
        sets: Mapping[str, Sequence[Task]],
        rollout: Sampling,
        scorer: Scorer,
    ) -> None:
        self.sets = sets
        self._config, self._rollout, self._scorer = config, rollout, scorer
        self._on = bool(sets) and config.eval.every > 0

    def due(self, step: int) -> bool:
        """Whether the sets are evaluated after this step: at the start, the end, and every `eval.every` steps."""
        at = step == self._config.steps
        return self._on and (at or step % self._config.eval.every == 0)

    def missing(self, step: int, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the metrics `lines` lack the evaluation after this step; False where a run evaluates nothing."""
        names = [name for line in lines if line["step"] == step for name in line]
        # A user's hook may record names of its own under eval/.
        counts = {f"{prefix(one)}tasks" for one in self.sets}
        return self._on and not counts & {*names}

    def evaluate(
        self, *, samples: int = 0, tasks_at_most: int = 0
    ) -> tuple[dict[str, float], dict[str, list[Trajectory]]]:
        """Returns the metrics of all sets and the trajectories of each.

        `samples` a task and `tasks_at_most` a set are the config's and all where they are 0.
        """
        section = self._config.eval
        metrics: dict[str, float] = {}
        trajectories: dict[str, list[Trajectory]] = {}
        for name, found in self.sets.items():
            measured, trajectories[name] = evaluate_set(
                name,
                found[: tasks_at_most or None],
                samples or section.samples,
                sampling_params(self._config, heldout=True),
                self._rollout,
                self._scorer,
                pass_k=section.pass_k,
                pass_reward=section.pass_reward,
            )
            metrics |= measured
        best = self._config.checkpoint.best_metric
        if self.sets and best not in metrics:
            log.warning(
                "checkpoint.best_metric=%r: this evaluation has no such metric, only %s",
                best,
                ", ".join(metrics),
            )
        return metrics, trajectories


def evaluate_set(
    name: str,
    tasks: Sequence[Task],
    samples: int,
    params: SamplingParams,
    rollout: Sampling,
    scorer: Scorer,
    *,
    pass_k: Sequence[int] = (),
    pass_reward: float = 1.0,
) -> tuple[dict[str, float], list[Trajectory]]:
    """Samples and scores every task of set `name`; returns its metrics (eval/... or eval/NAME/...) and trajectories.

    Raises EvaluatorError above the allowed share of failures.
    """
    draws = processes.share(list(enumerate(tasks)))
    with processes.together():
        sampled = rollout(
            draws, samples, params, stream=stream(name), on_finish=scorer.of_groups(samples)
        )
    trajectories = scored_by_all(scorer, sampled)
    scorer.check(answered(trajectories))
    measured = measure(trajectories, pass_k=pass_k, pass_reward=pass_reward)
    return {prefix(name) + metric: value for metric, value in measured.items()}, trajectories


def prefix(name: str) -> str:
    """Returns what the names of a set's metrics begin with."""
    return "eval/" if name == MAIN else f"eval/{name}/"


def stream(name: str) -> int:
    """Returns a set's noise stream, 1 or more: the same at every evaluation, whatever other sets there are."""
    return 1 if name == MAIN else 2 + zlib.crc32(name.encode()) % (2**31 - 2)


def measure(
    trajectories: Sequence[Trajectory], *, pass_k: Sequence[int] = (), pass_reward: float = 1.0
) -> dict[str, float]:
    """Returns the metrics of scored trajectories; those without a valid score count in `error_share` alone, or in
    `unanswered_share` where the policy sampled nothing, `bystander_share` where another call or the machine cost it.

    `reward` (avg@k with k samples a task) is the mean reward, `pass_at_K`, for each K of `pass_k`, the chance that one
    of K samples has a reward of at least `pass_reward`, over the tasks with K valid samples. Where scores have parts,
    `strict` is the share of samples whose every part is at least `pass_reward`, `lenient` the mean of the mean part; a
    sample without parts then counts with its reward as the only one. Each comes with a NAME_stderr. `part/NAME` and
    `metric/NAME` are means over samples.
    """
    by_task: dict[int, list[Score]] = {}
    for trajectory in trajectories:
        if trajectory.score is not None and trajectory.score.valid:
            by_task.setdefault(trajectory.draw, []).append(trajectory.score)
    groups = list(by_task.values())
    scores = [score for group in groups for score in group]
    total = max(len(trajectories), 1)
    unanswered = sum(one.unanswered and one.finish_reason != "error" for one in trajectories)
    lost = sum(one.bystander for one in trajectories)
    metrics = _over_tasks("reward", [[score.reward for score in group] for group in groups])
    metrics |= {
        "tasks": float(len(groups)),
        "error_share": (len(trajectories) - len(scores) - unanswered - lost) / total,
        "unanswered_share": unanswered / total,
        "bystander_share": lost / total,
        "truncated_share": sum(one.truncated for one in trajectories) / total,
    }
    metrics |= commonest(trajectories)
    for k in pass_k:
        chances = [
            [pass_at_k(len(group), sum(score.reward >= pass_reward for score in group), k)]
            for group in groups
            if len(group) >= k
        ]
        metrics |= _over_tasks(f"pass_at_{k}", chances)
    if any(score.parts for score in scores):
        parts = [
            [list(score.parts.values()) or [score.reward] for score in group] for group in groups
        ]
        strict = [[float(min(one) >= pass_reward) for one in group] for group in parts]
        metrics |= _over_tasks("strict", strict)
        metrics |= _over_tasks("lenient", [[_mean(one) for one in group] for group in parts])
    return (
        metrics
        | mean_by_name("part/", [score.parts for score in scores])
        | mean_by_name("metric/", [score.metrics for score in scores])
    )


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Returns the unbiased estimate 1 - C(samples - right, k) / C(samples, k) (Chen et al. 2021)."""
    if not 1 <= k <= samples:
        raise UserError(f"eval.pass_k: {k} must be between 1 and the {samples} samples of a task")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the standard error of it: NaN and NaN of none, 0 for the error of one."""
    count = len(values)
    if not count:
        return math.nan, math.nan
    mean = _mean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return mean, math.sqrt(variance / count)


def _over_tasks(name: str, values: Iterable[Sequence[float]]) -> dict[str, float]:
    """Returns the mean over tasks of each task's mean, and its standard error."""
    mean, stderr = mean_and_stderr([_mean(one) for one in values])
    return {name: mean, f"{name}_stderr": stderr}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
