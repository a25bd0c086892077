"""Attention over those tiles of keys that a tile of queries sees: a packed completion sees its prompt and itself.

For long rows on CPU, where the scores of a pair of tiles stay in cache. No array is of size T by T.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rftjax.models.layout import Layout
from rftjax.models.remat import kept

TILE = 128  # tokens
FLOOR = -1e30  # finite, so that rows of padding are free of NaN
TINY = 1e-30

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def tiled(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    layout: Layout,
    window: Any = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Returns attended values (B, T, H, C) of tokens that attend to any; the others' are finite.

    A running maximum and sum join the tiles, and the backward pass computes the weights again (Dao et al. 2022).
    """
    return _forward(q_BTHC, k_BTKC, v_BTKC, layout, window, sinks_H)[0]


class _Tiles:
    """The tiles of all rows in one sequence of length Y, and the key tiles that each tile of queries sees."""

    def __init__(self, q_BTHC: jax.Array, k_BTKC: jax.Array, layout: Layout, window: Any) -> None:
        self.B, self.T, self.H, self.C = q_BTHC.shape
        self.K = k_BTKC.shape[2]
        self.G, self.X = self.H // self.K, self.T + -self.T % TILE
        self.Y, self.N, self.window = self.B * self.X // TILE, self.G * TILE, window
        self.tokens = layout.padded(TILE)
        visible_BYY = self.tokens.tiles(TILE, window)
        first_B11 = jnp.arange(self.B)[:, None, None] * visible_BYY.shape[1]
        # The visible ones first, in their order.
        keys_BYY = jnp.argsort(~visible_BYY, axis=-1, stable=True) + first_B11
        self.keys_YS = keys_BYY.reshape(self.Y, -1)
        self.counts_Y = jnp.sum(visible_BYY, axis=-1).reshape(self.Y)
        self.stacks = [array_BT.reshape(self.Y, TILE) for array_BT in self.tokens]

    def cut(self, x_BTHC: jax.Array) -> jax.Array:
        """Returns x (Y, K, N, C): the tokens of a tile once for each of the heads that a key head serves."""
        padded = jnp.pad(x_BTHC, ((0, 0), (0, self.X - self.T), (0, 0), (0, 0)))
        parted = padded.reshape(self.Y, TILE, self.K, -1, self.C)
        return parted.transpose(0, 2, 3, 1, 4).reshape(self.Y, self.K, -1, self.C)

    def join(self, x_YKNC: jax.Array) -> jax.Array:
        """Returns x (B, T, H, C), the inverse of `cut`."""
        parted = x_YKNC.reshape(self.Y, self.K, -1, TILE, self.C).transpose(0, 3, 1, 2, 4)
        return parted.reshape(self.B, self.X, -1, self.C)[:, : self.T]

    def by_query(self, x_H: jax.Array) -> jax.Array:
        """Returns x (K, N): one number of each head for each token of a tile."""
        return jnp.repeat(x_H.astype(jnp.float32), TILE).reshape(self.K, self.N)

    def mask(self, query: Any, key: Any) -> jax.Array:
        """Returns mask_TT of a tile of queries and one of keys of the same row."""
        mine, theirs = ([at(stack, index) for stack in self.stacks] for index in (query, key))
        mask_TT = (mine[0][:, None] == theirs[0][None]) & (mine[0] > 0)[:, None]
        mask_TT &= (mine[1][:, None] == theirs[1][None]) | (theirs[1] == 0)[None]
        mask_TT &= jnp.tril(jnp.ones((TILE, TILE), bool)) | (key < query)
        if self.window is None:
            return mask_TT
        return mask_TT & (mine[2][:, None] - theirs[2][None] < self.window)


def at(arrays: jax.Array, index: Any) -> jax.Array:
    """Returns one array of a stack."""
    return jax.lax.dynamic_index_in_dim(arrays, index, keepdims=False)


def put(arrays: jax.Array, array: jax.Array, index: Any) -> jax.Array:
    """Returns the stack with one array of it replaced."""
    return jax.lax.dynamic_update_index_in_dim(arrays, array, index, 0)


def _forward(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    layout: Layout,
    window: Any,
    sinks_H: jax.Array | None = None,
) -> tuple[jax.Array, tuple]:
    tiles = _Tiles(q_BTHC, k_BTKC, layout, window)
    K, G, N, C, dtype = tiles.K, tiles.G, tiles.N, tiles.C, q_BTHC.dtype
    queries, values = tiles.cut(q_BTHC), tiles.cut(v_BTKC)
    keys = tiles.cut(k_BTKC).swapaxes(2, 3)  # as the right side of a product

    def of_query(query: Any, carry: tuple) -> tuple:
        q_KNC = at(queries, query)

        def of_key(nth: Any, carry: tuple) -> tuple:
            top_KN1, total_KN1, sum_KNC = carry
            key = tiles.keys_YS[query, nth]
            scores = _product("KNC,KCT->KNT", q_KNC, at(keys, key)).reshape(K, G, TILE, TILE)
            seen = tiles.mask(query, key)[None, None]
            scores = jnp.where(seen, scores * (C**-0.5), FLOOR).reshape(K, N, TILE)
            new_KN1 = jnp.maximum(top_KN1, jnp.max(scores, axis=-1, keepdims=True))
            weights, fading_KN1 = jnp.exp(scores - new_KN1), jnp.exp(top_KN1 - new_KN1)
            total_KN1 = total_KN1 * fading_KN1 + jnp.sum(weights, axis=-1, keepdims=True)
            added = _product("KNT,KTC->KNC", weights.astype(dtype), at(values, key))
            return new_KN1, total_KN1, sum_KNC * fading_KN1 + added

        zeros_KN1 = jnp.zeros((K, N, 1))
        empty = zeros_KN1 + FLOOR, zeros_KN1, jnp.zeros((K, N, C))
        if sinks_H is not None:  # the first score that a query sees
            empty = tiles.by_query(sinks_H)[..., None], zeros_KN1 + 1.0, empty[2]
        top_KN1, total_KN1, sum_KNC = jax.lax.fori_loop(0, tiles.counts_Y[query], of_key, empty)
        total_KN1 = jnp.maximum(total_KN1, TINY)  # 0 where the tile sees nothing
        outputs, totals = carry
        outputs = put(outputs, (sum_KNC / total_KN1).astype(dtype), query)
        return outputs, put(totals, (top_KN1 + jnp.log(total_KN1))[..., 0], query)

    empty = jnp.zeros((tiles.Y, K, N, C), dtype), jnp.zeros((tiles.Y, K, N))
    outputs, totals = jax.lax.fori_loop(0, tiles.Y, of_query, empty)
    output_BTHC, totals = kept(tiles.join(outputs)), kept(totals)
    return output_BTHC, (q_BTHC, k_BTKC, v_BTKC, layout, window, sinks_H, output_BTHC, totals)


def _backward(saved: tuple, d_BTHC: jax.Array) -> tuple:
    q_BTHC, k_BTKC, v_BTKC, layout, window, sinks_H, output_BTHC, totals = saved
    tiles = _Tiles(q_BTHC, k_BTKC, layout, window)
    K, G, N, C, dtype = tiles.K, tiles.G, tiles.N, tiles.C, q_BTHC.dtype
    products = d_BTHC.astype(jnp.float32) * output_BTHC.astype(jnp.float32)
    inners = jnp.sum(tiles.cut(products), axis=-1)
    # Scores lie keys by queries, so that no product reads its left side by columns: slow in bfloat16.
    queries, gradients, keys, values = map(tiles.cut, (q_BTHC, d_BTHC, k_BTKC, v_BTKC))
    queries_t, gradients_t, keys_t = (x.swapaxes(2, 3) for x in (queries, gradients, keys))

    def of_query(query: Any, carry: tuple) -> tuple:
        q_KNC, q_KCN, d_KNC, d_KCN = (
            at(stack, query) for stack in (queries, queries_t, gradients, gradients_t)
        )
        total_K1N, inner_K1N = at(totals, query)[:, None], at(inners, query)[:, None]

        def of_key(nth: Any, carry: tuple) -> tuple:
            dq_KCN, dk, dv = carry
            key = tiles.keys_YS[query, nth]
            scores = _product("KTC,KCN->KTN", at(keys, key), q_KCN) * (C**-0.5) - total_K1N
            seen = tiles.mask(query, key).T[None, :, None]
            scores = jnp.where(seen, scores.reshape(K, TILE, G, TILE), FLOOR)
            weights = jnp.exp(scores).reshape(K, TILE, N)
            dweights = _product("KTC,KCN->KTN", at(values, key), d_KCN)
            dscores = (weights * (dweights - inner_K1N) * (C**-0.5)).astype(dtype)
            added = _product("KTN,KNC->KTC", weights.astype(dtype), d_KNC)
            dv = put(dv, at(dv, key) + added, key)
            dk = put(dk, at(dk, key) + _product("KTN,KNC->KTC", dscores, q_KNC), key)
            return dq_KCN + _product("KCT,KTN->KCN", at(keys_t, key), dscores), dk, dv

        dq, dk, dv = carry
        empty = jnp.zeros((K, C, N)), dk, dv
        dq_KCN, dk, dv = jax.lax.fori_loop(0, tiles.counts_Y[query], of_key, empty)
        return put(dq, dq_KCN.astype(dtype), query), dk, dv

    zeros = jnp.zeros((tiles.Y, K, TILE, C))
    empty = jnp.zeros((tiles.Y, K, C, N), dtype), zeros, zeros
    dq, dk, dv = jax.lax.fori_loop(0, tiles.Y, of_query, empty)
    dq_BTHC, dk_BTKC, dv_BTKC = (tiles.join(x) for x in (dq.swapaxes(2, 3), dk, dv))
    gradients_of_3 = dq_BTHC, dk_BTKC.astype(dtype), dv_BTKC.astype(dtype)
    if sinks_H is None:
        return *gradients_of_3, None, None, None
    weights = jnp.exp(tiles.by_query(sinks_H)[None] - totals)
    dsinks_H = -jnp.sum((weights * inners).reshape(tiles.Y, -1, TILE), axis=(0, 2))
    return *gradients_of_3, None, None, dsinks_H.astype(sinks_H.dtype)


tiled.defvjp(_forward, _backward)
