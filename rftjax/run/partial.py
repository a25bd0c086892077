"""Samples the batch of a step from more groups than it has, and carries those that are not complete into the next."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from rftjax.devices import processes
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

    Of several processes each takes its share of a step's groups, keeps its share of those ahead under way, and goes on
    with what it sampled itself: it draws as many as it takes, whatever the others have completed.
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
        self._draws: list[tuple[int, Task]] = []  # under way in this process
        self._under_way = 0  # in all of them

    def take(self, state: TrainState, wanted: int) -> list[Trajectory]:
        """Returns its share of `wanted` groups: the first that are complete, sampled to their ends from the state."""
        self._use(state)
        more = max(0, self.ahead - self._under_way)
        new = self.stream.next(more + wanted)
        # Shared out apart: as many as a process takes, and as many as stay under way.
        self._draws += [*processes.share(new[:more]), *processes.share(new[more:])]
        self._under_way = self.ahead
        own = len(processes.share(range(wanted)))
        with processes.together():
            trajectories = self._sample(self._draws, own) if own else []
        taken = {one.draw for one in trajectories}
        self._draws = [(draw, task) for draw, task in self._draws if draw not in taken]
        return trajectories

    def begin(self, state: TrainState, *, last: bool) -> None:
        """Frees what the update needs; nothing is begun before it ends."""
        self._release()

    def position(self) -> dict[str, Any]:
        """Returns the stream's state and what is carried, for a checkpoint; all processes call it together."""
        turns = [
            dataclasses.asdict(one) | {"experts": _to_text(one.experts)}
            for one in self.rollout.carried.values()
        ]
        everywhere = processes.gather(([draw for draw, _ in self._draws], turns))
        # In turn one of each process, which `share` gives back to it.
        places = itertools.zip_longest(*(draws for draws, _ in everywhere))
        draws = [draw for place in places for draw in place if draw is not None]
        carried = [one for _, turns in everywhere for one in turns]
        return self.stream.state() | {"carried": {"draws": draws, "turns": carried}}

    def restore(self, position: dict[str, Any]) -> None:
        """Goes on from what `position` returned."""
        self.stream.restore(position)
        found = position["carried"]
        self._under_way = len(found["draws"])
        # Others than it had where there are more or fewer processes than then.
        own = processes.share(found["draws"])
        self._draws = [(draw, self.stream.task(draw)) for draw in own]
        turns = [
            Carried(**fields | {"experts": _from_text(fields.get("experts", ""))})
            for fields in found["turns"]
            if fields["draw"] in own
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
