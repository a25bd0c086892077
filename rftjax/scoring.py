"""Scores trajectories with the user's evaluator, in worker processes, while the device works.

A sample that cannot be scored is dropped from its group and counted; it never gets a reward of 0.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable

from rftjax.errors import UserError
from rftjax.evaluators.forms.form import ALL, GROUP, SAMPLE, invalid, number
from rftjax.monitor import reasons
from rftjax.sandbox import require as require_sandbox
from rftjax.types import Score, Trajectory
from rftjax.workers.pool import WorkerError, Workers, done

UNANSWERED = "nothing was sampled: what came before the first answer fills rollout.max_length"


class EvaluatorError(UserError):
    """Too many samples could not be scored; the caller saves a checkpoint before it propagates."""


@dataclasses.dataclass(eq=False)
class _Call:
    """One call of the evaluator and the samples in it; `apart` are calls of each one alone, after a failure."""

    members: list[Trajectory]
    future: concurrent.futures.Future[list[Score]] | None = None
    apart: list[concurrent.futures.Future[list[Score]]] = dataclasses.field(default_factory=list)
    seen: int = 0  # samples of the group that have ended, those without a score included


class Scorer:
    """Runs `evaluator`, one or a weighted sum of several (`workers.named`), in `workers` processes.

    An evaluator of whole groups is called when the last sample of a group has ended. Without an `evaluator` the reward
    is the sum of the turn rewards. `timeout_s` limits a call; `env` lists environment
    variables to pass on besides the harmless ones. Python's and NumPy's global generators are seeded from `seed` and
    the sample before each call of a synchronous evaluator. The constructor raises ValueError where the import fails;
    call it before JAX is used. Errors name the config field `field`.
    """

    def __init__(
        self,
        evaluator: str,
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        max_error_share: float = 0.25,
        env: Iterable[str] = (),
        sandbox: bool = False,
        seed: int = 0,
        field: str = "evaluator",
    ):
        if not 0.0 <= max_error_share <= 1.0:
            raise UserError(
                f"scoring.max_error_share={max_error_share}: must be between 0.0 and 1.0"
            )
        if sandbox:
            require_sandbox("scoring.sandbox=True")
        self._max_error_share = max_error_share
        self._seed = seed
        self._name = f"{field}={evaluator!r}"
        # Keyed by identity: several task streams have the same draw and sample.
        self._pending: dict[int, _Call] = {}
        self._groups: dict[tuple[int, int], _Call] = {}  # not yet called; by task and draw
        self._details: dict[str, str] = {}
        self._workers: Workers | None = None
        if evaluator:
            self._workers = Workers(
                evaluator,
                workers,
                timeout_s,
                wrapper="rftjax.evaluators.forms.load:evaluation",
                field=field,
                limit_field="scoring.timeout_s",
                env=env,
                env_field="scoring.env",
            )
        form = json.loads(self._workers.about) if self._workers else {}
        self.scope, self._separable = form.get("scope", SAMPLE), form.get("separable", False)
        self.form = form.get("kind", "sum of the turn rewards")  # what the evaluator was taken for

    def submit(self, trajectory: Trajectory, group_size: int = 0) -> None:
        """Starts scoring a finished trajectory and returns at once; a second call does nothing.

        With an evaluator of groups, the call starts when `group_size` samples of the draw were submitted (0: in
        `gather`).
        """
        if id(trajectory) in self._pending:
            return
        score = self._without_call(trajectory)
        call = _Call([trajectory], future=done([score]) if score else None)
        self._pending[id(trajectory)] = call
        if self.scope == SAMPLE and not score:
            self._start(call)
        elif self.scope == GROUP:
            key = id(trajectory.task), trajectory.draw
            group = self._groups.setdefault(key, _Call([]))
            group.seen += 1
            if not score:
                group.members.append(trajectory)
                self._pending[id(trajectory)] = group
            if group.seen == group_size:
                self._start(self._groups.pop(key))

    def of_groups(self, size: int) -> Callable[[Trajectory], None]:
        """Returns `submit` for trajectories that come in groups of this size."""
        return functools.partial(self.submit, group_size=size)

    def _without_call(self, trajectory: Trajectory) -> Score | None:
        """Returns the score of a sample that the evaluator does not see."""
        if trajectory.finish_reason == "error":
            return invalid(f"environment: {trajectory.error or 'no reason given'}")
        if trajectory.unanswered:
            return invalid(UNANSWERED)
        return None if self._workers else _sum_of_turns(trajectory)

    def _start(self, call: _Call) -> None:
        if call.members and self._workers:
            # Whatever order they ended in.
            call.members.sort(key=lambda one: (one.draw, one.sample))
            call.future = self._workers.submit(self._seed, [*map(_shown, call.members)])

    def gather(self, trajectories: list[Trajectory]) -> list[Score]:
        """Submits `trajectories` that are not yet submitted, waits for all scores and sets `trajectory.score`."""
        for trajectory in trajectories:
            self.submit(trajectory)
        for trajectory in trajectories:
            if call := self._groups.pop((id(trajectory.task), trajectory.draw), None):
                self._start(call)
        if self.scope == ALL:
            each = {id(one): one for one in trajectories}.values()
            together = _Call([one for one in each if not self._pending[id(one)].future])
            self._pending |= {id(one): together for one in together.members}
            self._start(together)
        for trajectory in trajectories:
            call = self._pending.pop(id(trajectory), None)
            if call is None:  # the same trajectory twice in the list
                continue
            try:
                trajectory.score = self._result(call, trajectory)
            except WorkerError as error:
                trajectory.score = invalid(str(error))
                trajectory.bystander = error.bystander
                self._details.setdefault(str(error), error.details)
        return [trajectory.score for trajectory in trajectories if trajectory.score is not None]

    def forget(self, trajectories: list[Trajectory]) -> None:
        """Drops what was submitted of trajectories that are scored as copies, or in another process."""
        for trajectory in trajectories:
            self._pending.pop(id(trajectory), None)

    def _result(self, call: _Call, trajectory: Trajectory) -> Score:
        """Waits for a sample's score; of a separable group whose call failed, each sample is tried alone."""
        assert call.future is not None
        place = next(at for at, one in enumerate(call.members) if one is trajectory)
        try:
            return call.future.result()[place]
        except WorkerError:
            if not self._separable or len(call.members) == 1:
                raise
        if not call.apart:
            assert self._workers is not None
            call.apart = [self._workers.submit(self._seed, [_shown(one)]) for one in call.members]
        return call.apart[place].result()[0]

    def check(self, scores: list[Score]) -> None:
        """Raises EvaluatorError with the commonest reasons if more than `max_error_share` of `scores` are invalid."""
        share = error_share(scores)
        if share <= self._max_error_share:
            self._details.clear()
            return
        invalid = [score.reason for score in scores if not score.valid]
        lines = [
            f"{len(invalid)} of {len(scores)} samples ({share:.1%}) could not be scored by {self._name}; "
            f"scoring.max_error_share={self._max_error_share:g} allows {self._max_error_share:.1%}. "
            "Correct the evaluator or the environment and start again (with --accept_changed=evaluator or "
            "--accept_changed=environment where steps were done before), or raise scoring.max_error_share. "
            "The commonest reasons:"
        ]
        lines += [f"  {line}" for line in reasons.commonest(invalid)]
        kinds = collections.Counter(map(reasons.general, invalid))
        commonest = next(
            one for one in invalid if reasons.general(one) == kinds.most_common(1)[0][0]
        )
        details = self._details.get(commonest, "")
        if details:
            lines += ["The first of them in full:", details]
        raise EvaluatorError("\n".join(lines))

    @property
    def bystanders(self) -> int:
        """Calls stopped by another call's fault so far; they are retried."""
        return self._workers.bystanders if self._workers else 0

    def close(self) -> None:
        """Ends the worker processes."""
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answered(trajectories: Iterable[Trajectory]) -> list[Score]:
    """Returns the scores that may count as faults of the evaluator or the environment.

    Left out are samples in which the policy sampled nothing, and bystanders: lost by another call or the machine.
    """
    return [
        one.score
        for one in trajectories
        if one.score is not None
        and not one.bystander
        and not (one.unanswered and one.finish_reason != "error")
    ]


def error_share(scores: list[Score]) -> float:
    """Returns the share of `scores` that are invalid, 0.0 for none."""
    return sum(not score.valid for score in scores) / max(1, len(scores))


def _shown(trajectory: Trajectory) -> Trajectory:
    """Returns what an evaluator gets: without the experts of tokens, which are large and say nothing to it."""
    if all(one.experts is None for one in trajectory.sequences):
        return trajectory
    parts = [dataclasses.replace(one, experts=None) for one in trajectory.sequences]
    return dataclasses.replace(trajectory, sequences=parts)


def _sum_of_turns(trajectory: Trajectory) -> Score:
    try:
        total = number(math.fsum(trajectory.turn_rewards), "the sum of the turn rewards")
        return Score(total, of_turns=True)
    except (ValueError, OverflowError) as error:
        return invalid(str(error))
