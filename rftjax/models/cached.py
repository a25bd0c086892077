"""Attention of new tokens over a KV cache: plain, or on NVIDIA GPUs cuDNN's for prompts and a kernel for decoding.

Where `shards` devices divide the cache (mesh axis `context`), position p of a row lies on device p % shards, at place
p // shards: a longer cache moves nothing between devices, and a short row is everybody's work.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rftjax.devices.sharding import CONTEXT
from rftjax.models import attention

TILE = 64  # cache positions that the kernel looks at together
LEAST = 16  # query heads a product takes at least
KERNELS = ("cudnn", "triton")  # the forms with a kernel for decoding


def over(
    form: str,
    q_BTHC: jax.Array,
    seen: dict[str, jax.Array],
    positions_BT: jax.Array,
    window: Any,
    sinks_H: jax.Array | None = None,
    shards: int = 1,
) -> jax.Array:
    """Returns what `attend` does for the leaves of one layer's cache, or `latent` where there are no keys."""
    if "latent" in seen:
        return latent(q_BTHC, seen["latent"], seen["rotated"], positions_BT, window, shards)
    return attend(form, q_BTHC, seen["keys"], seen["values"], positions_BT, window, sinks_H, shards)


def form_on(form: str, mesh: Mesh | None) -> str:
    """Returns the form in which a sampler attends on a mesh: heads over `tensor` are the compiler's to share out, which
    it cannot do to a kernel."""
    divided = mesh is not None and mesh.shape["tensor"] > 1
    return "plain" if divided and form in KERNELS else form


def own_places(positions_BT: jax.Array, S: int, shards: int) -> jax.Array:
    """Returns where positions lie on this device, S for those of other devices and beyond the cache."""
    if shards == 1:
        return positions_BT
    mine_BT = positions_BT % shards == jax.lax.axis_index(CONTEXT)
    return jnp.where(mine_BT, positions_BT // shards, S)


def _visible(positions_BT: jax.Array, S: int, window: Any, shards: int) -> jax.Array:
    """Returns mask_BTS of the places of this device."""
    places_S = jnp.arange(S)
    if shards > 1:
        places_S = places_S * shards + jax.lax.axis_index(CONTEXT)
    back_BTS = positions_BT[:, :, None] - places_S[None, None, :]
    return (back_BTS >= 0) & (back_BTS < window)


def _joined(scores: jax.Array, values_of: Any, sinks: jax.Array | None = None) -> jax.Array:
    """Returns the values of a softmax over scores (..., S) of which each device has its own; the largest score, the sum
    and the weighted values go over all of them, the scores and the cache over none."""
    top = jax.lax.pmax(jnp.max(scores, axis=-1, keepdims=True), CONTEXT)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    weights = jnp.exp(scores - top)
    values = values_of(weights).astype(jnp.float32)
    total, values = jax.lax.psum((jnp.sum(weights, axis=-1, keepdims=True), values), CONTEXT)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    return values / total


def attend(
    form: str,
    q_BTHC: jax.Array,
    keys_BKSC: jax.Array,
    values_BKSC: jax.Array,
    positions_BT: jax.Array,
    window: Any,
    sinks_H: jax.Array | None = None,
    shards: int = 1,
) -> jax.Array:
    """Returns attended values (B, T, H, C): a token at position p sees those of its row from p - window + 1 to p.

    `form` is one of `attention.FORMS`; all but `cudnn` and `triton` are the same here, and those too where several
    devices divide the cache. What a token beyond the cache gets is not used.
    """
    form = form if shards == 1 else "plain"
    if form in KERNELS and q_BTHC.shape[1] == 1 and suits(keys_BKSC):
        one = q_BTHC[:, 0], keys_BKSC, values_BKSC, positions_BT[:, 0], window, sinks_H
        return single(*one)[:, None]
    mask_BTS = _visible(positions_BT, keys_BKSC.shape[2], window, shards)
    if form == "cudnn":
        return attention.cudnn(
            q_BTHC, keys_BKSC.swapaxes(1, 2), values_BKSC.swapaxes(1, 2), mask_BTS, sinks_H
        )
    if lonely(q_BTHC, keys_BKSC):
        twice = jnp.repeat(q_BTHC, 2, axis=2)
        sinks = None if sinks_H is None else jnp.repeat(sinks_H, 2)
        return plain(twice, keys_BKSC, values_BKSC, mask_BTS, sinks, shards)[:, :, ::2]
    return plain(q_BTHC, keys_BKSC, values_BKSC, mask_BTS, sinks_H, shards)


def lonely(q_BTHC: jax.Array, keys_BKSC: jax.Array) -> bool:
    """Whether each product has one query: XLA's CPU compiler has no bfloat16 product for that, but one for two."""
    same = q_BTHC.shape[1] == 1 and q_BTHC.shape[2] == keys_BKSC.shape[1]
    return same and keys_BKSC.dtype == jnp.bfloat16


def latent(
    q_BTHC: jax.Array,
    latent_BSI: jax.Array,
    rotated: jax.Array,
    positions_BT: jax.Array,
    window: Any,
    shards: int = 1,
) -> jax.Array:
    """Returns attended latent vectors (B, T, H, I) of scaled queries that were absorbed: `latent` is key and value of
    all heads, to which `rotated` (B, S, channels that turn) adds its part of the scores (see `models.latent`)."""
    q_BTHI, q_rotated = jnp.split(q_BTHC, [latent_BSI.shape[-1]], axis=-1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BTHS = product("BTHI,BSI->BTHS", q_BTHI, latent_BSI)
    scores_BTHS += product("BTHp,BSp->BTHS", q_rotated, rotated)
    mask_BTS = _visible(positions_BT, latent_BSI.shape[1], window, shards)
    scores_BTHS = jnp.where(mask_BTS[:, :, None], scores_BTHS, attention.FLOOR)

    def attended(weights_BTHS: jax.Array) -> jax.Array:
        return jnp.einsum("BTHS,BSI->BTHI", weights_BTHS.astype(latent_BSI.dtype), latent_BSI)

    if shards > 1:
        return _joined(scores_BTHS, attended).astype(latent_BSI.dtype)
    return attended(jax.nn.softmax(scores_BTHS, axis=-1))


def plain(
    q_BTHC: jax.Array,
    keys_BKSC: jax.Array,
    values_BKSC: jax.Array,
    mask_BTS: jax.Array,
    sinks_H: jax.Array | None = None,
    shards: int = 1,
) -> jax.Array:
    """Returns attended values by two products, the form that the others are compared with."""
    B, T, H, C = q_BTHC.shape
    K = keys_BKSC.shape[1]
    q_BKGTC = (q_BTHC.reshape(B, T, K, H // K, C) * (C**-0.5)).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("BKGTC,BKSC->BKGTS", q_BKGTC, keys_BKSC, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores, attention.FLOOR)

    def values_of(weights: jax.Array) -> jax.Array:
        return jnp.einsum("BKGTS,BKSC->BKGTC", weights.astype(values_BKSC.dtype), values_BKSC)

    if shards > 1:
        sinks = None if sinks_H is None else sinks_H.reshape(1, K, H // K, 1, 1)
        attended = _joined(scores, values_of, sinks).astype(values_BKSC.dtype)
    else:
        attended = values_of(attention.softmax(scores, sinks_H))
    return attended.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def suits(keys_BKSC: jax.Array) -> bool:
    """Whether the kernel takes such a cache: its tiles have sides that are powers of two."""
    S, C = keys_BKSC.shape[2:]
    return S % TILE == 0 and C >= 16 and C & (C - 1) == 0


def single(
    q_BHC: jax.Array,
    keys_BKSC: jax.Array,
    values_BKSC: jax.Array,
    position_B: jax.Array,
    window: Any,
    sinks_H: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns attended values (B, H, C) of one token a row, which reads no more of the cache than it sees.

    One program a row and key head, over tiles of positions with a running maximum and sum (Dao et al. 2022), written in
    Pallas for Triton. `interpret` runs it step by step on any device.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    B, H, C = q_BHC.shape
    K, S = keys_BKSC.shape[1:3]
    G = H // K
    position_B = jnp.where(position_B < S, position_B, 0)  # an idle row reads one tile, not all
    end_B = (position_B + 1).astype(jnp.int32)
    start_B = jnp.maximum(end_B - window, 0).astype(jnp.int32)
    # Query heads of a key head side by side, filled up to what a product takes.
    spare = max(LEAST, 1 << (G - 1).bit_length()) - G
    q_BKGC = jnp.pad(q_BHC.reshape(B, K, G, C), ((0, 0), (0, 0), (0, spare), (0, 0)))

    def heads(rows: int) -> Any:
        return pallas.BlockSpec((None, None, rows, C), lambda row, head: (row, head, 0, 0))

    # A sink is where the running maximum and sum begin; without sinks there is nothing.
    first_KG = jnp.full((K, G + spare), attention.FLOOR)
    if sinks_H is not None:
        first_KG = first_KG.at[:, :G].set(sinks_H.reshape(K, G).astype(jnp.float32))
    of_head = pallas.BlockSpec((None, G + spare), lambda row, head: (head, 0))
    one = pallas.BlockSpec((1,), lambda row, head: (row,))
    attended = pallas.pallas_call(
        functools.partial(_kernel, scale=C**-0.5, sunk=sinks_H is not None),
        grid=(B, K),
        in_specs=[one, one, of_head, heads(G + spare), heads(S), heads(S)],
        out_specs=heads(G + spare),
        out_shape=jax.ShapeDtypeStruct(q_BKGC.shape, q_BHC.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(start_B, end_B, first_KG, q_BKGC, keys_BKSC, values_BKSC)
    return attended[:, :, :G].reshape(B, H, C)


def _kernel(
    start: Any,
    end: Any,
    sinks: Any,
    query: Any,
    keys: Any,
    values: Any,
    attended: Any,
    *,
    scale: float,
    sunk: bool,
) -> None:
    """Computes one row's query heads of one key head; the arguments are references to memory."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    first, behind = start[0], end[0]
    q = query[...]

    def tile(index: Any, carry: tuple) -> tuple:
        top, total, output = carry
        at = index * TILE
        found = pallas.ds(at, TILE)
        places = at + jnp.arange(TILE)
        scores = triton.dot(q, keys[found, :].T).astype(jnp.float32) * scale
        scores = jnp.where(
            ((places >= first) & (places < behind))[None, :], scores, attention.FLOOR
        )
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - new_top[:, None])
        fading = jnp.exp(top - new_top)
        product = triton.dot(weights.astype(q.dtype), values[found, :]).astype(jnp.float32)
        total = total * fading + jnp.sum(weights, axis=1)
        return new_top, total, output * fading[:, None] + product

    rows = q.shape[0]
    nothing = sinks[...], jnp.full(rows, float(sunk)), jnp.zeros(q.shape, jnp.float32)
    tiles = (behind + TILE - 1) // TILE
    _, total, output = jax.lax.fori_loop(first // TILE, tiles, tile, nothing)
    attended[...] = (output / total[:, None]).astype(q.dtype)
