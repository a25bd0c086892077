"""Stochastic rounding: float32 sums kept as bfloat16, up or down at random so that the mean is the sum itself.

A change below half a unit of bfloat16's last place is not lost, as it would be by rounding to the nearest: it moves
the weight with the probability of its share of that unit (Gupta et al. 2015).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rftjax.types import Params

STREAM = 0x726F756E  # keeps these keys apart from those of other noise of the same seed
LOW = 0xFFFF  # the bits of a float32 that bfloat16 does not have


def is_narrow(tree: Params) -> bool:
    """Whether parameters are kept in bfloat16."""
    return any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(tree))


def keys(seed: int, step: jax.Array, tree: Params) -> Params:
    """Returns the keys of each leaf in one update, one for each entry of its first axis: the same on any mesh, after a
    resume, and whether the leaf is rounded at once or in parts of that axis."""
    own = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM), step)
    leaves, form = jax.tree.flatten(tree)
    return form.unflatten(
        [
            jax.random.split(jax.random.fold_in(own, at), leaf.shape[0])
            for at, leaf in enumerate(leaves)
        ]
    )


def rounded(sums: jax.Array, like: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns float32 sums in the dtype of `like`: as they are, or stochastically rounded to bfloat16."""
    return stochastic(sums, keys) if like.dtype == jnp.bfloat16 else sums


def stochastic(values: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns float32 values as bfloat16, each one of its two neighbours, whose expectation is the value.

    `keys` are those of the entries of the first axis.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.vmap(lambda key: jax.random.bits(key, values.shape[1:], jnp.uint32))(keys)
    noise &= jnp.uint32(LOW)
    # The carry into bit 16 is the step up, in magnitude; it happens in `low bits` of 65,536 cases.
    cut = jax.lax.bitcast_convert_type((bits + noise) & ~jnp.uint32(LOW), jnp.float32)
    # Bits of infinity and NaN mean other things.
    return jnp.where(jnp.isfinite(values), cut, values).astype(jnp.bfloat16)
