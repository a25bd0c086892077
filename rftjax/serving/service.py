"""An engine that serves requests: they come from any thread at any time, and one thread runs the engine.

Requests join between two dispatches, first come, first served, and share one prefix cache.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from rftjax.sampler.engine import Engine, FindStop, Key, NoiseKey, SampledTurn
from rftjax.types import SamplingParams

# Who comes during a dispatch waits for its end. Before one, an engine at rest, or one with conversations whose next
# turn may come at once, waits so long for a further request, and so long in all: seconds, and shares of the last
# dispatch's time (of so many seconds at most), whichever is more.
GATHER_S, GATHER_MOST_S = 0.005, 0.05
GATHER_SHARE, GATHER_MOST_SHARE, DISPATCH_MOST_S = 0.02, 0.1, 5.0
# Gets what a dispatch added to a turn: tokens and log-probabilities. Called on the engine's thread.
Listener = Callable[[list[int], list[float]], None]


@dataclasses.dataclass(eq=False)
class Call:
    """A turn that is being sampled; `future` has the whole of it."""

    key: Key
    future: concurrent.futures.Future[SampledTurn]
    listener: Listener | None = None
    heard: int = 0  # tokens that the listener has

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # who waits may leave: the engine sets it all the same

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Closed(RuntimeError):
    """Says that a turn ended because its conversation was closed."""


class _Stops:
    """The stops of a conversation, whose strings change with the turn."""

    def __init__(self, always: FindStop | None, turn: FindStop | None) -> None:
        self.always, self.turn = always, turn

    def __call__(self, tokens: list[int], start: int) -> int:
        finders = [find for find in (self.always, self.turn) if find]
        return min((end for find in finders if (end := find(tokens, start))), default=0)


class Service:
    """Runs `engine` in a thread of its own for as long as it is open; every method may be called from any thread.

    Weights are set while no conversation is open, `quiet()` being the way to that.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.fault: Exception | None = None  # the engine's last, which failed all calls
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # What follows belongs to the engine's thread.
        self._stops: dict[Key, _Stops] = {}  # of the open conversations
        self._calls: dict[Key, Call] = {}
        # Steps of the next dispatch: after a rest 1, then twice as many each time. Those who come a little later join
        # soon, and a first token is there early.
        self._most = 1
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Turns that are being sampled, or wait for a slot."""
        return len(self._calls)

    @property
    def conversations(self) -> int:
        """Conversations that are open."""
        return len(self._stops)

    def open(
        self,
        tokens: list[int],
        budget: int,
        noise: NoiseKey,
        params: SamplingParams,
        *,
        find_stop: FindStop | None = None,
        listener: Listener | None = None,
    ) -> Call:
        """Starts a conversation, as `Engine.open` does; `find_stop` finds further stops of this turn."""
        number = next(self._numbers)
        call = Call((number, 0), concurrent.futures.Future(), listener)
        stops = _Stops(self.engine.find_stop, find_stop)

        def begin() -> None:
            self.engine.open(call.key, tokens, budget, noise, params, find_stop=stops, rank=number)
            self._stops[call.key] = stops
            self._calls[call.key] = call

        self._submit(begin, call)
        return call

    def extend(
        self,
        key: Key,
        tokens: list[int],
        budget: int,
        *,
        find_stop: FindStop | None = None,
        listener: Listener | None = None,
    ) -> Call:
        """Starts the next turn of an open conversation, as `Engine.extend` does."""
        call = Call(key, concurrent.futures.Future(), listener)

        def begin() -> None:
            if key not in self._stops:
                raise Closed("the conversation is closed")
            self._stops[key].turn = find_stop
            self.engine.extend(key, tokens, budget)
            self._calls[key] = call

        self._submit(begin, call)
        return call

    def close(self, key: Key, *, keep: bool = False) -> None:
        """Ends a conversation, whatever it does, and frees its row, as `Engine.close` does; ignores one that is not
        open."""
        self._inbox.put(lambda: self._close(key, keep=keep))

    def quiet(self) -> None:
        """Closes every conversation and waits until the engine rests."""
        self.run(lambda: [self._close(key) for key in list(self._stops)])

    def run(self, function: Callable[[], Any]) -> Any:
        """Returns what a function returns that runs between two dispatches."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(work)
        return future.result()

    def stop(self) -> None:
        """Closes every conversation and ends the thread; a second call does nothing."""
        if self._thread.is_alive():
            self.quiet()
            self._inbox.put(None)
            self._thread.join()

    def _submit(self, begin: Callable[[], None], call: Call) -> None:
        def work() -> None:
            try:
                begin()
            except Exception as error:
                call.fail(error)

        self._inbox.put(work)

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        gather_until_s = dispatch_s = 0.0
        while True:
            idle = not self._calls
            further_s = max(GATHER_S, GATHER_SHARE * dispatch_s)
            wait_s = None if idle else min(further_s, gather_until_s - time.monotonic())
            try:
                work = self._inbox.get(wait_s is None or wait_s > 0, wait_s)
            except queue.Empty:
                start_s, before = time.monotonic(), self.active
                self._step()
                gather_until_s = time.monotonic()
                dispatch_s = min(gather_until_s - start_s, DISPATCH_MOST_S)
                if self.active < min(before, self.conversations):  # turns ended, others may follow
                    gather_until_s += GATHER_MOST_SHARE * dispatch_s
                continue
            if work is None:
                return
            work()
            if idle and self._calls:  # the first of what may be many at once
                self._most = 1
                most_s = max(GATHER_MOST_S, GATHER_MOST_SHARE * dispatch_s)
                gather_until_s = time.monotonic() + most_s

    def _step(self) -> None:
        most = self._most if self._most < self.engine.steps else 0
        self._most = min(2 * self._most, self.engine.steps)
        try:
            turns = {turn.key: turn for turn in self.engine.step(most)}
        except Exception as error:
            self._give_up(error)
            return
        for key, call in list(self._calls.items()):
            turn = turns.get(key)
            if call.listener is not None:
                tokens, logprobs = self.engine.sampled(key, call.heard)
                call.heard += len(tokens)
                if tokens:
                    with contextlib.suppress(RuntimeError):  # the listener's event loop has ended
                        call.listener(tokens, logprobs)
            if turn is not None:
                del self._calls[key]
                call.future.set_result(turn)

    def _close(self, key: Key, *, keep: bool = False) -> None:
        if self._stops.pop(key, None) is not None:
            self.engine.close(key, keep=keep)
        if call := self._calls.pop(key, None):
            call.fail(Closed("the conversation was closed"))

    def _give_up(self, error: Exception) -> None:
        """Fails every call by the engine's error and starts with an empty cache."""
        self.fault = error
        for call in self._calls.values():
            call.fail(error)
        self._calls.clear()
        for key in self._stops:
            self.engine.close(key)
        self._stops.clear()
        self.engine.release()
