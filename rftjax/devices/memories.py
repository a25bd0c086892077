"""Arrays that lie in the host's memory, and how a program brings them to its devices a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from rftjax.types import Params

HOST = "pinned_host"  # the memory kind from which devices read without a copy by the host


def on_host(leaf: Any) -> bool:
    """Whether an array, an abstract one or a traced one lies in the host's memory."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is not None and leaf.sharding.memory_kind == HOST
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def abstract_on_host(tree: Any, which: Any) -> Any:
    """Returns the abstract arrays, those that `which` says in the host's memory, all sharded as they are."""

    def one(leaf: jax.ShapeDtypeStruct, chosen: bool) -> jax.ShapeDtypeStruct:
        place = leaf.sharding.with_memory_kind(HOST) if chosen else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(one, tree, which)


def to_device(leaf: jax.Array) -> jax.Array:
    """Returns a traced array in the device's memory."""
    return jax.device_put(leaf, jax.memory.Space.Device) if on_host(leaf) else leaf


def like(leaf: jax.Array, other: jax.Array) -> jax.Array:
    """Returns a traced array of a device in the memory of another one."""
    return jax.device_put(leaf, jax.memory.Space.Host) if on_host(other) else leaf


def fetched(
    tree: Params, stacks: Collection[str], dtype: Callable[[tuple, jax.Array], Any]
) -> Params:
    """Returns traced parameters on the device: those of the host in the dtype that `dtype` gives for path and leaf, a
    layer of a stack at a time, so that no more than one lies there as the host has it."""
    if not any(map(on_host, jax.tree.leaves(tree))):
        return tree

    def here(part: Params) -> Params:
        def one(path: tuple, leaf: jax.Array) -> jax.Array:
            return to_device(leaf).astype(dtype(path, leaf)) if on_host(leaf) else leaf

        return jax.tree_util.tree_map_with_path(one, part)

    def stacked(part: Params) -> Params:
        def layer(index: jax.Array) -> Params:
            return here(jax.tree.map(lambda leaf: entry(leaf, index)[0], part))

        return jax.lax.map(layer, jnp.arange(jax.tree.leaves(part)[0].shape[0]))

    return {name: (stacked if name in stacks else here)(part) for name, part in tree.items()}


def entry(leaf: jax.Array, index: jax.Array | int) -> jax.Array:
    """Returns entry `index` of the first axis, which stays as an axis of 1, in the leaf's own memory."""
    return jax.lax.dynamic_slice_in_dim(leaf, index, 1)
