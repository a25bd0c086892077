"""What a sample's tokens are credited with: the trajectory's reward, or by turn the return from that turn on.

The reward of a trajectory is what the evaluator says; without one it is the sum of the turn rewards. With credit by
turn the evaluator's reward comes at the end, beside the turn rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rftjax import grpo
from rftjax.learning import custom
from rftjax.monitor.rollouts import is_valid, reward_of
from rftjax.types import Trajectory

TURN = "turn"  # the value of grpo.credit


def has_variance(group: Iterable[Trajectory], credit: str = "") -> bool:
    """Says whether a group's valid rewards differ; without variance its advantages are 0.

    By turn, the returns from a turn on must differ for one of the turns.
    """
    valid = [one for one in group if is_valid(one)]
    if credit != TURN:
        return len({reward_of(one) for one in valid}) > 1
    found = [grpo.returns(one.turn_rewards, final_reward(one)) for one in valid]
    turns = range(max(map(len, found), default=0))
    return any(len({one[k] for one in found if k < len(one)}) > 1 for k in turns)


def final_reward(trajectory: Trajectory) -> float:
    """Returns what a trajectory earns beside its turn rewards: the evaluator's reward, 0 without one."""
    score = trajectory.score
    return 0.0 if score is not None and score.of_turns else reward_of(trajectory)


def set_advantages(
    trajectories: Iterable[Trajectory],
    fields: Mapping[str, Any],
    penalties: Mapping[tuple[int, int], float] = {},
) -> None:
    """Sets the advantage of every valid trajectory from its reward plus what (draw, sample) has in `penalties`.

    Groups are draws; invalid samples belong to none. With credit by turn it sets those of the turns, and their mean as
    the trajectory's.
    """
    valid = [one for one in trajectories if is_valid(one)]
    if not valid:
        return
    chosen: dict[str, Any] = {name: fields[name] for name in grpo.ADVANTAGE_DEFAULTS}
    chosen["baseline"] = custom.baseline(chosen["baseline"])
    draws = [one.draw for one in valid]
    more = [penalties.get((one.draw, one.sample), 0.0) for one in valid]
    if fields.get("credit") == TURN:
        finals = [final_reward(one) + extra for one, extra in zip(valid, more, strict=True)]
        turns = [one.turn_rewards for one in valid]
        by_turn = grpo.turn_advantages(turns, finals, draws, **chosen)
        for trajectory, values in zip(valid, by_turn, strict=True):
            trajectory.turn_advantages = values.tolist()
            trajectory.advantage = float(np.mean(values)) if len(values) else 0.0
        return
    rewards = [reward_of(one) + extra for one, extra in zip(valid, more, strict=True)]
    values = grpo.advantages(rewards, draws, **chosen)
    for trajectory, value in zip(valid, values, strict=True):
        trajectory.advantage = float(value)


def of_tokens(trajectory: Trajectory) -> list[np.ndarray]:
    """Returns for each sequence the (T,) advantages of its tokens: the turn's where the token was sampled, else 0.

    A turn is what was sampled without a break.
    """
    found, first = [], 0
    for sequence in trajectory.sequences:
        sampled_T = np.asarray(sequence.sampled, bool)
        starts_T = sampled_T & ~np.concatenate([[False], sampled_T[:-1]])
        turn_T = first + np.cumsum(starts_T) - 1
        first += int(np.sum(starts_T))
        found.append((sampled_T, turn_T))
    values = trajectory.turn_advantages
    assert first == len(values), f"{first} turns were sampled, and {len(values)} have an advantage"
    return [_picked(values, sampled_T, turn_T) for sampled_T, turn_T in found]


def _picked(values: Sequence[float], sampled_T: np.ndarray, turn_T: np.ndarray) -> np.ndarray:
    result_T = np.zeros(sampled_T.shape, np.float32)
    result_T[sampled_T] = np.asarray(values, np.float32)[turn_T[sampled_T]]
    return result_T
