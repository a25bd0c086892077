"""Attention of packed rows by the kernel that JAX has for TPUs (splash attention), its masks told by ids and places.

The kernel asks of a pair whether two ids are equal, and a function of one number of the query and the key's place. That
says whose run a token is in, or whose prefix it sees, not both. So each row's keys lie twice behind one another: a
query finds its own run in the first copy and its group's prefix in the second. Tiles in which no pair is visible cost
nothing, and no array is of size T by T. Only windows, which are one number too many, take a mask of that size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rftjax.errors import UserError
from rftjax.models.layout import Layout, Part
from rftjax.models.remat import KEPT

TILE = 128  # tokens; T is rounded up to a multiple
LARGE = 512  # the same of rows of LONG tokens and more, whose tiles would be too many to count in scalar memory
LONG = 4096
BITS = 16  # of a query's number, for its place and for that of its run's first token
MOST = 1 << BITS
SIZES = (  # of the kernel's tiles, forward and backward
    *("block_q", "block_kv", "block_kv_compute", "block_q_dq", "block_kv_dq"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
)


class Visible(NamedTuple):
    """Whether a query sees keys that have its id: those of its run in the first copy, earlier ones in the second."""

    tokens: int  # of a copy

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Takes numbers of queries (see `numbered`) and places of keys, of one shape."""
        place = jax.lax.shift_right_logical(query, jnp.full_like(query, BITS))
        first = query & (MOST - 1)
        own = (key >= first) & (key <= place)
        before = (key >= self.tokens) & (key - self.tokens < first)
        return own | before


def numbered(layout: Layout) -> jax.Array:
    """Returns numbers_BT: a token's place and that of its run's first token, which for padding is its own."""
    places_T = jnp.arange(layout.groups_BT.shape[1], dtype=jnp.int32)
    first_BT = jnp.where(layout.groups_BT > 0, layout.firsts(), places_T[None])
    return (places_T[None] << BITS) | first_BT


def splash(
    q_BQHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    layout: Layout,
    window: Any = None,
    sinks_H: jax.Array | None = None,
    part: Part | None = None,
) -> jax.Array:
    """Returns what `attention.plain` does, for tokens that attend to any; of a part of the queries, whole tiles, alone.

    Empty tiles of the mask cost nothing, so a completion does not pay for its neighbours.
    """
    B, Q, H, C = q_BQHC.shape
    K, S = k_BSKC.shape[2], k_BSKC.shape[1]
    if S > MOST:
        raise UserError(
            f"model.attention='splash': packed rows of {S:,} tokens, at most {MOST:,}; lower batch.pack_tokens and"
            " rollout.max_length, or set model.attention='blocked'"
        )
    tile = LARGE if S >= LONG and (part is None or Q % LARGE == 0) else TILE
    assert part is None or Q % tile == 0, (Q, tile)  # `row_unit`
    X = Q + -Q % tile

    def pad(x_BTHC: jax.Array) -> jax.Array:
        spare = -x_BTHC.shape[1] % tile
        return jnp.pad(x_BTHC, ((0, 0), (0, spare), (0, 0), (0, 0))).swapaxes(1, 2)

    q_BHXC, keys, values = pad(q_BQHC * (C**-0.5)), pad(k_BSKC), pad(v_BSKC)
    q_BKGXC = q_BHXC.reshape(B, K, H // K, X, C)
    part = part or Part(0, X)
    if window is None:
        keys, values = (jnp.concatenate([x, x], axis=2) for x in (keys, values))
        kernels = _by_ids(layout.padded(tile), tile, part)
    else:
        kernels = _by_mask(layout.padded(tile), tile, part, window)
    sinks = () if sinks_H is None else (sinks_H.reshape(K, H // K),)

    def run(kernel: Any, ids: Any, *heads: jax.Array) -> jax.Array:
        return jax.vmap(lambda q, k, v, *sinks: kernel(q, k, v, ids, *sinks))(*heads)

    rows = [
        run(*kernel, q_BKGXC[row], keys[row], values[row], *sinks)
        for row, kernel in enumerate(kernels)
    ]
    return jnp.stack(rows).reshape(B, H, X, C).swapaxes(1, 2)[:, :Q]


def _by_ids(layout: Layout, tile: int, part: Part) -> list[tuple[Any, Any]]:
    """Returns a kernel and ids a row for keys that lie twice behind one another."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    B, X = layout.groups_BT.shape
    own_BYY, prefix_BYY = layout.parts(tile)
    # The kernel gives NaN for what attends to nothing: padding sees itself.
    own_BYY |= jnp.eye(X // tile, dtype=bool)[None]
    visible_BNS = part.of(jnp.concatenate([own_BYY, prefix_BYY], axis=2), unit=tile)
    shared_BT = (layout.segments_BT == 0) & (layout.groups_BT > 0)
    prefixes_BT = jnp.where(shared_BT, layout.groups_BT, -1)
    numbers, groups = part.of(numbered(layout)), part.of(layout.groups_BT)

    def row(at: int) -> tuple[Any, Any]:
        both = jnp.concatenate([layout.groups_BT[at], prefixes_BT[at]])
        ids = kernels.SegmentIds(q=groups[at], kv=both)
        return _kernel(visible_BNS[at], tile, Visible(X), q_sequence=numbers[at]), ids

    return [row(at) for at in range(B)]


def _by_mask(layout: Layout, tile: int, part: Part, window: Any) -> list[tuple[Any, Any]]:
    """Returns a kernel a row, which needs no ids, for keys that lie once, from a mask of all pairs."""
    B, X = layout.groups_BT.shape
    mask_BQX = layout.mask(window, part) | part.of(jnp.eye(X, dtype=bool), axis=0)[None]
    tiles = mask_BQX.reshape(B, -1, tile, X // tile, tile).swapaxes(2, 3)
    visible_BNY, blocks = jnp.any(tiles, axis=(3, 4)), tiles.reshape(B, -1, tile, tile)
    return [
        (_kernel(visible_BNY[at], tile, None, partial_mask_blocks=blocks[at]), None)
        for at in range(B)
    ]


def _kernel(visible_YS: jax.Array, tile: int, function: Visible | None, **mask: jax.Array) -> Any:
    """Returns the kernel for a row's heads of one key head; `mask` is what it looks at in visible tiles."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos

    shape, blocks = visible_YS.shape, mask.get("partial_mask_blocks")

    def info(axis: int, blocks: jax.Array | None) -> Any:
        numbers = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        # What an empty tile would read: what was read last, so that nothing is moved for it.
        data_YS = jnp.where(visible_YS, jax.lax.broadcasted_iota(jnp.int32, shape, axis), 0)
        given: dict[str, Any] = {
            "data_next": jax.lax.cummax(data_YS, axis=axis)[None],
            "mask_next": None if blocks is None else jnp.where(visible_YS, numbers, 0)[None],
            "block_mask": visible_YS[None].astype(jnp.int32),
            "partial_mask_blocks": blocks,
            "q_sequence": mask.get("q_sequence"),
            "is_dynamic_mask": True,
        }
        return infos.MaskInfo(**given)

    along_keys = info(1, blocks)
    sizes: dict[str, Any] = dict.fromkeys(SIZES, tile)
    return kernels.SplashAttentionKernel(
        along_keys,
        along_keys,
        info(0, None if blocks is None else blocks.swapaxes(-1, -2)),
        block_sizes=kernels.BlockSizes(**sizes),
        is_mqa=True,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=KEPT,
        mask_function=function,
        interpret=False,
    )
