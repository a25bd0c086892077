"""A task stream ordered by user code: `tasks.sampling` names a weight function or a curriculum class."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rftjax.errors import UserError
from rftjax.tasks import TaskStream
from rftjax.types import Task, Trajectory
from rftjax.workers.user_code import load_function, traceback_text

Weigh = Callable[[Sequence[Task], int, list[list[float]]], Sequence[float]]


def task_stream(tasks: Sequence[Task], seed: int, sampling: str = "") -> TaskStream:
    """Returns the stream that `sampling` names; "" is each task once an epoch, in a seeded order.

    "file.py:name" names a class or a function. The class is instantiated as `Name(tasks, seed)` and has `next(count)`,
    which returns indices into `tasks`, `state()` and `restore(state)` with JSON data, and optionally `observe(places,
    rewards)`, which gets the indices drawn in a step and the rewards of each group. The function `weights(tasks, draw,
    rewards)` is called before each step with the number of its first draw and each task's mean rewards so far, and
    returns one weight a task.
    """
    return (
        ChosenStream(tasks, seed=seed, sampling=sampling)
        if sampling
        else TaskStream(tasks, seed=seed)
    )


class ChosenStream(TaskStream):
    """A stream whose tasks the object of `tasks.sampling` chooses; the stream's state includes the object's."""

    def __init__(self, tasks: Sequence[Task], *, seed: int, sampling: str) -> None:
        super().__init__(tasks, seed=seed)
        self._name = f"tasks.sampling={sampling!r}"
        self._chosen: dict[int, int] = {}  # draw -> index of its task, until its rewards are known
        found = load_function(sampling, field="tasks.sampling")
        if inspect.isclass(found):
            self._chooser = self._call(found, self.tasks, seed)
        else:
            self._chooser = _Weighted(found, self.tasks, seed)
        missing = [
            name
            for name in ("next", "state", "restore")
            if not callable(getattr(self._chooser, name, None))
        ]
        if missing:
            raise UserError(
                f"{self._name}: must have the methods next, state and restore, and lacks {', '.join(missing)}; "
                "without a state a resumed run would draw other tasks"
            )

    def task(self, draw: int) -> Task:
        """Task of a draw whose rewards are not yet known."""
        return self.tasks[self._chosen[draw]]

    def next(self, count: int) -> list[tuple[int, Task]]:
        """The next `count` draws, each with its number."""
        places = self._choose(count)
        draws = range(self.draw, self.draw + count)
        self.draw += count
        self._chosen |= dict(zip(draws, places, strict=True))
        return [(draw, self.task(draw)) for draw in draws]

    def upcoming(self, count: int) -> list[Task]:
        """Tasks that `next` would draw now; the object's state is restored."""
        before = self._stored()
        places = self._choose(count)
        self._call(self._chooser.restore, before)
        return [self.tasks[place] for place in places]

    def observe(self, trajectories: Iterable[Trajectory]) -> None:
        """Passes the rewards of each draw to the object, in order of draws and without invalid scores."""
        rewards: dict[int, list[float]] = {}
        for one in trajectories:
            found = rewards.setdefault(one.draw, [])
            if one.score is not None and one.score.valid:
                found.append(one.score.reward)
        draws = sorted(rewards)
        places = [self._chosen.pop(draw) for draw in draws]
        if callable(hear := getattr(self._chooser, "observe", None)):
            self._call(hear, places, [rewards[draw] for draw in draws])

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here, as JSON-able values."""
        return {**super().state(), "sampling": self._stored(), "chosen": list(self._chosen.items())}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the stream and the object; raises UserError for the state of other tasks or another seed."""
        super().restore(state)
        self._call(self._chooser.restore, state["sampling"])
        self._chosen = dict(state.get("chosen", ()))

    def _choose(self, count: int) -> list[int]:
        places = self._call(self._chooser.next, count)
        try:
            places = [int(place) for place in places if place == int(place)]
        except (TypeError, ValueError, OverflowError):
            places = []
        if len(places) != count or not all(0 <= place < len(self.tasks) for place in places):
            raise UserError(
                f"{self._name}: next({count}) must return {count} places in the list of tasks, whole numbers from 0 to "
                f"{len(self.tasks) - 1}"
            )
        return places

    def _stored(self) -> Any:
        """A copy of the object's state as JSON data, which later steps do not change."""
        state = self._call(self._chooser.state)
        try:
            return json.loads(json.dumps(state, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self._name}: state() must return what JSON can say, for checkpoints keep it ({error}); "
                "turn arrays into lists and NaN into None"
            ) from error

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError:
            raise
        except Exception as error:
            name = getattr(function, "__name__", "the object")
            raise UserError(f"{self._name}: {name} raised this\n{traceback_text(error)}") from error


class _Weighted:
    """Draws tasks by the weights of the user's function, without repeats in a call while enough tasks remain."""

    def __init__(self, weigh: Weigh, tasks: Sequence[Task], seed: int) -> None:
        self._weigh, self._tasks, self._seed = weigh, tasks, seed
        self._draw = 0
        self._means: dict[int, list[float]] = {}

    def next(self, count: int) -> list[int]:
        means = [list(self._means.get(place, ())) for place in range(len(self._tasks))]
        weights = np.asarray(self._weigh(self._tasks, self._draw, means), np.float64)
        if weights.shape != (len(self._tasks),) or not (
            np.isfinite(weights).all() and (weights >= 0).all()
        ):
            raise UserError(
                f"tasks.sampling: the weights must be {len(self._tasks)} finite numbers of at least 0, one a task"
            )
        if not weights.any():
            raise UserError(
                "tasks.sampling: one weight at least must be above 0, for else nothing can be drawn"
            )
        places: list[int] = []
        while len(places) < count:
            places += self._drawn(weights, count - len(places), len(places))
        self._draw += count
        return places

    def _drawn(self, weights: np.ndarray, count: int, before: int) -> list[int]:
        """Weighted sampling without replacement by the largest of log(u) / weight (Efraimidis, Spirakis 2006)."""
        seeds = np.random.SeedSequence(self._seed, spawn_key=(self._draw, before))
        uniform = ((np.random.PCG64(seeds).random_raw(len(weights)) >> 11) + 0.5) * 2.0**-53
        possible = np.flatnonzero(weights)
        keys = np.log(uniform[possible]) / weights[possible]
        return possible[np.argsort(-keys, kind="stable")[:count]].tolist()

    def observe(self, places: Sequence[int], rewards: Sequence[Sequence[float]]) -> None:
        for place, group in zip(places, rewards, strict=True):
            if group:
                self._means.setdefault(place, []).append(math.fsum(group) / len(group))

    def state(self) -> Any:
        return {
            "draw": self._draw,
            "means": {str(place): found for place, found in self._means.items()},
        }

    def restore(self, state: Any) -> None:
        self._draw = state["draw"]
        self._means = {int(place): list(found) for place, found in state["means"].items()}
