"""What is suspicious in an evaluator: scores that never vary, texts that always win, calls that disagree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from rftjax.evaluators.forms.form import SAMPLE
from rftjax.monitor.rollouts import is_valid, reward_of
from rftjax.monitor.transcripts import short
from rftjax.scoring import Scorer
from rftjax.types import Trajectory

TRIED = 16  # samples that are scored a second time
TASKS = 8  # that each constant answer is given to: an evaluator may cost money
CONSTANTS = ("", "0", "1", "A", "yes", "I do not know.")  # beside the best answer that was sampled
SAME = 1e-6  # rewards that differ by less are equal


def findings(
    scorer: Scorer, trajectories: Sequence[Trajectory], *, conversations: bool = False
) -> Iterator[str]:
    """Yields a sentence for each thing that is suspicious in the scores of `trajectories`; scores some again.

    With `conversations`, an environment has a part in the reward, so that no constant answer can be tried.
    """
    valid = [one for one in trajectories if is_valid(one)]
    if not valid:
        return
    rewards = [reward_of(one) for one in valid]
    if len(valid) > 1 and max(rewards) - min(rewards) < SAME:
        yield (
            f"the score is {rewards[0]:g} for all of {len(valid)} samples: nothing can be learned from it; make tasks"
            " easier or harder, or give partial rewards"
        )
    yield from _disagreements(scorer, valid)
    if scorer.scope == SAMPLE and not conversations:
        yield from _constants(scorer, valid)


def _disagreements(scorer: Scorer, valid: Sequence[Trajectory]) -> Iterator[str]:
    draws = list(dict.fromkeys(one.draw for one in valid))
    few = [one for one in valid if one.draw in draws[:TRIED]]
    few = few[:TRIED] if scorer.scope == SAMPLE else few
    if scorer.scope == SAMPLE or len(few) == len(valid):
        again = [dataclasses.replace(one, score=None) for one in few]
        scorer.gather(again)
        pairs = [(reward_of(one), reward_of(other)) for one, other in zip(few, again, strict=True)]
        differ = [abs(one - other) for one, other in pairs if abs(one - other) > SAME]
        if differ:
            most = "no score" if math.isinf(max(differ)) else f"{max(differ):.3g}"
            yield (
                f"two calls disagree on {len(differ)} of {len(few)} samples, by up to {most}: the reward has noise of"
                " its own, and runs cannot be repeated; seed it, or set a judge's temperature to 0"
            )


def _constants(scorer: Scorer, valid: Sequence[Trajectory]) -> Iterator[str]:
    """Yields the texts that score better than the samples on average, whatever the task."""
    tasks = {one.task.id: one for one in valid}
    chosen = list(tasks.values())[:TASKS]
    if len(chosen) < 2:
        return
    mean = math.fsum(map(reward_of, valid)) / len(valid)
    best = max(valid, key=reward_of).completion
    for text in dict.fromkeys([*CONSTANTS, best]):
        tried = [_answered(one, text) for one in chosen]
        scorer.gather(tried)
        rewards = [reward_of(one) for one in tried if is_valid(one)]
        if len(rewards) < len(tried):
            continue
        found = math.fsum(rewards) / len(rewards)
        if found > mean + SAME:
            what = f"the answer {short(text, 40)!r}" if text else "an empty answer"
            yield (
                f"{what} to {len(tried)} tasks scores {found:.3g} on average, the samples {mean:.3g}: training may find"
                " it; let the evaluator require what only a right answer has"
            )


def _answered(trajectory: Trajectory, text: str) -> Trajectory:
    """Returns the task's conversation with this text as its only answer."""
    task = trajectory.task
    return Trajectory(
        task,
        trajectory.draw,
        trajectory.sample,
        [*task.messages, {"role": "assistant", "content": text}],
        turn_rewards=[0.0],
        finish_reason="stop",
    )
