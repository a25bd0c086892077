"""Takes the place of the sampler's calls on the device, to look at the host alone; nothing is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rftjax.sampler import device


class StandIn:
    """Takes the device's calls: nothing is computed, a row's tokens are random words and end with a stop token.

    `length` says after how many tokens, prompt included, a sample of a draw ends; else its turns take all they may.
    """

    def __init__(
        self, words: list[int], stop: int, length: Callable[[int, int], int] | None = None
    ) -> None:
        self.words_N, self.stop, self.length = np.asarray(words, np.int32), stop, length
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def prefill(self, config: Any, params: Any, cache: Any, *new: Any, mesh: Any = None) -> Any:
        """Returns the cache as it is."""
        self.calls += 1
        return cache

    def copy_rows(self, config: Any, cache: Any, *moves: Any, mesh: Any = None) -> Any:
        """Returns the cache as it is."""
        self.calls += 1
        return cache

    def decode(self, config: Any, params: Any, cache: Any, rows: Any, *rest: Any, **settings: Any):
        """Returns what `device.decode` does; `rows` hold the budgets that are left."""
        self.calls += 1
        given_B9, bounds_2 = np.asarray(rest[0]), np.asarray(rest[3])
        left_B = rows[0] if type(rows) is tuple else np.zeros(len(given_B9), np.int32)
        left_B = np.where(given_B9[:, 2] != device.KEPT, given_B9[:, 2], left_B)
        for row in np.flatnonzero(given_B9[:, 2] > 0):
            if self.length is None:
                break
            _, position, budget, _, draw, sample, *_ = given_B9[row].tolist()
            left_B[row] = min(budget, self.length(draw, sample) - position - 1)
        most, enough = bounds_2.tolist()
        steps = 0
        while steps < most and (left_B > steps).sum() > enough:
            steps += 1
        shape = len(left_B), settings["steps"]
        tokens_BT = self.words_N[self.rng.integers(0, len(self.words_N), shape)]
        step_T = np.arange(shape[1])
        tokens_BT = np.where(step_T == left_B[:, None] - 1, self.stop, tokens_BT)
        taken_BT = (step_T < left_B[:, None]) & (step_T < steps)
        tokens_BT = np.where(taken_BT, tokens_BT, -1)
        logprobs_BT = np.where(taken_BT, np.float32(-1.0), np.float32(0.0))
        results = tokens_BT, logprobs_BT, np.int32(steps)
        return cache, (np.maximum(left_B - steps, 0),), *jax.device_put(results)


class Timed(StandIn):
    """A stand-in that takes the time of a device."""

    def __init__(self, words: list[int], stop: int, decode_s: float, prefill_s: float) -> None:
        super().__init__(words, stop)
        self.decode_s, self.prefill_s, self.busy_s = decode_s, prefill_s, 0.0

    def _work(self, seconds: float) -> None:
        start = time.perf_counter()
        time.sleep(seconds)
        self.busy_s += time.perf_counter() - start

    def prefill(self, *given: Any, **settings: Any) -> Any:
        """Sleeps as long as a prefill takes."""
        self._work(self.prefill_s)
        return super().prefill(*given, **settings)

    def decode(self, *given: Any, **settings: Any):
        """Sleeps as long as the decode steps take."""
        found = super().decode(*given, **settings)
        self._work(int(found[-1]) * self.decode_s)
        return found


class Replaced:
    """Puts the stand-in in the place of the device's calls."""

    NAMES = ("prefill", "copy_rows", "decode")

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin

    def __enter__(self) -> None:
        self.own = {name: getattr(device, name) for name in self.NAMES}
        for name in self.NAMES:
            setattr(device, name, getattr(self.standin, name))

    def __exit__(self, *_: object) -> None:
        for name, function in self.own.items():
            setattr(device, name, function)
