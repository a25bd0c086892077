"""The host's side of the sampler: which conversation lies in which cache row, and when the device works.

A conversation is opened once with its prompt and then alternates between sampling a turn (`busy`) and waiting for its
environment. Its keys and values stay on the device in between, so each token is computed once. Waiting conversations
give their decode slot to others when there are any, and move to parked rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rftjax.models.decoder import Config
from rftjax.models.distribution import Settings
from rftjax.sampler import device
from rftjax.types import Params

ROW_BATCH = 8  # rows a copying call moves; constant, so that it compiles once
STOPS = 16  # room for stop ids; constant, so that their number is not a shape
Key = tuple[int, int]  # of a conversation: draw and sample

GRANULE = 128  # cache lengths are multiples of this


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one conversation is sampled: settings, and the noise key's parts (stream, draw, sample)."""

    noise: tuple[int, int, int]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass
class SampledTurn:
    """One finished turn: token ids (a stop token included), log-probabilities, and whether a stop token ended it."""

    key: Key
    tokens: list[int]
    logprobs: list[float]
    stopped: bool


@dataclasses.dataclass
class _Conversation:
    key: Key
    sampling: Sampling
    tokens: list[int]
    group: tuple[int, ...]  # the prompt
    cached: int = 0  # tokens whose keys and values lie in the cache
    budget: int = 0  # tokens that this turn may still sample; 0 while the environment thinks
    slot: int = -1
    parked: int = -1
    turn_tokens: list[int] = dataclasses.field(default_factory=list)
    turn_logprobs: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Counters:
    """What the device did since the last reset, in tokens, steps and calls."""

    decode_steps: int = 0
    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    copied_rows: int = 0
    dispatches: int = 0


class Engine:
    """Schedules conversations over `slots` decoding rows and `parked` waiting ones.

    `limit` is the number of ids that may be sampled (0: the whole vocabulary). `max_length` bounds every conversation,
    in tokens. The same seed, weights and noise keys give the same tokens whatever the order of arrival or the slot.
    """

    def __init__(
        self,
        config: Config,
        *,
        slots: int = 64,
        parked: int = 0,
        max_length: int = 1024,
        stops: Sequence[int] = (),
        seed: int = 0,
        limit: int = 0,
        dispatch_steps: int = 16,
        prefill_rows: int = 8,
        prefill_chunk: int = 64,
    ) -> None:
        if len(stops) > STOPS:
            raise ValueError(f"sampler.stop: {len(stops)} stop tokens, at most {STOPS}; name fewer")
        self.config, self.slots, self.max_length = config, slots, max_length
        self.limit, self.steps = limit, dispatch_steps
        self.prefill_rows, self.prefill_chunk = prefill_rows, prefill_chunk
        self.stops = set(stops)
        self.counters = Counters()
        self._stops_E = jnp.asarray(list(stops) + [-2] * (STOPS - len(stops)), jnp.int32)
        self._seed = jnp.asarray(seed, jnp.uint32)
        self._params: Params = None
        self._cache: device.Cache | None = None
        self._store: device.Cache | None = None
        self._parked = parked
        self._open: dict[Key, _Conversation] = {}
        self._queue: list[_Conversation] = []
        self._reset_rows()

    def _reset_rows(self) -> None:
        self._free = list(range(self.slots))
        self._free_parked = list(range(self._parked))
        self._groups: dict[tuple[int, ...], int] = {}  # a row that holds the whole prompt
        self._holds: list[tuple[int, ...]] = [()] * self.slots
        self._pending_copies: dict[int, int] = {}  # row: the one it starts as a copy of

    def set_params(self, params: Params) -> None:
        """Takes new weights (from `device.sampler_params`); nothing cached under the old ones is used again."""
        if self._open:
            raise ValueError("weights cannot change while conversations are open; close them first")
        self._params = params
        self.release()

    def release(self) -> None:
        """Frees the cache, for whoever needs the memory between two rounds of sampling."""
        assert not self._open, "conversations are open"
        self._cache = self._store = None
        self._reset_rows()

    def open(self, key: Key, tokens: list[int], budget: int, sampling: Sampling) -> None:
        """Starts a conversation: its first turn samples up to `budget` tokens after the prompt's.

        Conversations with the same prompt share its computation.
        """
        self._check_budget(tokens, budget)
        conversation = _Conversation(key, sampling, list(tokens), tuple(tokens), budget=budget)
        self._open[key] = conversation
        self._queue.append(conversation)

    def extend(self, key: Key, tokens: list[int], budget: int) -> None:
        """Appends what the environment said and starts the next turn."""
        conversation = self._open[key]
        assert conversation.budget == 0, "the turn before is still being sampled"
        self._check_budget(conversation.tokens + tokens, budget)
        conversation.tokens += tokens
        conversation.budget = budget
        conversation.turn_tokens, conversation.turn_logprobs = [], []
        if conversation.slot < 0:
            self._queue.append(conversation)

    def _check_budget(self, tokens: list[int], budget: int) -> None:
        if not tokens or budget < 1 or len(tokens) + budget > self.max_length:
            raise ValueError(
                f"rollout.max_length={self.max_length}: a turn of up to {budget} tokens after {len(tokens)} does not"
                " fit (both must be at least 1); raise rollout.max_length or shorten the prompt"
            )

    def close(self, key: Key) -> None:
        """Ends a conversation and frees its row."""
        conversation = self._open.pop(key)
        if conversation.slot >= 0:
            self._free.append(conversation.slot)
        if conversation.parked >= 0:
            self._free_parked.append(conversation.parked)
        if conversation in self._queue:
            self._queue.remove(conversation)

    @property
    def rows(self) -> int:
        """Rows of the cache at most: those that decode and those that wait."""
        return self.slots + self._parked

    @property
    def busy(self) -> bool:
        """Whether any conversation has tokens to sample."""
        return any(conversation.budget > 0 for conversation in self._open.values())

    def step(self) -> list[SampledTurn]:
        """Fills slots, computes what prompts and environments added, runs one dispatch; returns the turns it ended."""
        assert self._params is not None, "set_params comes first"
        self._admit()
        running = [c for c in self._open.values() if c.slot >= 0 and c.budget > 0]
        if not running:
            return []
        self._reserve(max(len(c.tokens) + min(c.budget, GRANULE) for c in running))
        self._prefill(running)
        return self._decode(running)

    def _admit(self) -> None:
        """Gives slots to queued conversations: those that may run longest first, then in the order of their noise keys.

        A long one that starts late runs on alone, in steps as dear as those of full slots.
        """
        self._queue.sort(key=lambda c: (-c.budget, c.sampling.noise))
        copies: dict[int, int] = {}
        sources: set[int] = set()
        while self._queue:
            conversation = self._queue[0]
            if not self._free and not self._park_one():
                break
            origin = self._groups.get(conversation.group, -1)
            fresh = conversation.cached == 0
            choices = [slot for slot in self._free if slot not in sources]
            if fresh and origin in self._free:
                slot = origin
            elif choices:
                slot = choices[0]
            else:
                break
            self._queue.pop(0)
            self._free.remove(slot)
            shared, near = self._nearest(conversation, slot, copies)
            held = self._holds[slot]
            if held != conversation.group and self._groups.get(held) == slot:
                del self._groups[held]
            self._holds[slot] = conversation.group
            conversation.slot = slot
            if not fresh:
                assert self._cache is not None
                pairs = [(slot, conversation.parked)]
                self._cache = self._move(self._cache, self._store, pairs)
                self._free_parked.append(conversation.parked)
                conversation.parked = -1
            elif origin >= 0:
                # Everything but the last prompt token is shared; that one is the first decode step's input.
                conversation.cached = len(conversation.tokens) - 1
                if origin != slot:
                    copies[slot] = origin
                    sources.add(origin)
            elif shared:
                conversation.cached = shared
                if near != slot:
                    copies[slot] = near
                    sources.add(near)
            self._groups.setdefault(conversation.group, slot)
        self._pending_copies = copies

    def _nearest(
        self, conversation: _Conversation, slot: int, copies: dict[int, int]
    ) -> tuple[int, int]:
        """Returns how many whole chunks of tokens of the prompt another row holds, and which row.

        In whole chunks, so that each token is computed in the same call as it would be in a row of its own.
        """
        size, prompt = self.prefill_chunk, conversation.group
        best = (0, 0, -1)
        for row in (slot, *range(self.slots)):
            held, shared = self._holds[row], 0
            most = min(len(held), len(prompt)) - 1
            while shared + size <= most and held[: shared + size] == prompt[: shared + size]:
                shared += size
            best = max(best, (shared, row not in copies, row), key=lambda found: found[:2])
        return best[0], best[2]

    def _park_one(self) -> bool:
        """Moves one conversation that waits for its environment to a parked row; false where there is none."""
        if not self._free_parked or self._cache is None:
            return False
        for conversation in self._open.values():
            if conversation.slot >= 0 and conversation.budget == 0:
                self._reserve_store()
                assert self._store is not None
                row = self._free_parked.pop()
                self._store = self._move(self._store, self._cache, [(row, conversation.slot)])
                self._free.append(conversation.slot)
                conversation.slot, conversation.parked = -1, row
                return True
        return False

    def _move(
        self, target: device.Cache, source: device.Cache | None, pairs: list[tuple[int, int]]
    ) -> device.Cache:
        """Returns `target` with rows (to, from) of `source` (None: its own) copied into it."""
        for start in range(0, len(pairs), ROW_BATCH):
            part = pairs[start : start + ROW_BATCH]
            to_B = np.full(ROW_BATCH, np.iinfo(np.int32).max, np.int32)
            from_B = np.zeros(ROW_BATCH, np.int32)
            to_B[: len(part)] = [to for to, _ in part]
            from_B[: len(part)] = [origin for _, origin in part]
            target = device.copy_rows(target, source, to_B, from_B)
            self.counters.copied_rows += len(part)
        return target

    def _reserve(self, tokens: int) -> None:
        """Makes room for `tokens` positions a row; the length only grows while conversations are open."""
        length = cache_length(tokens)
        if self._cache is None:
            self._cache = device.new_cache(self.config, self.slots, length)
        elif self._cache[0][0].shape[2] < length:
            self._cache = device.grow(self._cache, length=length)

    def _reserve_store(self) -> None:
        assert self._cache is not None
        length = self._cache[0][0].shape[2]
        if self._store is None:
            self._store = device.new_cache(self.config, self._parked, length)
        elif self._store[0][0].shape[2] < length:
            self._store = device.grow(self._store, length=length)

    def _prefill(self, running: list[_Conversation]) -> None:
        """Computes all tokens but the last of every running conversation, rows that others copy first."""
        while True:
            waiting = self._pending_copies
            self._prefill_chunks([c for c in running if c.slot not in waiting])
            if not waiting:
                return
            assert self._cache is not None
            ready = [(to, origin) for to, origin in waiting.items() if origin not in waiting]
            self._cache = self._move(self._cache, None, ready)
            self._pending_copies = {
                to: origin for to, origin in waiting.items() if origin in waiting
            }

    def _prefill_chunks(self, running: list[_Conversation]) -> None:
        """Computes what these conversations lack, each in chunks of its own, whoever shares the calls."""
        size = self.prefill_chunk
        while pending := [c for c in running if len(c.tokens) - 1 > c.cached]:
            part = pending[: self.prefill_rows]
            rows_B = np.zeros(self.prefill_rows, np.int32)
            tokens_BT = np.zeros((self.prefill_rows, size), np.int32)
            start_B = np.zeros(self.prefill_rows, np.int32)
            count_B = np.zeros(self.prefill_rows, np.int32)
            for row, c in enumerate(part):
                new = c.tokens[c.cached : min(len(c.tokens) - 1, c.cached + size)]
                rows_B[row], start_B[row], count_B[row] = c.slot, c.cached, len(new)
                tokens_BT[row, : len(new)] = new
                c.cached += len(new)
                self.counters.prefilled_tokens += len(new)
            self._cache = device.prefill(
                self.config, self._params, self._cache, rows_B, tokens_BT, start_B, count_B
            )

    def _decode(self, running: list[_Conversation]) -> list[SampledTurn]:
        """Runs one dispatch and takes its tokens."""
        B = self.slots
        token_B, position_B, budget_B = (np.zeros(B, np.int32) for _ in range(3))
        noise_B3 = np.zeros((B, 3), np.int32)
        temperature_B, top_p_B = np.ones(B, np.float32), np.ones(B, np.float32)
        top_k_B = np.zeros(B, np.int32)
        for c in running:
            token_B[c.slot], position_B[c.slot] = c.tokens[-1], len(c.tokens) - 1
            budget_B[c.slot], noise_B3[c.slot] = c.budget, c.sampling.noise
            temperature_B[c.slot] = c.sampling.temperature
            top_p_B[c.slot], top_k_B[c.slot] = c.sampling.top_p, c.sampling.top_k
        filtered = bool((top_p_B < 1).any() or (top_k_B > 0).any())
        rows = device.Rows(
            token_B, position_B, budget_B, noise_B3, Settings(temperature_B, top_p_B, top_k_B)
        )
        # With others waiting, a dispatch ends once an eighth of its rows is idle instead of decoding for the few left.
        enough = len(running) * 7 // 8 if self._queue else 0
        self._cache, _, tokens_BT, logprobs_BT, steps = device.decode(
            self.config,
            self._params,
            self._cache,
            rows,
            self._stops_E,
            self._seed,
            np.int32(enough),
            steps=self.steps,
            filtered=filtered,
            limit=self.limit,
        )
        tokens_BT, logprobs_BT = np.asarray(tokens_BT), np.asarray(logprobs_BT)
        self.counters.decode_steps += int(steps)
        self.counters.dispatches += 1
        return [turn for c in running if (turn := self._take(c, tokens_BT, logprobs_BT))]

    def _take(
        self, c: _Conversation, tokens_BT: np.ndarray, logprobs_BT: np.ndarray
    ) -> SampledTurn | None:
        """Appends a row's new tokens to its conversation; returns the turn where it ended."""
        count = int((tokens_BT[c.slot] >= 0).sum())
        tokens = tokens_BT[c.slot, :count].tolist()
        logprobs = logprobs_BT[c.slot, :count].tolist()
        if not np.isfinite(logprobs_BT[c.slot, :count]).all():
            raise FloatingPointError(
                f"the model's logits are not finite after {len(c.tokens)} tokens of conversation {c.key};"
                " the weights have diverged: lower optim.lr or go back to an earlier checkpoint"
            )
        c.cached = len(c.tokens) - 1 + count
        c.tokens += tokens
        c.turn_tokens += tokens
        c.turn_logprobs += logprobs
        c.budget -= count
        self.counters.sampled_tokens += count
        stopped = bool(tokens) and tokens[-1] in self.stops
        if not stopped and c.budget > 0:
            return None
        c.budget = 0
        return SampledTurn(c.key, c.turn_tokens, c.turn_logprobs, stopped)


def cache_length(tokens: int) -> int:
    """Returns the cache length for `tokens` positions: few distinct ones, at most a third too long."""
    length = GRANULE
    while length < tokens:
        half = length + length // 2
        length = half if tokens <= half and half % GRANULE == 0 else 2 * length
    return length
