import threading

import jax.numpy as jnp
import pytest

from rftjax.run.prefetch import Prefetch
from rftjax.tasks import TaskStream
from rftjax.types import Task, TrainState


def stream():
    return TaskStream([Task(str(i), []) for i in range(8)], seed=0)


def state(step: int) -> TrainState:
    return TrainState(jnp.asarray(step), {}, {}, ())


class Recorded:
    """A sampler that says with which state's weights it sampled which draws, once it is let go."""

    def __init__(self) -> None:
        self.used: list[tuple[int, bool]] = []
        self.released = 0
        self.go = threading.Event()
        self.go.set()

    def use(self, state: TrainState, *, keep: bool = False) -> None:
        self.used.append((int(state.step), keep))

    def sample(self, draws):
        assert self.go.wait(60)
        return [(self.used[-1][0], number) for number, _ in draws]

    def release(self) -> None:
        self.released += 1


def sampling(recorded: Recorded, source: TaskStream, max_staleness: int) -> Prefetch:
    return Prefetch(source, 2, recorded.use, recorded.sample, recorded.release, max_staleness)


def test_without_overlap_every_batch_comes_from_the_newest_weights():
    recorded = Recorded()
    one = sampling(recorded, stream(), 0)
    found = []
    for step in range(3):
        found.append(one.take(state(step), 2))
        one.begin(state(step), last=False)
    one.close()
    assert found == [[(0, 0), (0, 1)], [(1, 2), (1, 3)], [(2, 4), (2, 5)]]
    assert recorded.used == [(0, False), (1, False), (2, False)] and recorded.released == 3


def test_a_batch_begun_ahead_is_one_update_behind_and_never_across_a_pause():
    recorded = Recorded()
    one = sampling(recorded, stream(), 1)
    found = []
    for step in range(4):
        found.append(one.take(state(step), 2))
        one.begin(state(step), last=step == 1)
    one.close()
    # The second batch was begun before the first update; after the pause the third is of the newest weights again.
    assert found == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(2, 4), (2, 5)], [(2, 6), (2, 7)]]
    assert recorded.used == [(0, False), (0, True), (2, False), (2, True), (3, True)]


def test_the_update_goes_on_while_the_next_batch_is_sampled():
    recorded = Recorded()
    one = sampling(recorded, stream(), 1)
    one.take(state(0), 2)
    recorded.go.clear()
    one.begin(state(0), last=False)  # returns although the sampler is held
    recorded.go.set()
    assert one.take(state(1), 2) == [(0, 2), (0, 3)]
    one.close()


def test_a_checkpoint_counts_draws_that_were_begun_as_not_taken():
    source = stream()
    one = sampling(Recorded(), source, 1)
    one.take(state(0), 2)
    before = source.state()
    assert one.position() == before
    one.begin(state(0), last=False)
    assert one.position() == before and source.state() != before
    one.take(state(1), 2)
    assert one.position() == source.state()
    one.close()


def test_an_error_of_the_thread_is_the_runs():
    recorded = Recorded()

    def fails(draws):
        raise FloatingPointError("the model's logits are not finite")

    one = Prefetch(stream(), 2, recorded.use, fails, recorded.release, 1)
    one.begin(state(0), last=False)
    with pytest.raises(FloatingPointError, match="not finite"):
        one.take(state(1), 2)
    one.close()
