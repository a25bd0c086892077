"""The host's side of the sampler: which conversation lies in which cache row, and when the device works.

A conversation is opened once with its prompt and then alternates between sampling a turn (`busy`) and waiting for its
environment. Its keys and values stay on the device in between, so each token is computed once. Waiting conversations
give their decode slot to others when there are any, and move to parked rows; where those are all taken, to the host's
memory, from which they come back as they were.

Dispatches are pipelined: while the device runs one, the host launches the next with the rows known by then, and only
then reads the first one's tokens. A row that ended in the first is idle in the second. When conversations wait for a
slot, idle rows are a waste: the second dispatch is then a short bridge of a few steps, until the host has given them
the free slots. Without a bridge the host reads first and the device waits.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rftjax.devices import sharding
from rftjax.devices.compilation import Program
from rftjax.errors import NotFinite, UserError
from rftjax.models.config import Config
from rftjax.models.distribution import RowSettings
from rftjax.sampler import device
from rftjax.sampler.conversation import (
    Conversation,
    FindStop,
    Flight,
    Key,
    NoiseKey,
    SampledTurn,
)
from rftjax.sampler.counters import Counters
from rftjax.sampler.pool import GRANULE, Piece, Pool
from rftjax.types import Params, SamplingParams

STOPS = 16  # room for stop ids; constant, so that their number is not a shape
SEQUENCE_BITS = 16  # of a noise key's third part: the sample; what is above numbers the sequence
DEFAULT_PARAMS = SamplingParams()


def noise_key(stream: int, draw: int, sample: int, *, sequence: int = 0) -> NoiseKey:
    """Returns what the device folds into the key of a conversation's noise.

    `sequence` numbers the token sequences of a trajectory that starts over: each one draws noise of its own.
    """
    return stream, draw, sample + (sequence << SEQUENCE_BITS)


class Engine:
    """Schedules conversations over `slots` decoding rows and `parked` waiting ones.

    `limit` is the number of ids that may be sampled (0: the whole vocabulary). `max_length` bounds every conversation,
    in tokens; `dispatch_steps` and `bridge_steps` (0: none) are decode steps of a call. The same seed, weights and
    noise keys give the same tokens whatever the order of arrival or the slot. With a mesh, its devices share out the
    rows; both counts of rows are rounded up to a multiple of theirs. `stops` are ids, which the device looks for;
    `find_stop` finds stop strings, of which the device knows nothing: what it sampled behind one is dropped, so that
    the tokens do not depend on where a dispatch ends.
    """

    def __init__(
        self,
        config: Config,
        *,
        slots: int = 64,
        parked: int = 0,
        max_length: int = 1024,
        stops: Sequence[int] = (),
        find_stop: FindStop | None = None,
        seed: int = 0,
        limit: int = 0,
        dispatch_steps: int = 16,
        bridge_steps: int = 0,
        prefill_rows: int = 8,
        prefill_chunk: int = 64,
        mesh: Mesh | None = None,
    ) -> None:
        if len(stops) > STOPS:
            raise UserError(f"sampler.stop: {len(stops)} stop tokens, at most {STOPS}; name fewer")
        shards = sharding.row_multiple(mesh)
        slots, parked = (-(-count // shards) * shards for count in (slots, parked))
        self.config, self.slots, self.max_length = config, slots, max_length
        self.limit, self.mesh = limit, mesh
        self.steps, self.bridge = dispatch_steps, min(bridge_steps, dispatch_steps)
        self.stops, self.find_stop = set(stops), find_stop
        self.counters = Counters()
        stops_E = np.asarray([*stops, *[-2] * (STOPS - len(stops))], np.int32)
        self._stops_E, self._seed = sharding.replicate(mesh, (stops_E, np.uint32(seed)))
        self._params: Params = None
        self.compile_behind: Callable[[list[Program]], None] | None = None
        self._lengths: set[int] = set()  # of the cache, whose next one is compiled or on its way
        self._parked = parked
        self._pool = Pool(
            config,
            slots=slots,
            parked=parked,
            rows=-(-prefill_rows // shards),
            chunk=prefill_chunk,
            mesh=mesh,
        )
        self._open: dict[Key, Conversation] = {}
        self._queue: list[Conversation] = []  # sorted by `order`
        self._last: Conversation | None = None  # opened last
        self.recording = config.routing.recorded  # turns bring the experts of their tokens
        self._reset()

    def _reset(self) -> None:
        self._free = list(range(self.slots))
        self._free_parked = list(range(self._parked))
        self._in_slots: dict[int, Conversation] = {}
        self._pool.clear()
        self._flight: Flight | None = None
        self._rows: device.Rows | None = None
        # Slots whose turn ended on the host while the device goes on with it.
        self._abandoned: set[int] = set()

    def set_params(self, params: Params) -> None:
        """Takes new weights (from `device.sampler_params`); nothing cached under the old ones is used again."""
        if self._open:
            raise UserError("weights cannot change while conversations are open; close them first")
        self._params = params
        self.release()

    def release(self) -> None:
        """Frees the cache, for whoever needs the memory between two rounds of sampling."""
        assert not self._open, "conversations are open"
        self._reset()

    def programs(
        self, params: Params, prompt: int, budget: int, *, filtered: bool = False
    ) -> list[Program]:
        """Returns the calls that sampling begins with, to compile ahead: for prompts of up to `prompt` tokens and turns
        of up to `budget`. The weights may be abstract, and the cache is."""
        tokens = min(prompt + min(budget, self._ahead), self.max_length)
        cache = self._pool.abstract_cache(tokens)
        return [
            self._decode(params, cache, [], self.steps, 0, filtered),
            *self._pool.programs(params, cache),
        ]

    def _look_ahead(
        self, running: list[Conversation], compile_behind: Callable[[list[Program]], None]
    ) -> None:
        """Has the calls of the next cache length compiled while the present one is in use, where a turn may need it."""
        cache = self._pool.cache
        assert cache is not None
        length = device.cache_length(cache)
        longest = max(len(c.tokens) + c.budget for c in running)
        if length in self._lengths or longest <= length:
            return
        self._lengths.add(length)
        abstract, longer = map(self._pool.abstract_cache, (length, length + 1))
        settings = {"length": device.cache_length(longer), "mesh": self.mesh}

        def abstracted(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            place = leaf.sharding if self.mesh else None
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        params = jax.tree.map(abstracted, self._params)
        filtered = any(c.params.filtered for c in running)
        compile_behind(
            [
                self._decode(params, longer, [], self.steps, 0, filtered),
                Program(device.grow, (self.config, abstract), settings),
                *self._pool.programs(params, longer),
            ]
        )

    def open(
        self,
        key: Key,
        tokens: list[int],
        budget: int,
        noise: NoiseKey,
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        find_stop: FindStop | None = None,
        rank: int = 0,
        turn: tuple[list[int], list[float]] | None = None,
    ) -> None:
        """Starts a conversation: its first turn samples up to `budget` tokens after the prompt's.

        Conversations with the same prompt share its computation. Of `params` the limits are the caller's: it sets the
        budget of each turn and decides about the next one. `find_stop` takes the place of the engine's; conversations
        of a lower `rank` get slots first. `turn` holds tokens, the last of `tokens`, and log-probabilities of a turn
        that goes on: it draws the noise that it would have drawn in one piece.
        """
        self._check_budget(len(tokens), budget)
        prompt, last = list(tokens), self._last
        if last is not None and last.prompt == prompt:
            prompt, group = last.prompt, last.group  # hashed once for the group
        else:
            self._check_ids(prompt)
            group = self._pool.prompt(prompt)
        conversation = Conversation(key, noise, params, list(prompt), prompt, group, budget=budget)
        conversation.find_stop, conversation.rank = find_stop or self.find_stop, rank
        if turn is not None:
            conversation.turn_tokens, conversation.turn_logprobs = list(turn[0]), list(turn[1])
        self._open[key] = self._last = conversation
        bisect.insort(self._queue, conversation, key=lambda c: c.order)

    def extend(self, key: Key, tokens: list[int], budget: int) -> None:
        """Appends what the environment said and starts the next turn."""
        conversation = self._open[key]
        assert conversation.budget == 0, "the turn before is still being sampled"
        self._check_budget(len(conversation.tokens) + len(tokens), budget)
        self._check_ids(tokens)
        conversation.tokens += tokens
        conversation.budget = budget
        conversation.turn += 1
        conversation.turn_tokens, conversation.turn_logprobs = [], []
        conversation.given = False
        if conversation.slot < 0:
            bisect.insort(self._queue, conversation, key=lambda c: c.order)

    def _check_budget(self, count: int, budget: int) -> None:
        if count < 1 or budget < 1 or count + budget > self.max_length:
            raise UserError(
                f"rollout.max_length={self.max_length}: a turn of up to {budget} tokens after {count} does not"
                " fit (both must be at least 1); raise rollout.max_length or shorten the prompt"
            )

    def _check_ids(self, tokens: list[int]) -> None:
        vocab, smallest, largest = self.config.vocab, min(tokens, default=0), max(tokens, default=0)
        if smallest < 0 or largest >= vocab:
            raise UserError(
                f"a prompt holds token id {smallest if smallest < 0 else largest}, and the model's embedding has"
                f" vocab_size={vocab} rows; use the tokenizer files that belong to these weights"
            )

    def close(self, key: Key, *, keep: bool = False) -> None:
        """Ends a conversation and frees its row; with `keep` prompts that begin with all of it find it there."""
        conversation = self._open.pop(key)
        if conversation.slot >= 0:
            if keep and not conversation.budget:
                self._pool.hold(conversation.slot, self._pool.prompt(conversation.tokens))
            self._free.append(conversation.slot)
            del self._in_slots[conversation.slot]
            if conversation.budget:
                self._abandoned.add(conversation.slot)
        elif conversation.budget:
            at = bisect.bisect_left(self._queue, conversation.order, key=lambda c: c.order)
            while self._queue[at] is not conversation:
                at += 1
            del self._queue[at]
        if conversation.parked >= 0:
            self._free_parked.append(conversation.parked)

    def sampled(self, key: Key, start: int = 0) -> tuple[list[int], list[float]]:
        """Returns the tokens, from number `start`, and log-probabilities of a turn so far."""
        conversation = self._open[key]
        return conversation.turn_tokens[start:], conversation.turn_logprobs[start:]

    def settle(self) -> list[SampledTurn]:
        """Waits for what the device works on; returns the turns that it ended. Nothing is in flight then."""
        flight, self._flight = self._flight, None
        return self._land(flight) if flight else []

    @property
    def rows(self) -> int:
        """Rows of the cache at most: those that decode and those that wait."""
        return self.slots + self._parked

    @property
    def busy(self) -> bool:
        """Whether any conversation has tokens to sample."""
        return any(conversation.budget > 0 for conversation in self._open.values())

    def step(self, most: int = 0) -> list[SampledTurn]:
        """Fills slots, computes what prompts and environments added, takes one dispatch; returns the turns it ended.

        With `most` a dispatch that is not under way yet has at most so many steps, and none follows before the host
        has looked at it: who comes meanwhile joins soon.
        """
        assert self._params is not None, "set_params comes first"
        copies = self._admit()
        running = [c for c in self._in_slots.values() if c.budget > 0]
        if not running:
            self._flight = None  # its rows are idle
            return []
        self._pool.reserve(max(len(c.tokens) + min(c.budget, self._ahead) for c in running))
        if self.compile_behind:
            self._look_ahead(running, self.compile_behind)
        self._fill(running, copies)
        flight = self._flight or self._launch(running, min(most or self.steps, self.steps))
        left = [c for c in running if not self._surely_ends(c, flight)]
        behind = 0 if most else self._steps_behind(flight)
        self._flight = self._launch(left, behind) if left and behind else None
        return self._land(flight)

    def _admit(self) -> dict[int, int]:
        """Gives slots to queued conversations: those that may run longest first, then in the order of their noise keys.

        A long turn that starts late would decode alone, at the cost of full slots. Returns the rows that start as
        copies, each with its source row.
        """
        copies: dict[int, int] = {}
        sources: set[int] = set()
        while self._queue:
            conversation = self._queue[0]
            if not self._free and not self._park_one():
                break
            origin = self._pool.origin(conversation.group)
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
            # Everything but the last prompt token is shared; that one is the first decode step's input.
            shared, near = len(conversation.tokens) - 1, origin
            if fresh and origin < 0:
                shared, near = self._pool.nearest(conversation.group, slot, copies)
            self._pool.hold(slot, conversation.group)
            conversation.slot = slot
            self._in_slots[slot] = conversation
            if conversation.saved is not None:
                self._pool.restore(slot, conversation.saved)
                conversation.saved = None
            elif not fresh:
                self._pool.unpark(slot, conversation.parked)
                self.counters.copied_rows += 1
                self._free_parked.append(conversation.parked)
                conversation.parked = -1
            elif shared:
                conversation.cached = shared
                if near != slot:
                    copies[slot] = near
                    sources.add(near)
        return copies

    def _park_one(self) -> bool:
        """Moves one conversation that waits for its environment out of its slot; false where none waits."""
        for conversation in self._in_slots.values():
            if conversation.budget == 0:
                if self._free_parked:
                    conversation.parked = self._free_parked.pop(0)
                    self._pool.park(conversation.parked, conversation.slot)
                    self.counters.copied_rows += 1
                else:
                    conversation.saved = self._pool.evict(conversation.slot)
                    self.counters.evicted_rows += 1
                self._free.append(conversation.slot)
                del self._in_slots[conversation.slot]
                conversation.slot = -1
                return True
        return False

    def _fill(self, running: list[Conversation], copies: dict[int, int]) -> None:
        """Prefills all tokens but the last of every running conversation, source rows of copies first."""
        while True:
            pieces: list[Piece] = []
            for c in running:
                if c.slot not in copies and (new := c.tokens[c.cached : -1]):
                    pieces.append((c.slot, c.cached, new))
                    c.cached += len(new)
                    self.counters.prefilled_tokens += len(new)
            self._pool.fill(self._params, pieces)
            if not copies:
                return
            ready = [(to, origin) for to, origin in copies.items() if origin not in copies]
            self._pool.copy(ready)
            self.counters.copied_rows += len(ready)
            copies = {to: origin for to, origin in copies.items() if origin in copies}

    def _surely_ends(self, c: Conversation, flight: Flight) -> bool:
        """Whether the flight samples all that the turn may have."""
        return c.given and flight.enough == 0 and c.budget <= flight.most

    def _steps_behind(self, flight: Flight) -> int:
        """How many steps the next dispatch takes if it is launched before the host has looked at this one."""
        if not self._queue:
            return self.steps
        return self.steps if flight.most < self.steps else self.bridge

    @property
    def _ahead(self) -> int:
        """Room in a row beyond the tokens that the host knows: a dispatch in flight may have sampled `steps`."""
        return max(GRANULE, 2 * self.steps)

    def _launch(self, running: list[Conversation], most: int) -> Flight:
        """Starts one dispatch of at most so many steps."""
        # With others waiting, a dispatch ends once an eighth of its rows is idle.
        enough = len(running) * 7 // 8 if self._queue else 0
        filtered = any(c.params.filtered for c in running)
        abandoned, self._abandoned = list(self._abandoned), set()
        call = self._decode(
            self._params, self._pool.cache, running, most, enough, filtered, abandoned
        )
        with jax.transfer_guard(sharding.GUARD):
            self._pool.cache, self._rows, *sampled = call.run()
        return Flight([(c, c.slot, c.turn) for c in running], most, enough, *sampled)

    def _decode(
        self,
        params: Params,
        cache: Any,
        running: list[Conversation],
        most: int,
        enough: int,
        filtered: bool,
        abandoned: Sequence[int] = (),
    ) -> Program:
        """Returns a dispatch; the host gives it the rows that are new or abandoned, the device has the others."""
        B = self.slots
        token_B, position_B = np.zeros(B, np.int32), np.zeros(B, np.int32)
        budget_B = np.full(B, device.KEPT, np.int32)
        noise_B3 = np.zeros((B, 3), np.int32)
        temperature_B, top_p_B = np.ones(B, np.float32), np.ones(B, np.float32)
        top_k_B = np.zeros(B, np.int32)
        budget_B[list(abandoned)] = 0
        for c in running:
            if not c.given:
                c.given = True
                token_B[c.slot], position_B[c.slot] = c.tokens[-1], len(c.tokens) - 1
                budget_B[c.slot], noise_B3[c.slot] = c.budget, c.noise
                temperature_B[c.slot] = c.params.temperature
                top_p_B[c.slot], top_k_B[c.slot] = c.params.top_p, c.params.top_k
        given = device.Rows(
            token_B, position_B, budget_B, noise_B3, RowSettings(temperature_B, top_p_B, top_k_B)
        )
        arguments = (
            self.config,
            params,
            cache,
            self._rows or device.idle_rows(B, self.mesh),
            sharding.put_rows(self.mesh, device.pack_rows(given)),
            self._stops_E,
            self._seed,
            sharding.replicate(self.mesh, np.asarray([most, enough], np.int32)),
        )
        settings = {"steps": self.steps, "filtered": filtered, "limit": self.limit}
        return Program(device.decode, arguments, settings | {"mesh": self.mesh})

    def _land(self, flight: Flight) -> list[SampledTurn]:
        """Waits for a dispatch and takes its tokens; returns the turns that it ended."""
        with jax.transfer_guard(sharding.GUARD):
            results = jax.device_get((flight.tokens_BT, flight.logprobs_BT, flight.steps))
        tokens_BT, logprobs_BT, steps = results
        self.counters.decode_steps += int(steps)
        self.counters.dispatches += 1
        self._pool.arrived()
        turns = []
        for c, slot, number in flight.running:
            count = int((tokens_BT[slot] >= 0).sum())
            # A turn that ended in the previous dispatch has no tokens here, or some behind its stop string; its
            # conversation may be closed, or in its next turn.
            if count and self._open.get(c.key) is c and c.turn == number and c.budget > 0:
                tokens = tokens_BT[slot, :count].tolist()
                turn = self._take(c, tokens, logprobs_BT[slot, :count].tolist())
                if turn is not None:
                    turn.experts = self._pool.chosen(slot, c.cached) if self.recording else None
                    turns.append(turn)
        return turns

    def _take(
        self, c: Conversation, tokens: list[int], logprobs: list[float]
    ) -> SampledTurn | None:
        """Appends a row's new tokens to its conversation; returns the turn where it ended."""
        before = len(c.turn_tokens)
        end = c.find_stop(c.turn_tokens + tokens, before) if c.find_stop else 0
        if end:
            tokens, logprobs = tokens[: end - before], logprobs[: end - before]
            self._abandoned.add(c.slot)
        if not np.isfinite(logprobs).all():
            raise NotFinite(
                f"the model's logits are not finite after {len(c.tokens)} tokens of conversation {c.key}."
                " Where training made the weights so, give a lower --config.optim.lr and go on from the last"
                " checkpoint, from an earlier one by --restart_from=STEP, or in a new workdir. Where the base model"
                " does this, set model.dtype='float32' or give another model.path"
            )
        c.cached = len(c.tokens) - 1 + len(tokens)
        c.tokens += tokens
        c.turn_tokens += tokens
        c.turn_logprobs += logprobs
        c.budget -= len(tokens)
        self.counters.sampled_tokens += len(tokens)
        stop_token = tokens[-1] if tokens[-1] in self.stops else -1
        stopped = bool(end) or stop_token >= 0
        if not stopped and c.budget > 0:
            return None
        c.budget = 0
        return SampledTurn(c.key, c.turn_tokens, c.turn_logprobs, stopped, stop_token)
