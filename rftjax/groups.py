"""Which groups of a call are complete, what is carried of the others into the next, and which tasks run long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from rftjax.types import Task, Trajectory

Finish = Callable[[Trajectory], None]


class Begun(Protocol):
    """An episode under way."""

    trajectory: Trajectory


Episode = TypeVar("Episode", bound=Begun)


@dataclasses.dataclass
class Carried:
    """What was sampled of a conversation whose group is not complete, one entry a token; `ended` where its turn is.

    `experts` are those of the whole sequence where the turn has ended; else the next call chooses them again.
    """

    draw: int
    sample: int
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    ended: bool = False
    stopped: bool = False
    stop_token: int = -1
    experts: Any = dataclasses.field(default=None, compare=False, repr=False)


class Groups(Generic[Episode]):
    """The episodes of a call by draw; with `wanted` only the first so many groups that are complete count."""

    def __init__(self, size: int, wanted: int, on_finish: Finish) -> None:
        self.size, self.wanted, self.on_finish = size, wanted, on_finish
        self.begun: dict[int, list[Episode]] = {}
        self.ended: dict[int, list[Trajectory]] = {}
        self.complete: list[int] = []

    def begin(self, episode: Episode) -> Episode:
        self.begun.setdefault(episode.trajectory.draw, []).append(episode)
        return episode

    def end(self, episode: Episode) -> None:
        """Takes an episode that ended, and tells of it once it is known to count."""
        trajectory = episode.trajectory
        group = self.ended.setdefault(trajectory.draw, [])
        group.append(trajectory)
        if not self.wanted:
            self.on_finish(trajectory)
        elif len(group) == self.size and not self.enough:
            self.complete.append(trajectory.draw)
            for one in sorted(group, key=_place):
                self.on_finish(one)

    @property
    def enough(self) -> bool:
        """Whether as many groups as are wanted are complete."""
        return 0 < self.wanted == len(self.complete)

    def rest(self) -> Iterator[Episode]:
        """Yields the episodes that do not count."""
        for draw, group in self.begun.items():
            yield from () if draw in self.complete else group

    def trajectories(self) -> list[Trajectory]:
        """Returns what counts, in order."""
        draws = self.complete if self.wanted else list(self.ended)
        return sorted((one for draw in draws for one in self.ended[draw]), key=_place)


class Lengths:
    """Tokens of a task's last answers on average, by which long ones get slots first and do not decode alone."""

    def __init__(self) -> None:
        self._means: dict[tuple[int, str], float] = {}
        self._sum = 0.0

    def rank(self, stream: int, task: Task) -> int:
        """Returns the engine's rank of a conversation; a task that was not yet answered counts as a usual one."""
        usual = self._sum / max(len(self._means), 1)
        return -round(self._means.get((stream, task.id), usual))

    def take(self, stream: int, trajectories: Iterable[Trajectory]) -> None:
        """Takes the answers of a call."""
        counts: dict[tuple[int, str], list[int]] = {}
        for one in trajectories:
            tokens = sum(sum(sequence.sampled) for sequence in one.sequences)
            counts.setdefault((stream, one.task.id), []).append(tokens)
        for key, found in counts.items():
            mean = sum(found) / len(found)
            self._sum += mean - self._means.get(key, 0.0)
            self._means[key] = mean


def _place(trajectory: Trajectory) -> tuple[int, int]:
    return trajectory.draw, trajectory.sample
