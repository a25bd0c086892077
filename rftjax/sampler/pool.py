"""The rows of the KV cache as the host sees them: what each one holds, and the calls that fill, copy and park rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rftjax import sharding
from rftjax.compilation import Program
from rftjax.models.decoder import Config
from rftjax.sampler import device
from rftjax.types import Params

COPIES = 8  # rows a copying call moves; constant, so that it compiles once
GRANULE = 128  # cache lengths are multiples of this
Prompt = tuple[int, ...]
Piece = tuple[int, int, list[int]]  # a row, the position of its first new token, and the new tokens
Saved = list[tuple[np.ndarray, np.ndarray]]  # keys and values (K, S, C) of one row, a layer each


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
        self._groups: dict[Prompt, int] = {}  # a row that holds the whole prompt
        self._holds: list[Prompt] = [()] * self.slots

    def origin(self, prompt: Prompt) -> int:
        """Returns a row that holds the whole prompt, or -1."""
        return self._groups.get(prompt, -1)

    def hold(self, row: int, prompt: Prompt) -> None:
        """Notes that the row begins with this prompt from now on."""
        held = self._holds[row]
        if held != prompt and self._groups.get(held) == row:
            del self._groups[held]
        self._holds[row] = prompt
        self._groups.setdefault(prompt, row)

    def nearest(self, prompt: Prompt, row: int, avoid: Iterable[int]) -> tuple[int, int]:
        """Returns how many tokens of the prompt some row holds, and which row: this one if it can, late those to avoid.

        In whole chunks, so that each token is computed in the same call as it would be in a row of its own.
        """
        best = (0, 0, -1)
        for other in (row, *range(self.slots)):
            held, shared = self._holds[other], 0
            most = min(len(held), len(prompt)) - 1
            while shared + self.chunk <= most and (
                held[: shared + self.chunk] == prompt[: shared + self.chunk]
            ):
                shared += self.chunk
            best = max(best, (shared, other not in avoid, other), key=lambda found: found[:2])
        return best[0], best[2]

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` positions in every decoding row; the length only grows until `clear`."""
        self.cache = self._sized(self.cache, self.slots, cache_length(tokens))

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies decoding rows, pairs of (to, from)."""
        assert self.cache is not None
        self.cache = self._move(self.cache, None, pairs)

    def park(self, row: int, slot: int) -> None:
        """Copies a decoding row to a parked one."""
        assert self.cache is not None
        self._store = self._sized(self._store, self.parked, self.cache[0][0].shape[2])
        self._store = self._move(self._store, self.cache, [(row, slot)])

    def unpark(self, slot: int, row: int) -> None:
        """Copies a parked row to a decoding one."""
        assert self.cache is not None
        self.cache = self._move(self.cache, self._store, [(slot, row)])

    def evict(self, slot: int) -> Saved:
        """Returns a decoding row as a copy in the host's memory, bit for bit what it holds."""
        assert self.cache is not None
        # One row a device is the least that a mesh can lay out; the first one is used.
        block = device.new_cache(self.config, self.shards, self.cache[0][0].shape[2], self.mesh)
        taken = jax.device_get(self._move(block, self.cache, [(0, slot)]))
        return [(keys[0].copy(), values[0].copy()) for keys, values in taken]

    def restore(self, slot: int, saved: Saved) -> None:
        """Puts what `evict` returned into a decoding row."""
        assert self.cache is not None

        def place(row_KSC: np.ndarray) -> jax.Array:
            block = np.zeros((self.shards, *row_KSC.shape), row_KSC.dtype)
            block[0] = row_KSC
            where = None
            if self.mesh is not None:
                where = sharding.cache_sharding(self.mesh, self.config.kv_heads)
            return jax.device_put(block, where)

        block = [(place(keys), place(values)) for keys, values in saved]
        self.cache = self._move(self.cache, block, [(slot, 0)])

    def fill(self, params: Params, pieces: list[Piece]) -> None:
        """Computes new tokens into their rows, each in chunks of its own, whoever shares the calls."""
        share = self.slots // self.shards
        left = [[piece for piece in pieces if piece[0] // share == n] for n in range(self.shards)]
        B = self.shards * self.rows
        while any(left):
            rows_B, start_B, count_B = (np.zeros(B, np.int32) for _ in range(3))
            tokens_BT = np.zeros((B, self.chunk), np.int32)
            for shard, waiting in enumerate(left):
                for index, (slot, start, tokens) in enumerate(waiting[: self.rows]):
                    at, new = shard * self.rows + index, tokens[: self.chunk]
                    rows_B[at], start_B[at], count_B[at] = slot % share, start, len(new)
                    tokens_BT[at, : len(new)] = new
                    waiting[index] = (slot, start + len(new), tokens[len(new) :])
                left[shard] = [piece for piece in waiting if piece[2]]
            self.cache = device.prefill(
                self.config,
                params,
                self.cache,
                rows_B,
                tokens_BT,
                start_B,
                count_B,
                mesh=self.mesh,
            )

    def outline(self, tokens: int) -> Any:
        """Returns the shapes and places of what `reserve` makes for so many tokens."""
        c = self.config
        place = sharding.cache_sharding(self.mesh, c.kv_heads) if self.mesh is not None else None
        shape = (self.slots, c.kv_heads, cache_length(tokens), c.channels)
        leaf = jax.ShapeDtypeStruct(shape, jax.numpy.dtype(c.dtype), sharding=place)
        return [(leaf, leaf)] * c.layers

    def programs(self, params: Params, cache: Any) -> list[Program]:
        """Returns the calls that fill rows of such a cache and copy them."""
        B, settings = self.shards * self.rows, {"mesh": self.mesh}
        nothing_B = np.zeros(B, np.int32)
        tokens_BT = np.zeros((B, self.chunk), np.int32)
        filling = (self.config, params, cache, nothing_B, tokens_BT, nothing_B, nothing_B)
        copying = (cache, None, np.zeros(COPIES, np.int32), np.zeros(COPIES, np.int32))
        return [
            Program(device.prefill, filling, settings),
            Program(device.copy_rows, copying, settings),
        ]

    def _sized(self, cache: device.Cache | None, rows: int, length: int) -> device.Cache:
        if cache is None:
            return device.new_cache(self.config, rows, length, self.mesh)
        if cache[0][0].shape[2] < length:
            return device.grow(cache, length=length, mesh=self.mesh)
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
            target = device.copy_rows(target, source, to_B, from_B, mesh=self.mesh)
        return target


def cache_length(tokens: int) -> int:
    """Returns the cache length for `tokens` positions: few distinct ones, at most a third too long."""
    length = GRANULE
    while length < tokens:
        half = length + length // 2
        length = half if tokens <= half and half % GRANULE == 0 else 2 * length
    return length
