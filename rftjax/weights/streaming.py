"""Puts parameters on devices: small ones whole, large ones block by block, so that the host never holds a large one."""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from rftjax.devices import sharding

LARGE = 128 << 20  # bytes in float32 from which on a parameter is read in blocks
BLOCK = 32 << 20  # bytes of a block in float32, at most where its tensor can be read in parts

# Where it lies in a parameter, and what reads its numbers.
Block = tuple[tuple[slice, ...], Callable[[], np.ndarray]]
T = TypeVar("T")


class Large(NamedTuple):
    """A parameter that is read block by block, each while `blocks` stands at it; a call begins with the first one."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Block]]


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether a parameter is read in blocks."""
    return 4 * math.prod(shape) > LARGE


def spans(entries: int, entry_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields the first entry of each block of an axis and the one behind its last."""
    step = max(1, BLOCK // entry_bytes)
    for start in range(0, entries, step):
        yield start, min(entries, start + step)


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """Yields the items and makes the next one while the caller uses the last."""
    nothing: Any = object()
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, items, nothing)
        while (item := pending.result()) is not nothing:
            pending = reader.submit(next, items, nothing)
            yield item


def put(leaf: np.ndarray | Large, dtype: Any, where: Sharding | None) -> jax.Array:
    """Returns a parameter in a dtype where it belongs (None: on the default device)."""
    if isinstance(leaf, Large):
        return _filled(leaf, jnp.dtype(dtype), where)
    # On the host: no device ever holds a float32 base that nothing reads.
    read = leaf.astype(jnp.dtype(dtype), copy=False)
    return jnp.asarray(read) if where is None else sharding.put(read, where)


def _filled(large: Large, dtype: np.dtype, where: Sharding | None) -> jax.Array:
    shape = large.shape
    regions: dict[Any, Any] = {None: (slice(None),) * len(shape)}
    if where is not None:
        regions = dict(where.addressable_devices_indices_map(shape))
    parts: dict[Any, jax.Array] = {}
    for device, region in regions.items():
        sides = [len(range(*one.indices(size))) for one, size in zip(region, shape, strict=True)]
        parts[device] = jnp.zeros(sides, dtype, device=device)
    for index, block in prefetched(_wanted(large, list(regions.values()))):
        for device, region in regions.items():
            own, starts = _overlap(index, region, shape)
            if own is not None:
                piece = jax.device_put(np.ascontiguousarray(block[own], dtype), device)
                parts[device] = _written(parts[device], piece, starts)
        # No more blocks wait for their devices than the one that is read meanwhile.
        jax.block_until_ready(list(parts.values()))
    if where is None:
        return parts[None]
    return jax.make_array_from_single_device_arrays(shape, where, list(parts.values()))


def _wanted(
    large: Large, regions: Sequence[tuple[slice, ...]]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yields the blocks that the regions have a part of; no process reads those that other processes hold alone."""
    for index, read in large.blocks():
        if any(_overlap(index, region, large.shape)[0] is not None for region in regions):
            yield index, read()


def _overlap(
    index: tuple[slice, ...], region: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...] | None, tuple[int, ...]]:
    """Returns what of a block at `index` lies in a region, and where in the region it begins."""
    own, starts = [], []
    for block, one, size in zip(index, region, shape, strict=True):
        first, last, _ = one.indices(size)
        start, stop = max(first, block.start), min(last, block.stop)
        if start >= stop:
            return None, ()
        own.append(slice(start - block.start, stop - block.start))
        starts.append(start - first)
    return tuple(own), tuple(starts)


def _write(whole: jax.Array, piece: jax.Array, starts: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, piece, starts)


_written = jax.jit(_write, donate_argnums=0)
