"""Rows of experts that lie on several devices: each goes to the device of its expert and back, none is dropped.

Called where each device runs the same function on its own rows (`jax.shard_map`), with the experts divided over one
axis of the mesh. On accelerators rows move by JAX's ragged all-to-all; XLA's CPU backend has none, and gathers them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rftjax.models.config import Routing

AXIS = "expert"
LITTLE = 2  # times a device's share of the rows, in which room for all of them is no waste
ENOUGH = 256  # rows of an expert, in the mean, that its products are efficient with


class Moves(NamedTuple):
    """How many rows each device sends to each other, and where they begin in the sender's rows and in the receiver's;
    the sender is the first axis."""

    sizes: jax.Array
    begins: jax.Array
    lands: jax.Array

    @property
    def back(self) -> Moves:
        """The same rows, on their way back."""
        return Moves(self.sizes.T, self.lands.T, self.begins.T)


def room(routing: Routing, tokens: int, shards: int) -> int:
    """Returns the most rows that may come to a device, from as many tokens on each: none chooses an expert twice."""
    return shards * tokens * min(routing.chosen, routing.experts // shards)


def parts(routing: Routing, tokens: int, shards: int) -> int:
    """Returns into how many equal parts a device's tokens go, so that the room for rows is not of all at once, where a
    device may get far more than its share; a power of two."""
    count = 1
    if room(routing, 1, shards) <= LITTLE * routing.chosen:
        return count
    while tokens % (2 * count) == 0 and (
        tokens // count * shards * routing.chosen > ENOUGH * routing.experts
    ):
        count *= 2
    return count


def moves(sizes_E: jax.Array, shards: int) -> tuple[Moves, jax.Array]:
    """Returns where the rows of this device go, which are sorted by expert, `sizes_E` of each, and how many come from
    each device (first axis) for each expert that lies here."""
    everywhere = jax.lax.all_gather(sizes_E, AXIS).reshape(shards, shards, -1)
    sizes = jnp.sum(everywhere, axis=2)
    begins = jnp.cumsum(sizes, axis=1) - sizes
    lands = jnp.cumsum(sizes, axis=0) - sizes
    return Moves(sizes, begins, lands), everywhere[:, jax.lax.axis_index(AXIS)]


def move(rows: jax.Array, to: Moves, room: int) -> jax.Array:
    """Returns the rows that came here, those of device 0 first, in an array of `room` rows."""
    return jax.lax.platform_dependent(
        rows,
        to,
        cpu=lambda rows, to: _gathered(rows, to, room),
        default=lambda rows, to: _ragged(rows, to, room),
    )


def _ragged(rows: jax.Array, to: Moves, room: int) -> jax.Array:
    here = jax.lax.axis_index(AXIS)
    empty = jnp.zeros((room, rows.shape[1]), rows.dtype)
    tables = to.begins[here], to.sizes[here], to.lands[here], to.sizes[:, here]
    return jax.lax.ragged_all_to_all(rows, empty, *tables, axis_name=AXIS)


def _gathered(rows: jax.Array, to: Moves, room: int) -> jax.Array:
    here = jax.lax.axis_index(AXIS)
    # XLA's CPU compiler cannot add bfloat16 here, which the gradient does.
    everywhere = jax.lax.all_gather(rows.astype(jnp.float32), AXIS)
    ends = jnp.cumsum(to.sizes[:, here])
    at = jnp.arange(room)
    sender = jnp.minimum(jnp.searchsorted(ends, at, side="right"), ends.shape[0] - 1)
    row = jnp.minimum(at - to.lands[sender, here] + to.begins[sender, here], rows.shape[0] - 1)
    came = jnp.where((at < ends[-1])[:, None], everywhere[sender, row], 0.0)
    return came.astype(rows.dtype)


def by_expert(sizes: jax.Array, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the order that sorts the rows that came here by expert, its inverse, and each sorted row's expert, which
    is the number of experts for rows of the room that nothing came to."""
    shards, experts = sizes.shape
    ends = jnp.cumsum(sizes.reshape(-1))
    part = jnp.searchsorted(ends, jnp.arange(room), side="right")
    expert = jnp.where(part < shards * experts, part % experts, experts)
    order = jnp.argsort(expert, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(room))
    return order, place, expert[order]
