"""Metrics and histograms of one step's scored trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rftjax.monitor.rollouts import (
    by_draw,
    commonest,
    is_valid,
    mean_by_name,
    mean_tokens,
    reward_of,
    sampled_tokens,
)
from rftjax.types import Trajectory

RIGHT = 1.0  # a completion is right from this reward on
SHORT_TOKENS = 8  # shorter answers often coincide
GROUPS = 4  # the commonest answer is measured from this many draws on


def rollout_metrics(
    trajectories: Sequence[Trajectory], *, right_reward: float = RIGHT
) -> dict[str, float]:
    """Returns the metrics of scored trajectories; only valid scores count in the rewards.

    A completion is right from `right_reward` on. A group is a draw; with fewer than two valid samples it counts as one
    without variance.
    """
    if not trajectories:
        return {}
    total = len(trajectories)
    groups = by_draw(trajectories)
    valid = [one for one in trajectories if is_valid(one)]
    rewards = [reward_of(one) for one in valid]
    lost = sum(one.bystander for one in trajectories)
    own = [one for one in trajectories if not one.bystander]
    failed = [one for one in own if one.finish_reason == "error"]
    unanswered = sum(one.unanswered and one.finish_reason != "error" for one in trajectories)
    unscored = sum(not is_valid(one) and one.finish_reason != "error" for one in own)
    truncated = sum(one.truncated for one in trajectories)
    different = sum(len({_completion_key(one) for one in group}) for group in groups)
    group_rewards = [{reward_of(one) for one in group if is_valid(one)} for group in groups]
    metrics = {
        "reward/mean": float(np.mean(rewards)) if rewards else math.nan,
        "reward/std": float(np.std(rewards)) if rewards else math.nan,
        "rollout/truncated_share": truncated / total,
        "rollout/completion_tokens_mean": mean_tokens(trajectories),
        "rollout/turns_mean": sum(one.turns for one in trajectories) / total,
        "rollout/duplicate_share": (total - different) / total,
        "rollout/duplicate_wrong_share": sum(map(_odd_copies, groups)) / total,
        "rollout/unanswered_share": unanswered / total,
        "evaluator/error_share": (unscored - unanswered) / total,
        "environment/error_share": len(failed) / total,
        "rollout/bystander_share": lost / total,
        "groups/zero_variance_share": float(np.mean([len(some) < 2 for some in group_rewards])),
    }
    if len(groups) >= GROUPS:
        metrics |= {f"rollout/{name}": value for name, value in commonest(trajectories).items()}
    scores = [one.score for one in valid if one.score]
    metrics |= mean_by_name("reward/part/", [score.parts for score in scores])
    metrics |= mean_by_name("metric/", [score.metrics for score in scores])
    right = [one for one in valid if reward_of(one) >= right_reward]
    wrong = [one for one in valid if reward_of(one) < right_reward]
    if rewards:
        metrics["reward/max"] = max(rewards)
    if right:
        metrics["rollout/tokens_right_mean"] = mean_tokens(right)
    if wrong:
        metrics["rollout/tokens_wrong_mean"] = mean_tokens(wrong)
    return metrics


def histograms(trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
    """Returns rewards and advantages of valid samples, and sampled tokens of all samples, for histograms."""
    valid = [one for one in trajectories if is_valid(one)]
    return {
        "histogram/reward": np.asarray([reward_of(one) for one in valid]),
        "histogram/advantage": np.asarray([one.advantage for one in valid]),
        "histogram/completion_tokens": np.asarray([sampled_tokens(one) for one in trajectories]),
    }


def _odd_copies(group: Sequence[Trajectory]) -> int:
    """Number of samples that copy another one of the group, except right and short answers, which repeat anyway."""
    kept = [one for one in group if reward_of(one) < RIGHT and sampled_tokens(one) >= SHORT_TOKENS]
    return len(kept) - len({_completion_key(one) for one in kept})


def _completion_key(trajectory: Trajectory) -> Any:
    """Key of identical completions: the sampled ids, or the text without ids."""
    ids = tuple(
        token
        for sequence in trajectory.sequences
        for token, sampled in zip(sequence.tokens, sequence.sampled, strict=True)
        if sampled
    )
    return ids or trajectory.completion
