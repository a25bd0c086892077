"""Arrays of packed rows whose tokens lie on several devices, those of the mesh axis `context`: gathered, taken by
place, and with rows and tokens in one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rftjax.devices import sharding
from rftjax.devices.sharding import CONTEXT, ROWS

PARTS = PartitionSpec(ROWS, CONTEXT)  # of an array with axes of rows and tokens
FLAT = PartitionSpec((*ROWS, CONTEXT))  # of one with both in one axis, device by device


def gathered(x: jax.Array) -> jax.Array:
    """Returns x (rows, tokens, ...) with the tokens of all devices, inside a function that each device runs; the
    gradient goes to the device of its token."""

    def wide(x: jax.Array) -> jax.Array:
        # XLA's CPU compiler cannot add bfloat16 here, which the gradient does.
        return _all(x.astype(jnp.float32)).astype(x.dtype)

    return jax.lax.platform_dependent(x, cpu=wide, default=_all)


def _all(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True)


def spread(mesh: Mesh | None, x_RXD: jax.Array) -> jax.Array:
    """Keeps tokens on their devices, where the compiler has their vectors from a table whose channels these divide.

    It exchanges for one axis of the mesh at a time; for two at once each device would get all vectors.
    """
    shards = sharding.context_shards(mesh, x_RXD.shape[1])
    if mesh is not None and shards > 1 and x_RXD.shape[2] % shards == 0:
        place = sharding.row_sharding(mesh, (), (CONTEXT,))
        x_RXD = jax.lax.with_sharding_constraint(x_RXD, place)
    return sharding.keep_tokens(mesh, x_RXD)


def columns(mesh: Mesh, x: jax.Array, divided: Sequence[str]) -> jax.Array:
    """Returns x (rows, tokens, ...) with those of all devices, in one order for all x, inside a function that each
    device runs; of a third axis the part that is the device's own where these axes of the mesh divide it.

    Their devices exchange such parts before the others' are gathered, which are as much smaller then.
    """
    others = [axis for axis in (*ROWS, CONTEXT) if axis not in divided]
    for axis in (*divided, *others):
        at = 1 if axis == CONTEXT else 0
        if mesh.shape[axis] > 1 and axis in divided and x.ndim == 3:
            x = jax.lax.all_to_all(x, axis, 2, at, tiled=True)
        elif mesh.shape[axis] > 1:
            x = jax.lax.all_gather(x, axis, axis=at, tiled=True)
    return x


def over_heads(
    mesh: Mesh, function: Callable[..., jax.Array], kv_heads: int
) -> Callable[..., jax.Array]:
    """Returns attention (q_BTHC, new, weights, layout, window, sinks_H) as each device runs it for its tokens and
    heads, all of these where `tensor` does not divide `kv_heads`.

    Arrays of `new` with four axes have heads on the third, those of `weights` with three on the second. The layout is
    that of whole rows.
    """
    tensor = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    heads = PartitionSpec(*PARTS, tensor)

    def of_new(leaf: Any) -> PartitionSpec:
        return heads if leaf.ndim == 4 else PARTS

    def of_weights(leaf: Any) -> PartitionSpec:
        return PartitionSpec(None, tensor) if leaf.ndim == 3 else PartitionSpec()

    def run(q_BTHC: jax.Array, new: Any, weights: Any, *others: Any) -> jax.Array:
        each = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(
                heads,
                jax.tree.map(of_new, new),
                jax.tree.map(of_weights, weights),
                PartitionSpec(ROWS),
                PartitionSpec(),
                PartitionSpec(tensor),
            ),
            out_specs=heads,
            check_vma=False,
        )
        return each(q_BTHC, new, weights, *others)

    return run


def taken(mesh: Mesh | None, x_RXD: jax.Array, sources_RM: jax.Array) -> jax.Array:
    """Returns x_BD, the vectors at these places of each row, on the devices as `flat` leaves its numbers."""
    if sharding.context_shards(mesh, x_RXD.shape[1]) == 1:
        x_RMD = jnp.take_along_axis(x_RXD, sources_RM[..., None], axis=1)
        return sharding.keep_rows(mesh, x_RMD.reshape(-1, x_RXD.shape[2]))

    def here(x_RXD: jax.Array, sources_RM: jax.Array) -> jax.Array:
        X, D = x_RXD.shape[1:]
        places_RM = sources_RM - jax.lax.axis_index(CONTEXT) * X
        mine_RM = (places_RM >= 0) & (places_RM < X)
        found_RMD = jnp.take_along_axis(x_RXD, jnp.where(mine_RM, places_RM, 0)[..., None], axis=1)
        # One device has the vector, and XLA's CPU compiler cannot add bfloat16 here.
        wide_RMD = jnp.where(mine_RM[..., None], found_RMD.astype(jnp.float32), 0.0)
        own = jax.lax.psum_scatter(wide_RMD, CONTEXT, scatter_dimension=1, tiled=True)
        return own.astype(x_RXD.dtype).reshape(-1, D)

    return sharding.over_rows(mesh, here, (PARTS, True), FLAT)(x_RXD, sources_RM)


def flat(mesh: Mesh | None, shards: int, values_RM: jax.Array) -> jax.Array:
    """Returns values_B, of M numbers a row that `shards` devices divide; a reshape where there is one."""
    if shards == 1:
        return values_RM.reshape(-1)
    return sharding.over_rows(mesh, lambda own: own.reshape(-1), (PARTS,), FLAT)(values_RM)


def unflat(mesh: Mesh | None, shards: int, values_B: jax.Array, M: int) -> jax.Array:
    """Returns values_RM, the inverse of `flat`."""
    if shards == 1:
        return values_B.reshape(-1, M)
    return sharding.over_rows(mesh, lambda own: own.reshape(-1, M // shards), (FLAT,), PARTS)(
        values_B
    )
