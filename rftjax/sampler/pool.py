"""The KV cache on the host's side: which prompt each row holds, and the calls that fill, copy and park rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rftjax.devices import sharding
from rftjax.devices.compilation import Program
from rftjax.models import CHOSEN
from rftjax.models.config import Config
from rftjax.sampler import device
from rftjax.sampler.chosen import Chosen
from rftjax.types import Params

COPIES = 8  # rows a copying call moves; constant, so that it compiles once
GRANULE = 128  # cache lengths are multiples of this
Piece = tuple[int, int, list[int]]  # a row, the position of its first new token, and the new tokens
Saved = list[dict[str, np.ndarray]]  # what the cache holds of one row, without its axis of rows


class Prompt:
    """Digests of a prompt: `whole`, and `starts` of its beginnings in whole chunks that leave a token over."""

    def __init__(self, tokens: Sequence[int], chunk: int) -> None:
        data = np.asarray(tokens, np.int32)
        state, self.starts = hashlib.blake2b(digest_size=16), list[bytes]()
        for end in range(chunk, len(data), chunk):
            state.update(data[end - chunk : end].tobytes())
            self.starts.append(state.digest())
        state.update(data[len(self.starts) * chunk :].tobytes() + b"whole")
        self.whole = state.digest()


class Pool:
    """A cache of `slots` decoding rows and a store of `parked` waiting ones.

    `rows` and `chunk` are how many rows, on each device that has rows, and tokens of a row one prefill call computes.
    """

    def __init__(
        self,
        config: Config,
        *,
        slots: int,
        parked: int,
        rows: int,
        chunk: int,
        mesh: Mesh | None = None,
    ) -> None:
        self.config, self.slots, self.parked, self.mesh = config, slots, parked, mesh
        self.rows, self.chunk = rows, chunk
        self.shards = sharding.row_multiple(mesh)
        self.cache: device.Cache | None = None
        self._store: device.Cache | None = None
        self.clear()

    def clear(self) -> None:
        """Frees the memory; no row holds anything any more."""
        self.cache = self._store = None
        self._groups: dict[bytes, int] = {}  # a row that holds the whole prompt
        self._starting: dict[bytes, set[int]] = {}  # the rows that begin with these chunks
        self._holds: list[Prompt | None] = [None] * self.slots
        # Copies that wait for `settle`: of parked rows from decoding ones, then of decoding rows from parked ones.
        self._parking: dict[int, int] = {}
        self._unparking: dict[int, int] = {}
        self._reading: list[Chosen] = []  # on their way to the host

    def prompt(self, tokens: Sequence[int]) -> Prompt:
        """Returns the digests of a prompt, by which rows that begin alike are found."""
        return Prompt(tokens, self.chunk)

    def origin(self, prompt: Prompt) -> int:
        """Returns a row that holds the whole prompt, or -1."""
        return self._groups.get(prompt.whole, -1)

    def hold(self, row: int, prompt: Prompt) -> None:
        """Notes that the row begins with this prompt from now on."""
        held = self._holds[row]
        if held is not None and held.whole != prompt.whole:
            if self._groups.get(held.whole) == row:
                del self._groups[held.whole]
            for start in held.starts:
                self._starting[start].discard(row)
                if not self._starting[start]:
                    del self._starting[start]
        self._holds[row] = prompt
        self._groups.setdefault(prompt.whole, row)
        for start in prompt.starts:
            self._starting.setdefault(start, set()).add(row)

    def nearest(self, prompt: Prompt, row: int, avoid: Iterable[int]) -> tuple[int, int]:
        """Returns how many first tokens of the prompt a row holds, and that row: `row` if it can, else rather not one
        of `avoid`.

        Counts whole chunks, so that each token is computed by the same call as in a row of its own.
        """
        for count in range(len(prompt.starts), 0, -1):
            if rows := self._starting.get(prompt.starts[count - 1]):
                best = min(rows, key=lambda other: (other in avoid, other != row, other))
                return count * self.chunk, best
        return 0, row

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` positions in every decoding row; the length only grows until `clear`."""
        self.settle()
        self.cache = self._sized(self.cache, self.slots, cache_length(tokens))

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies decoding rows, pairs of (to, from)."""
        self.settle()
        assert self.cache is not None
        self.cache = self._move(self.cache, None, pairs)

    def park(self, row: int, slot: int) -> None:
        """Notes that a parked row becomes a copy of a decoding one by the next `settle`."""
        if row in self._parking or row in self._unparking.values() or slot in self._unparking:
            self.settle()
        self._parking[row] = slot

    def unpark(self, slot: int, row: int) -> None:
        """Notes that a decoding row becomes a copy of a parked one by the next `settle`."""
        if slot in self._unparking or row in self._parking:
            self.settle()
        self._unparking[slot] = row

    def settle(self) -> None:
        """Makes the copies that were noted, many in a call; what reads or fills decoding rows does so first."""
        if self._parking:
            assert self.cache is not None
            self._store = self._sized(self._store, self.parked, device.cache_length(self.cache))
            self._store = self._move(self._store, self.cache, list(self._parking.items()))
        if self._unparking:
            assert self.cache is not None
            self.cache = self._move(self.cache, self._store, list(self._unparking.items()))
        self._parking, self._unparking = {}, {}

    def evict(self, slot: int) -> Saved:
        """Returns a decoding row as a copy in the host's memory, bit for bit what it holds."""
        self.settle()
        assert self.cache is not None
        # A mesh needs at least one row a device; only the first holds data.
        length = device.cache_length(self.cache)
        block = device.new_cache(self.config, self.shards, length, self.mesh)
        taken = jax.device_get(self._move(block, self.cache, [(0, slot)]))
        return jax.tree.map(lambda leaf: leaf[0].copy(), taken)

    def restore(self, slot: int, saved: Saved) -> None:
        """Puts what `evict` returned into a decoding row."""
        self.settle()
        assert self.cache is not None

        def place(row: np.ndarray, like: jax.Array) -> jax.Array:
            block = np.zeros((self.shards, *row.shape), row.dtype)
            block[0] = row
            return jax.device_put(block, None if self.mesh is None else like.sharding)

        block = jax.tree.map(place, saved, self.cache)
        self.cache = self._move(self.cache, block, [(slot, 0)])

    def fill(self, params: Params, pieces: list[Piece]) -> None:
        """Prefills new tokens into their rows; the chunks of a row do not depend on the others in the call."""
        self.settle()
        share = self.slots // self.shards
        B = self.shards * self.rows
        # A shard's pieces with how many of their tokens are in, the next one to compute last.
        left = [
            [(*piece, 0) for piece in reversed(pieces) if piece[0] // share == shard]
            for shard in range(self.shards)
        ]
        while any(left):
            rows_B, start_B, count_B = (np.zeros(B, np.int32) for _ in range(3))
            tokens_BT = np.zeros((B, self.chunk), np.int32)
            for shard, waiting in enumerate(left):
                taken = [waiting.pop() for _ in range(min(self.rows, len(waiting)))]
                for at, (slot, start, tokens, done) in enumerate(taken, shard * self.rows):
                    new = tokens[done : done + self.chunk]
                    rows_B[at], start_B[at], count_B[at] = slot % share, start + done, len(new)
                    tokens_BT[at, : len(new)] = new
                waiting += [
                    (slot, start, tokens, done + self.chunk)
                    for slot, start, tokens, done in reversed(taken)
                    if done + self.chunk < len(tokens)
                ]
            new = sharding.put_rows(self.mesh, (rows_B, tokens_BT, start_B, count_B))
            with jax.transfer_guard(sharding.GUARD):
                self.cache = device.prefill(self.config, params, self.cache, *new, mesh=self.mesh)

    def chosen(self, row: int, tokens: int) -> Chosen:
        """Begins to bring the experts of a decoding row's first tokens to the host."""
        with jax.transfer_guard(sharding.GUARD):
            found = Chosen(self._chosen(self.cache, row).run(), tokens)
        self._reading.append(found)
        return found

    def arrived(self) -> None:
        """Frees the device's memory of what `chosen` began to bring, once that is done."""
        for one in self._reading:
            one.take()
        self._reading.clear()

    def _chosen(self, cache: Any, row: int) -> Program:
        leaves = [layer[CHOSEN] for layer in cache if CHOSEN in layer]
        place = sharding.replicate(self.mesh, np.int32(row))
        return Program(device.chosen_experts, (leaves, place), {"mesh": self.mesh})

    def abstract_cache(self, tokens: int) -> Any:
        """Returns the abstract cache that `reserve` makes for so many tokens."""
        return device.abstract_cache(self.config, self.slots, cache_length(tokens), self.mesh)

    def programs(self, params: Params, cache: Any) -> list[Program]:
        """Returns the calls that fill rows of such a cache, copy them, and read the experts of one."""
        B, settings = self.shards * self.rows, {"mesh": self.mesh}
        nothing_B = np.zeros(B, np.int32)
        tokens_BT = np.zeros((B, self.chunk), np.int32)
        new = sharding.put_rows(self.mesh, (nothing_B, tokens_BT, nothing_B, nothing_B))
        filling = (self.config, params, cache, *new)
        pairs = sharding.replicate(self.mesh, (np.zeros(COPIES, np.int32),) * 2)
        copying = (self.config, cache, None, *pairs)
        reading = [self._chosen(cache, 0)] if self.config.routing.recorded else []
        return [
            Program(device.prefill, filling, settings),
            Program(device.copy_rows, copying, settings),
            *reading,
        ]

    def _sized(self, cache: device.Cache | None, rows: int, length: int) -> device.Cache:
        if cache is None:
            return device.new_cache(self.config, rows, length, self.mesh)
        if device.cache_length(cache) < length:
            return device.grow(self.config, cache, length=length, mesh=self.mesh)
        return cache

    def _move(
        self, target: device.Cache, source: device.Cache | None, pairs: list[tuple[int, int]]
    ) -> device.Cache:
        """Returns `target` with rows (to, from) of `source` (None: its own) copied into it."""
        for start in range(0, len(pairs), COPIES):
            part = pairs[start : start + COPIES]
            to_B = np.full(COPIES, np.iinfo(np.int32).max, np.int32)
            from_B = np.zeros(COPIES, np.int32)
            to_B[: len(part)] = [to for to, _ in part]
            from_B[: len(part)] = [origin for _, origin in part]
            moves = sharding.replicate(self.mesh, (to_B, from_B))
            with jax.transfer_guard(sharding.GUARD):
                target = device.copy_rows(self.config, target, source, *moves, mesh=self.mesh)
        return target


def cache_length(tokens: int) -> int:
    """Returns the cache length for `tokens` positions: few distinct ones, at most an eighth too long beyond 1,024.

    A decode step reads all of it, so that what is too long costs time.
    """
    step = GRANULE
    while tokens > 16 * step:
        step *= 2
    return -(-tokens // step) * step
