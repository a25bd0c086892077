"""Samples the batch of a step: when it is asked for, or ahead, while the step before it still trains."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

from rftjax.devices import processes
from rftjax.rollout import Rollout
from rftjax.run.build import Parts
from rftjax.run.partial import Partial
from rftjax.run.sampling import sampling_params
from rftjax.tasks import TaskStream
from rftjax.types import Task, TrainState, Trajectory

Sample = Callable[[list[tuple[int, Task]]], list[Trajectory]]


class Prefetch:
    """Takes draws from the stream and has them sampled; with `max_staleness` 1 one batch ahead of the update.

    `use` hands a state's weights to the sampler (`keep`: as copies that outlive the state), `sample` samples with them,
    `release` frees the sampler's cache and weights. A batch begun ahead is sampled in a thread of its own with the
    weights from before the update under way.
    """

    def __init__(
        self,
        stream: TaskStream,
        prompts: int,
        use: Callable[..., None],
        sample: Sample,
        release: Callable[[], None],
        max_staleness: int = 0,
    ) -> None:
        self.stream, self.prompts, self.max_staleness = stream, prompts, max_staleness
        self._use, self._sample, self._release = use, sample, release
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._begun: concurrent.futures.Future[list[Trajectory]] | None = None
        self._before: dict[str, Any] = {}

    def take(self, state: TrainState, wanted: int) -> list[Trajectory]:
        """Returns this process's groups of the next `wanted` draws: begun ahead, or sampled now from the state."""
        begun, self._begun = self._begun, None
        if begun is None:
            self._use(state)
        with processes.together():
            return begun.result() if begun else self._sample(self._share(wanted))

    def begin(self, state: TrainState, *, last: bool) -> None:
        """Begins the next batch before the state goes to an update, unless this step is the `last` before a pause.

        A pause is whatever needs the sampler or a state that a resumed run can repeat: an evaluation, a checkpoint.
        """
        if last or not self.max_staleness:
            self._release()
            return
        self._before = self.stream.state()
        self._use(state, keep=True)
        self._begun = self._thread.submit(self._sample, self._share(self.prompts))

    def _share(self, wanted: int) -> list[tuple[int, Task]]:
        """Returns those of the next draws that this process samples."""
        return processes.share(self.stream.next(wanted))

    def position(self) -> dict[str, Any]:
        """Returns the stream's state for a checkpoint: draws that were begun and not trained on come again."""
        return self.stream.state() if self._begun is None else self._before

    def restore(self, position: dict[str, Any]) -> None:
        """Goes on from what `position` returned."""
        self.stream.restore(position)

    def close(self) -> None:
        """Waits for what was begun and gives it up."""
        self._thread.shutdown(cancel_futures=True)


def make_prefetch(parts: Parts, stream: TaskStream) -> Prefetch | Partial:
    """Returns what samples the training batches of the stream."""
    config, params = parts.config, sampling_params(parts.config)
    size = config.batch.group_size
    weights, rollout = parts.sampler_weights, parts.rollout

    def sample(draws: list[tuple[int, Task]], **wanted: int) -> list[Trajectory]:
        return rollout(draws, size, params, on_finish=parts.scorer.of_groups(size), **wanted)

    if ahead := config.rollout.partial:
        assert isinstance(rollout, Rollout), "the rules refuse agents"
        return Partial(
            stream,
            rollout,
            weights.load,
            lambda draws, wanted: sample(draws, wanted=wanted),
            weights.release,
            ahead,
        )
    return Prefetch(
        stream, config.batch.prompts, weights.load, sample, weights.release, **config.overlap
    )
