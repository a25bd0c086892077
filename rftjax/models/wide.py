"""Parameters in bfloat16 whose gradients are float32, as those of float32 parameters are.

JAX gives a gradient the dtype of what it is taken in, so it is taken in a float32 tree of zeros beside the parameters.
No one reads these zeros, and no program holds them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rftjax.types import Params


class Wide(NamedTuple):
    """A parameter of any dtype, and the zeros that its gradient is taken in."""

    value: Any
    zeros: Any


def zeros_of(params: Params) -> Params:
    """Returns what a gradient is to be taken in."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)


def joined(params: Params, zeros: Params) -> Params:
    """Returns parameters to be opened where they are read."""
    return jax.tree.map(Wide, params, zeros)


def is_joined(tree: Any) -> bool:
    """Whether a tree has parameters to be opened."""
    return any(isinstance(node, Wide) for node in jax.tree.leaves(tree, is_leaf=_is_wide))


def opened(tree: Any) -> Any:
    """Returns the tree with float32 arrays in place of joined parameters; other leaves are as they were."""

    def one(node: Any) -> Any:
        return _open(*node) if isinstance(node, Wide) else node

    return jax.tree.map(one, tree, is_leaf=_is_wide)


def _is_wide(node: Any) -> bool:
    return isinstance(node, Wide)


@jax.custom_vjp
def _open(value: jax.Array, zeros: jax.Array) -> jax.Array:
    return value.astype(jnp.float32)


def _forward(value: jax.Array, zeros: jax.Array) -> tuple[jax.Array, None]:
    return _open(value, zeros), None


def _backward(_: None, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient


_open.defvjp(_forward, _backward)
