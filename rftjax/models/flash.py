"""Attention of packed rows on NVIDIA GPUs over those tiles of keys that a tile of queries sees, in Pallas for Triton.

What a token sees is told by its group, segment, position and place, so that no array is of size T by T. Three programs
loop over visible tiles: values, gradients of queries, and gradients of keys and values (Dao et al. 2022).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rftjax.models.layout import NONE, Layout, Part
from rftjax.models.remat import kept
from rftjax.models.tiled import FLOOR, TINY
from rftjax.models.triton import dot as _dot

TILE = 64  # tokens of a tile, half of them where the channels of a token and head are more than so many bytes:
WIDE = 256
LEAST = 16  # channels that a product takes at least; their number is a power of two
PARAMS = {"num_warps": 4, "num_stages": 2}


class Seen(NamedTuple):
    """What queries see, as the programs read it; every array is of int32.

    A token is four numbers: its group (0: padding), segment, position and place. `keys_BNY` lists for each tile of
    queries the tiles of keys that it sees, in their order, `keys_BN` how many; `queries` do so for each tile of keys.
    """

    query_B4X: jax.Array
    key_B4Z: jax.Array
    window_1: jax.Array
    keys_BNY: jax.Array
    keys_BN: jax.Array
    queries_BYN: jax.Array
    queries_BY: jax.Array


def flash(
    q_BQHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    layout: Layout,
    window: Any = None,
    sinks_H: jax.Array | None = None,
    part: Part | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `attention.plain` does, for tokens that attend to any; of a part of the queries, whole tiles, alone.

    `interpret` runs step by step on any device.
    """
    Q, C = q_BQHC.shape[1], q_BQHC.shape[3]
    assert part is None or Q % TILE == 0, Q  # `attention.row_unit`
    channels = max(LEAST, 1 << (C - 1).bit_length())
    tile = TILE // 2 if channels * q_BQHC.dtype.itemsize > WIDE else TILE

    def heads(x_BTHC: jax.Array) -> jax.Array:
        spare = -x_BTHC.shape[1] % tile
        padded = jnp.pad(x_BTHC, ((0, 0), (0, spare), (0, 0), (0, channels - C)))
        return padded.swapaxes(1, 2)

    seen = _seen(layout.padded(tile), tile, window, part)
    q = heads(q_BQHC * jnp.asarray(C**-0.5, q_BQHC.dtype))
    out = _flash(q, heads(k_BSKC), heads(v_BSKC), sinks_H, seen, interpret)
    return out.swapaxes(1, 2)[:, :Q, :, :C]


def _seen(layout: Layout, tile: int, window: Any, part: Part | None) -> Seen:
    B, Z = layout.groups_BT.shape
    part = part or Part(0, Z)
    places_BZ = jnp.broadcast_to(jnp.arange(Z), (B, Z))
    key_B4Z = jnp.stack([*map(jnp.asarray, layout), places_BZ], axis=1).astype(jnp.int32)
    visible_BNY = part.of(layout.tiles(tile, window), unit=tile)

    def listed(visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The numbers of visible tiles come first."""
        order = jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32)
        return order, jnp.sum(visible, axis=-1, dtype=jnp.int32)

    limit = jnp.asarray(NONE if window is None else window, jnp.int32).reshape(1)
    queries = listed(visible_BNY.swapaxes(1, 2))
    return Seen(part.of(key_B4Z, axis=2), key_B4Z, limit, *listed(visible_BNY), *queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks_H: Any, seen: Seen, interpret: bool
) -> jax.Array:
    """Returns values (B, H, X, C) of scaled queries of that shape and keys and values (B, K, Z, C)."""
    return _forward(q, k, v, sinks_H, seen, interpret)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks_H: Any, seen: Seen, interpret: bool
) -> tuple[jax.Array, tuple]:
    # A sink is where the running maximum and sum begin; without sinks there is nothing.
    begin_H = jnp.full(q.shape[1], FLOOR) if sinks_H is None else sinks_H.astype(jnp.float32)
    views = _Views(q, k, seen)
    kernel = functools.partial(_values, sunk=sinks_H is not None)
    inputs = [*views.seen_by_queries(), views.head, views.query, views.all_keys, views.all_keys]
    shapes = [q, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)]
    call = _program(kernel, views.queries, inputs, [views.query, views.number], shapes, interpret)
    out, totals_BHX = map(kept, call(*seen[:5], begin_H, q, k, v))
    return out, (q, k, v, sinks_H, seen, out, totals_BHX)


def _backward(interpret: bool, saved: tuple, d: jax.Array) -> tuple:
    q, k, v, sinks_H, seen, out, totals_BHX = saved
    inner_BHX = jnp.sum(d.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    given, views = (q, k, v, d, totals_BHX, inner_BHX), _Views(q, k, seen)
    own = [views.query, views.number, views.number]
    inputs = [*views.seen_by_queries(), views.query, views.all_keys, views.all_keys, *own]
    call = _program(_query_gradient, views.queries, inputs, [views.query], [q], interpret)
    (dq,) = call(*seen[:5], *given)
    own = [views.group, views.group_numbers, views.group_numbers]
    inputs = [*views.seen_by_keys(), views.group, views.key, views.key, *own]
    call = _program(_key_gradients, views.keys, inputs, [views.key] * 2, [k, v], interpret)
    dk, dv = call(*seen[:3], *seen[5:], *given)
    if sinks_H is None:
        return dq, dk, dv, None, None
    weights_BHX = jnp.exp(sinks_H.astype(jnp.float32)[None, :, None] - totals_BHX)
    dsinks_H = -jnp.sum(weights_BHX * inner_BHX, axis=(0, 2))
    return dq, dk, dv, dsinks_H.astype(sinks_H.dtype), None


_flash.defvjp(_forward, _backward)


class _Views:
    """Grids of programs, one a tile of each row and head, and what of each array a program sees."""

    def __init__(self, q: jax.Array, k: jax.Array, seen: Seen) -> None:
        from jax.experimental import pallas

        B, H, X, C = q.shape
        K, Z = k.shape[1:3]
        G, self._view = H // K, pallas.BlockSpec
        self.queries, self.keys = (B, H, seen.keys_BNY.shape[1]), (B, K, seen.keys_BNY.shape[2])
        self.tile = tile = X // self.queries[2]
        self.query = self.key = self._view((None, None, tile, C), lambda b, h, n: (b, h, n, 0))
        self.number = self._view((None, None, tile), lambda b, h, n: (b, h, n))
        self.head = self._view((1,), lambda b, h, n: (h,))
        self.all_keys = self._view((None, None, Z, C), lambda b, h, n: (b, h // G, 0, 0))
        self.group = self._view((None, G, X, C), lambda b, h, n: (b, h, 0, 0))
        self.group_numbers = self._view((None, G, X), lambda b, h, n: (b, h, 0))

    def seen_by_queries(self) -> list[Any]:
        """Returns the views of the first five arrays of `Seen`."""
        own = self._view((None, 4, self.tile), lambda b, h, n: (b, 0, n))
        return [own, self._tokens(self.keys), *self._tiles(self.keys)]

    def seen_by_keys(self) -> list[Any]:
        """Returns the views of the first three arrays of `Seen` and the last two."""
        own = self._view((None, 4, self.tile), lambda b, h, n: (b, 0, n))
        return [self._tokens(self.queries), own, *self._tiles(self.queries)]

    def _tokens(self, others: tuple[int, int, int]) -> Any:
        return self._view((None, 4, others[2] * self.tile), lambda b, h, n: (b, 0, 0))

    def _tiles(self, others: tuple[int, int, int]) -> list[Any]:
        return [
            self._view((1,), lambda b, h, n: (0,)),
            self._view((None, None, others[2]), lambda b, h, n: (b, n, 0)),
            self._view((None, 1), lambda b, h, n: (b, n)),
        ]


def _program(
    kernel: Any,
    grid: tuple[int, int, int],
    inputs: list[Any],
    outputs: list[Any],
    like: list[Any],
    interpret: bool,
) -> Any:
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    return pallas.pallas_call(
        kernel,
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=[jax.ShapeDtypeStruct(one.shape, one.dtype) for one in like],
        compiler_params=triton.CompilerParams(**PARAMS),
        interpret=interpret,
        name="packed_attention",
    )


def _tokens(tokens: Any, at: Any) -> list[jax.Array]:
    return [tokens[number, at] for number in range(4)]


def _scores(
    q: jax.Array, k: jax.Array, query: list[jax.Array], key: list[jax.Array], window: Any
) -> jax.Array:
    """Returns float32 scores of a tile of queries and one of keys, FLOOR where a query does not see a key."""
    group, segment, position, place = (number[:, None] for number in query)
    theirs, other, far, before = (number[None, :] for number in key)
    seen = (group == theirs) & (group > 0) & (place >= before)
    seen &= ((segment == other) | (other == 0)) & (position - far < window[0])
    return jnp.where(seen, _dot(q, k.T), FLOOR)


def _values(
    query: Any,
    key: Any,
    window: Any,
    listed: Any,
    count: Any,
    begin: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    totals: Any,
    *,
    sunk: bool,
) -> None:
    """Computes a tile of one head's values and the logarithms of their weights' sums."""
    mine, tokens = q[...], _tokens(query, slice(None))
    tile = mine.shape[0]

    def add(nth: Any, carry: tuple) -> tuple:
        top, total, output = carry
        at = _place(listed[nth], tile)
        scores = _scores(mine, k[at, :], tokens, _tokens(key, at), window)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, fading = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        added = _dot(weights.astype(mine.dtype), v[at, :])
        total = total * fading + jnp.sum(weights, axis=1)
        return new_top, total, output * fading[:, None] + added

    nothing = jnp.full(tile, float(sunk)), jnp.zeros(mine.shape, jnp.float32)
    carry = jnp.zeros(tile, jnp.float32) + begin[0], *nothing
    top, total, output = jax.lax.fori_loop(0, count[0], add, carry)
    total = jnp.maximum(total, TINY)  # 0 where the tile sees nothing
    out[...] = (output / total[:, None]).astype(out.dtype)
    totals[...] = top + jnp.log(total)


def _query_gradient(
    query: Any,
    key: Any,
    window: Any,
    listed: Any,
    count: Any,
    q: Any,
    k: Any,
    v: Any,
    d: Any,
    totals: Any,
    inners: Any,
    dq: Any,
) -> None:
    """Computes a tile of the gradient of one head's queries."""
    mine, theirs, tokens = q[...], d[...], _tokens(query, slice(None))
    total, inner = totals[...][:, None], inners[...][:, None]

    def add(nth: Any, gradient: jax.Array) -> jax.Array:
        at = _place(listed[nth], mine.shape[0])
        keys = k[at, :]
        scores = _scores(mine, keys, tokens, _tokens(key, at), window)
        weights = jnp.where(scores > FLOOR, jnp.exp(scores - total), 0.0)
        dscores = weights * (_dot(theirs, v[at, :].T) - inner)
        return gradient + _dot(dscores.astype(keys.dtype), keys)

    empty = jnp.zeros(mine.shape, jnp.float32)
    dq[...] = jax.lax.fori_loop(0, count[0], add, empty).astype(dq.dtype)


def _key_gradients(
    query: Any,
    key: Any,
    window: Any,
    listed: Any,
    count: Any,
    q: Any,
    k: Any,
    v: Any,
    d: Any,
    totals: Any,
    inners: Any,
    dk: Any,
    dv: Any,
) -> None:
    """Computes a tile of the gradients of one key head's keys and values, from all heads that it serves."""
    keys, values, tokens = k[...], v[...], _tokens(key, slice(None))
    tiles = count[0]

    def add(step: Any, gradients: tuple) -> tuple:
        head, at = step // tiles, _place(listed[step % tiles], keys.shape[0])
        mine, theirs = q[head, at, :], d[head, at, :]
        scores = _scores(mine, keys, _tokens(query, at), tokens, window)
        total, inner = totals[head, at][:, None], inners[head, at][:, None]
        weights = jnp.where(scores > FLOOR, jnp.exp(scores - total), 0.0)
        dscores = weights * (_dot(theirs, values.T) - inner)
        added = _dot(dscores.astype(mine.dtype).T, mine), _dot(weights.astype(mine.dtype).T, theirs)
        return gradients[0] + added[0], gradients[1] + added[1]

    empty = jnp.zeros(keys.shape, jnp.float32)
    found = jax.lax.fori_loop(0, tiles * q.shape[0], add, (empty, empty))
    dk[...], dv[...] = (one.astype(dk.dtype) for one in found)


def _place(number: Any, tile: int) -> Any:
    """Returns where the tokens of a tile lie."""
    from jax.experimental import pallas

    return pallas.ds(number * tile, tile)
