"""Samples the batch of a step from more groups than it has, and carries those that are not complete into the next."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from rftjax.groups import Carried
from rftjax.rollout import Rollout
from rftjax.tasks import TaskStream
from rftjax.types import Task, TrainState, Trajectory

Sample = Callable[[list[tuple[int, Task]], int], list[Trajectory]]


class Partial:
    """Takes the place of `Prefetch` where `ahead` further groups are under way beside those of a step.

    `use` hands a state's weights to the sampler, `sample` samples draws until so many groups are complete, `release`
    frees the sampler's cache and weights. What was sampled of the others lies in `rollout.carried` and goes into
    checkpoints with the stream, so that a resumed run goes on with the same tokens.
    """

    def __init__(
        self,
        stream: TaskStream,
        rollout: Rollout,
        use: Callable[..., None],
        sample: Sample,
        release: Callable[[], None],
        ahead: int,
    ) -> None:
        self.stream, self.rollout, self.ahead = stream, rollout, ahead
        self._use, self._sample, self._release = use, sample, release
        self._draws: list[tuple[int, Task]] = []  # under way

    def take(self, state: TrainState, wanted: int) -> list[Trajectory]:
        """Returns the first `wanted` groups that are complete, sampled to their ends with the state's weights."""
        self._use(state)
        new = self.stream.next(max(0, wanted + self.ahead - len(self._draws)))
        draws = [*self._draws, *new]
        trajectories = self._sample(draws, wanted)
        taken = {one.draw for one in trajectories}
        self._draws = [(draw, task) for draw, task in draws if draw not in taken]
        return trajectories

    def begin(self, state: TrainState, *, last: bool) -> None:
        """Frees what the update needs; nothing is begun before it ends."""
        self._release()

    def position(self) -> dict[str, Any]:
        """Returns the stream's state and what is carried, for a checkpoint."""
        carried = [
            dataclasses.asdict(one) | {"experts": _to_text(one.experts)}
            for one in self.rollout.carried.values()
        ]
        draws = [draw for draw, _ in self._draws]
        return self.stream.state() | {"carried": {"draws": draws, "turns": carried}}

    def restore(self, position: dict[str, Any]) -> None:
        """Goes on from what `position` returned."""
        self.stream.restore(position)
        found = position["carried"]
        self._draws = [(draw, self.stream.task(draw)) for draw in found["draws"]]
        turns = [
            Carried(**fields | {"experts": _from_text(fields.get("experts", ""))})
            for fields in found["turns"]
        ]
        self.rollout.carried = {(one.draw, one.sample): one for one in turns}

    def close(self) -> None:
        """Does nothing: no thread samples ahead."""


def _to_text(array: Any) -> str:
    """Returns an array as JSON can hold it, None as an empty text."""
    if array is None:
        return ""
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _from_text(text: str) -> np.ndarray | None:
    """Returns what `_to_text` was given."""
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) if text else None
