"""The head: logits of vectors, and how the devices of a mesh share out those of a packed row's scored positions.

Where a device has a part of the head alone, it would gather the rest for each chunk of its positions, and scatter the
gradient. Instead devices have a part of the vocabulary each and gather one another's vectors, which are less than the
head is; what is left of it is gathered once for all chunks, whose gradients each device adds up by itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rftjax.devices import sharding
from rftjax.models import linear
from rftjax.models.config import Config
from rftjax.models.wide import Wide
from rftjax.types import Params

POSITIONS = 2048  # that a device scores in a micro-batch, about: more devices of a vocabulary exchange more vectors


def logits(config: Config, params: Params, x_MD: jax.Array) -> jax.Array:
    """Returns logits_MV in float32; a tied head is the embedding where the tree holds none of its own."""
    if "head" in params:
        return _capped(config, linear.linear(x_MD, params["head"]["kernel"], 1, True))
    return _capped(config, linear.tied(x_MD, params["embed"]["embedding"]))


def _capped(config: Config, logits: jax.Array) -> jax.Array:
    cap = config.logit_cap
    return cap * jnp.tanh(logits / cap) if cap else logits


class Shares(NamedTuple):
    """The axes of a mesh that share out positions, and those that divide the vocabulary of their logits."""

    mesh: Mesh
    rows: tuple[str, ...]
    vocab: tuple[str, ...]

    @property
    def copies(self) -> tuple[str, ...]:
        """The axes whose devices have logits of different positions."""
        return tuple(axis for axis in self.rows if axis not in self.vocab)

    @property
    def together(self) -> tuple[str, ...]:
        """The axes whose devices have logits of the same positions, of which each has other ones otherwise."""
        return tuple(axis for axis in self.rows if axis in self.vocab)

    def count(self, axes: tuple[str, ...]) -> int:
        """Returns the number of devices of these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def keep(self, array: jax.Array, *axes: Any) -> jax.Array:
        """Keeps an array over these axes of the mesh, () for none."""
        place = sharding.axes_sharding(self.mesh, *axes)
        return jax.lax.with_sharding_constraint(array, place)

    def grouped(self, values: jax.Array) -> jax.Array:
        """Returns (N, M, ...): numbers, or vectors, of N x M positions by copies of the head, of whose positions each
        of its devices has all."""
        split = values.reshape(*map(self.size, self.rows), -1, *values.shape[1:])
        split = self.keep(split, *((axis,) for axis in self.rows))
        order = *self.copies, *self.together
        ahead = [self.rows.index(axis) for axis in order]
        turned = split.transpose(*ahead, *range(len(ahead), split.ndim))
        turned = self.keep(turned, *((axis,) for axis in self.copies))
        return turned.reshape(self.count(self.copies), -1, *values.shape[1:])

    def ungrouped(self, values_B: jax.Array) -> jax.Array:
        """Returns numbers in the order that `grouped` was given them in."""
        order = *self.copies, *self.together
        split = values_B.reshape(*map(self.size, order), -1)
        turned = split.transpose(*(order.index(axis) for axis in self.rows), len(order))
        return self.keep(turned, *((axis,) for axis in self.rows)).reshape(-1)

    def size(self, axis: str) -> int:
        return self.mesh.shape[axis]


def shares(mesh: Mesh | None, vocab: int, *, context: bool, whole: bool) -> Shares | None:
    """Returns how devices share out logits, `context` if it has parts of the rows, each position's as a `whole` but for
    `tensor` where a filter looks at all of them; None where one device has all."""
    if mesh is None:
        return None
    rows = [*sharding.ROWS, *([sharding.CONTEXT] if context else [])]
    rows = tuple(axis for axis in rows if mesh.shape[axis] > 1)
    more = tuple(axis for axis in sharding.RULES["width"] if axis in rows)
    ways = {
        sharding.vocab_axes(mesh, vocab, more[:n]) for n in range(1 if whole else len(more) + 1)
    }

    def moved(axes: tuple[str, ...]) -> float:
        own = math.prod(mesh.shape[axis] for axis in axes if axis in rows)
        return own * POSITIONS + vocab / math.prod(mesh.shape[axis] for axis in axes)

    found = Shares(mesh, rows, min(ways, key=moved))
    return found if found.rows or found.vocab else None


class Head:
    """The head of one micro-batch, laid out once for all its chunks of logits."""

    def __init__(self, config: Config, params: Params, over: Shares | None) -> None:
        self.config, self.params, self.over, self.laid = config, params, over, None
        if over is not None:
            own = params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
            self.laid = _laid(own, config.dtype, over)

    def logits(self, x_BD: jax.Array) -> jax.Array:
        """Returns logits_BV of positions in the order of `arranged`."""
        over = self.over
        if over is None or self.laid is None:
            return logits(self.config, self.params, x_BD)
        logits_NMV = jax.vmap(linear.joined)(over.grouped(x_BD), *self.laid)
        logits_BV = logits_NMV.reshape(-1, logits_NMV.shape[-1])
        return _capped(self.config, over.keep(logits_BV, over.copies, over.vocab))

    def arranged(self, values_B: jax.Array) -> jax.Array:
        """Returns numbers of positions in the order of the logits."""
        return values_B if self.over is None else self.over.grouped(values_B).reshape(-1)

    def restored(self, values_B: jax.Array) -> jax.Array:
        """Returns numbers of positions in the order in which `arranged` was given them."""
        return values_B if self.over is None else self.over.ungrouped(values_B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _laid(kernel_DV: jax.Array, dtype: str, over: Shares) -> Wide:
    """Returns copies (N, D, V) of the head by its vocabulary, whose gradient is float32 in any dtype."""
    D, V = kernel_DV.shape
    whole = _moved(over, kernel_DV.astype(dtype), _ways(over, V)).reshape(1, D, V)
    copies_NDV = jnp.broadcast_to(whole, (over.count(over.copies), D, V))
    copies_NDV = over.keep(copies_NDV, over.copies, (), over.vocab)
    return Wide(copies_NDV, jnp.zeros(copies_NDV.shape, jnp.float32))


def _laid_out(kernel_DV: jax.Array, dtype: str, over: Shares) -> tuple[Wide, jax.Array]:
    return _laid(kernel_DV, dtype, over), kernel_DV


def _laid_gradient(
    dtype: str, over: Shares, kernel_DV: jax.Array, gradient: Wide
) -> tuple[jax.Array]:
    copies_NDV = over.keep(gradient.zeros, over.copies, (), over.vocab)
    ways = _ways(over, kernel_DV.shape[1])[::-1]
    found = _moved(over, jnp.sum(copies_NDV, axis=0), ways)
    return (found.reshape(kernel_DV.shape).astype(kernel_DV.dtype),)


_laid.defvjp(_laid_out, _laid_gradient)


def _ways(over: Shares, vocab: int) -> list[tuple[str, ...]]:
    """Returns the axes that divide the vocabulary where the state has the head, then one more at a time."""
    first = len(sharding.vocab_axes(over.mesh, vocab))
    return [over.vocab[:n] for n in range(first, len(over.vocab) + 1)]


def _moved(over: Shares, kernel_DV: jax.Array, ways: list[tuple[str, ...]]) -> jax.Array:
    """Returns a head, its width split into an axis for each of the mesh that divides it, as it lies at last where these
    axes divide its vocabulary one way after the other.

    XLA exchanges for one axis at a time; for two at once each device would get all of it.
    """
    place = sharding.table_sharding(over.mesh, kernel_DV.shape[::-1])
    axes = sharding.column_axes(place)
    split = kernel_DV.reshape(*map(over.size, axes), -1, kernel_DV.shape[1])
    for vocab in ways:
        split = over.keep(split, *(() if axis in vocab else (axis,) for axis in axes), (), vocab)
    return split
