"""What the engine knows of a conversation, and of a dispatch that is under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rftjax.sampler.pool import Prompt, Saved
from rftjax.types import SamplingParams

Key = tuple[int, int]  # of a conversation: draw and sample
NoiseKey = tuple[int, int, int]  # stream, draw, sample
# Of a turn's tokens, and how many of them were looked at before: how many there are up to the end of the first stop
# string, 0 where there is none.
FindStop = Callable[[list[int], int], int]


@dataclasses.dataclass
class SampledTurn:
    """One finished turn: token ids (what stopped it included), log-probabilities, and whether a stop token or a stop
    string ended it; `stop_token` is the id that did, -1 for a stop string or a cut turn. `experts` are those of the
    conversation so far, but for the last token, which no call has computed; None where none are recorded."""

    key: Key
    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    stop_token: int = -1
    experts: Any = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(eq=False)
class Conversation:
    key: Key
    noise: NoiseKey
    params: SamplingParams
    tokens: list[int]
    prompt: list[int]
    group: Prompt
    cached: int = 0  # tokens whose keys and values lie in the cache
    budget: int = 0  # tokens that this turn may still sample; 0 while the environment thinks
    slot: int = -1
    parked: int = -1
    saved: Saved | None = None  # its row, in the host's memory
    given: bool = False  # the device has this turn's row and goes on with it by itself
    turn: int = 0
    turn_tokens: list[int] = dataclasses.field(default_factory=list)
    turn_logprobs: list[float] = dataclasses.field(default_factory=list)
    find_stop: FindStop | None = None
    rank: int = 0

    @property
    def order(self) -> tuple[int, int, tuple[int, int, int]]:
        """Sorts the queue by rank, then those that may run longest first, then in the order of their noise keys."""
        return self.rank, -self.budget, self.noise


@dataclasses.dataclass
class Flight:
    """A dispatch that the device works on: the conversations it runs with their slots and turns, and its results."""

    running: list[tuple[Conversation, int, int]]
    most: int  # steps
    enough: int
    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    steps: jax.Array
