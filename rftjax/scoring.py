"""Scores trajectories with the user's evaluator, in worker processes, while the device works.

A sample that cannot be scored is dropped from its group and counted; it never gets a reward of 0.
"""

from __future__ import annotations

import collections
import concurrent.futures
import decimal
import inspect
import math
import numbers
import random
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from rftjax.errors import UserError
from rftjax.monitor import reasons
from rftjax.types import Score, Trajectory
from rftjax.workers.plain import FLOAT32_MAX, scalar
from rftjax.workers.pool import WorkerError, Workers, done

UNANSWERED = "nothing was sampled: what came before the first answer fills rollout.max_length"


class EvaluatorError(UserError):
    """Too many samples could not be scored; the caller saves a checkpoint before it propagates."""


class Scorer:
    """Runs `evaluator` ("module:name" or "file.py:name") in `workers` processes.

    Without an `evaluator` the reward is the sum of the turn rewards. `timeout_s` limits a call; `env` lists environment
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
        seed: int = 0,
        field: str = "evaluator",
    ):
        if not 0.0 <= max_error_share <= 1.0:
            raise UserError(
                f"scoring.max_error_share={max_error_share}: must be between 0.0 and 1.0"
            )
        self._max_error_share = max_error_share
        self._seed = seed
        self._name = f"{field}={evaluator!r}"
        # Keyed by identity: several task streams have the same draw and sample.
        self._pending: dict[int, tuple[Trajectory, concurrent.futures.Future[Score]]] = {}
        self._details: dict[str, str] = {}
        self._workers: Workers | None = None
        if evaluator:
            self._workers = Workers(
                evaluator,
                workers,
                timeout_s,
                wrapper="rftjax.scoring:evaluation",
                field=field,
                limit_field="scoring.timeout_s",
                env=env,
                env_field="scoring.env",
            )

    def submit(self, trajectory: Trajectory) -> None:
        """Starts scoring a finished trajectory and returns at once; a second call does nothing."""
        if id(trajectory) in self._pending:
            return
        if trajectory.finish_reason == "error":
            future = done(_invalid(f"environment: {trajectory.error or 'no reason given'}"))
        elif trajectory.unanswered:
            future = done(_invalid(UNANSWERED))
        elif self._workers is None:
            future = done(_sum_of_turns(trajectory))
        else:
            future = self._workers.submit(self._seed, trajectory)
        self._pending[id(trajectory)] = (trajectory, future)

    def gather(self, trajectories: list[Trajectory]) -> list[Score]:
        """Submits `trajectories` that are not yet submitted, waits for all scores and sets `trajectory.score`."""
        for trajectory in trajectories:
            self.submit(trajectory)
        for trajectory in trajectories:
            _, future = self._pending.pop(id(trajectory), (None, None))
            if future is None:  # the same trajectory twice in the list
                continue
            try:
                trajectory.score = future.result()
            except WorkerError as error:
                trajectory.score = _invalid(str(error))
                trajectory.bystander = error.bystander
                self._details.setdefault(str(error), error.details)
        return [trajectory.score for trajectory in trajectories if trajectory.score is not None]

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


def evaluation(evaluate: Callable[..., Any]) -> Callable[[int, Trajectory], Any]:
    """Runs in a worker process: wraps an evaluator so that it returns a checked Score.

    A class with `__call__` is instantiated once, without arguments.
    """
    if inspect.isclass(evaluate):
        evaluate = _made(evaluate)
    try:
        names = [*inspect.signature(evaluate).bind("task", "trajectory").arguments]
    except TypeError as error:
        raise UserError(
            f"evaluator: must be callable as evaluate(task, trajectory), but {error}"
        ) from None
    except ValueError:  # no signature available
        names = []
    if names == ["trajectory", "task"]:
        raise UserError(
            "evaluator: is called as evaluate(task, trajectory), but names its arguments the other way round"
        )

    async def evaluate_async(seed: int, trajectory: Trajectory) -> Score:
        return as_score(await evaluate(trajectory.task, trajectory))

    def evaluate_sync(seed: int, trajectory: Trajectory) -> Any:
        _seed_generators(f"{seed} {trajectory.task.id} {trajectory.draw} {trajectory.sample}")
        value = evaluate(trajectory.task, trajectory)
        return _score_later(value) if inspect.isawaitable(value) else as_score(value)

    if inspect.iscoroutinefunction(evaluate) or inspect.iscoroutinefunction(evaluate.__call__):
        return evaluate_async
    return evaluate_sync


def _made(evaluator: type) -> Callable[..., Any]:
    if "__call__" not in dir(evaluator) or not any(
        "__call__" in vars(one) for one in evaluator.__mro__
    ):
        raise UserError(
            f"evaluator: {evaluator.__name__} is a class whose objects cannot be called; "
            "give it __call__(self, task, trajectory), or name a function"
        )
    try:
        inspect.signature(evaluator).bind()
    except TypeError as error:
        raise UserError(
            f"evaluator: the class {evaluator.__name__} is made without arguments, but {error}; "
            "give them defaults, or name an object of the class"
        ) from None
    return evaluator()


async def _score_later(value: Any) -> Score:
    return as_score(await value)


def as_score(value: Any) -> Score:
    """Returns an evaluator's result as a Score of plain numbers; raises ValueError for anything else."""
    if not isinstance(value, Score):
        return Score(_number(value, "the evaluator's result"))
    valid = scalar(value.valid)  # a NumPy comparison gives a NumPy bool
    if not isinstance(valid, bool) or not isinstance(value.reason, (str, type(None))):
        raise ValueError("Score.valid must be a bool and Score.reason a str")
    if not valid:
        return _invalid(value.reason or "the evaluator calls it invalid")
    fields = {"parts": value.parts, "metrics": value.metrics}
    for field, found in fields.items():
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"Score.{field} must be a dict of names and numbers")
    parts, metrics = (
        {name: _number(one, f"Score.{field}[{name!r}]") for name, one in found.items()}
        for field, found in fields.items()
    )
    return Score(_number(value.reward, "Score.reward"), parts, True, value.reason or "", metrics)


# Advice by the type of a result that is no number.
_WAYS_OUT = {
    "NoneType": "return one on every path",
    "dict": "return Score(reward, parts={...}, metrics={...})",
    "tuple": "return Score(reward, parts={...}), or the reward alone",
    "str": "convert it with float()",
}


def _number(value: Any, name: str) -> float:
    given, value = value, scalar(value)
    if not isinstance(value, (numbers.Real, decimal.Decimal)):
        kind = type(given).__name__
        shape = f" of shape {tuple(given.shape)}" if hasattr(given, "shape") else ""
        way_out = f"; {_WAYS_OUT[kind]}" if kind in _WAYS_OUT else ""
        raise ValueError(f"{name} must be a number, not {kind}{shape}{way_out}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, not {number}")
    if abs(number) > FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32, not {number}")
    return number


def _invalid(reason: str) -> Score:
    return Score(0.0, valid=False, reason=reason)


def _sum_of_turns(trajectory: Trajectory) -> Score:
    try:
        return Score(_number(math.fsum(trajectory.turn_rewards), "the sum of the turn rewards"))
    except (ValueError, OverflowError) as error:
        return _invalid(str(error))


def _seed_generators(text: str) -> None:
    random.seed(text)
    numpy = sys.modules.get("numpy")  # not imported for this: a worker starts quickly
    if numpy is not None:
        numpy.random.seed(zlib.crc32(text.encode()))
