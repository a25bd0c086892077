"""The distribution that tokens are sampled from, in one place for the sampler and the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The logit of a token that cannot be sampled; finite, so that gradients stay free of NaN.
GONE = -1e30
BLOCK = 128  # tokens whose probabilities are summed before the running sum
ROWS = 8  # rows of logits in a block on CPU


class RowSettings(NamedTuple):
    """How to sample, one entry a row: temperature (0: greedy), top_p (1: off) and top_k (0: off)."""

    temperature_B: Any
    top_p_B: Any
    top_k_B: Any


def adjust(
    logits_BV: jax.Array,
    settings: RowSettings,
    *,
    filtered: bool,
    limit: int = 0,
    keep_B: jax.Array | None = None,
) -> jax.Array:
    """Returns logits_BV after temperature, top-k and top-p; tokens filtered out get GONE.

    `filtered` is static: without it no row may ask for a filter. Ids from `limit` (0: none) on are padding of the
    vocabulary and never sampled. Tokens as likely as the last one kept are kept too. `keep_B` names one token a row
    that stays whatever rounding says (the trainer's target, which the sampler did keep).
    """
    V = logits_BV.shape[-1]
    warm_B = jnp.where(settings.temperature_B > 0, settings.temperature_B, 1.0)
    logits_BV = logits_BV / warm_B[:, None]
    if 0 < limit < V:
        logits_BV = jnp.where(jnp.arange(V)[None, :] < limit, logits_BV, GONE)
    if not filtered:
        return logits_BV
    ordered_BV = -jnp.sort(-logits_BV, axis=-1)
    k_B = jnp.where(settings.top_k_B > 0, jnp.minimum(settings.top_k_B, V), V)
    kth_B1 = jnp.take_along_axis(ordered_BV, k_B[:, None] - 1, axis=-1)
    ordered_BV = jnp.where(ordered_BV >= kth_B1, ordered_BV, GONE)
    probabilities_BV = jax.nn.softmax(ordered_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    inside_BV = (before_BV < settings.top_p_B[:, None]) | (settings.top_p_B[:, None] >= 1.0)
    inside_BV = inside_BV.at[:, 0].set(True)
    count_B1 = jnp.sum(inside_BV & (ordered_BV > GONE), axis=-1, keepdims=True)
    last_B1 = jnp.take_along_axis(ordered_BV, count_B1 - 1, axis=-1)
    kept_BV = logits_BV >= last_B1
    if keep_B is not None:
        kept_BV |= jnp.arange(V)[None, :] == keep_B[:, None]
    return jnp.where(kept_BV, logits_BV, GONE)


def draw(
    logits_BV: jax.Array, uniform_B: jax.Array, temperature_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns one id a row and its log-probability, by inverting the running sum at one uniform number a row.

    Rows of temperature 0 take the largest logit, with log-probability 0. A row with NaN gives a NaN log-probability.
    The float32 sum need not be monotone nor end at 1, hence the clamp to the last id of non-zero probability.
    """
    B, V = logits_BV.shape
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    weights_BV = jnp.exp(logits_BV - top_B1)
    padding = -V % BLOCK
    weights_BNW = jnp.pad(weights_BV, ((0, 0), (0, padding))).reshape(B, -1, BLOCK)
    sums_BN = jnp.sum(weights_BNW, axis=-1)
    running_BN = jnp.cumsum(sums_BN, axis=-1)
    total_B = running_BN[:, -1]
    aim_B = uniform_B * total_B
    block_B = _first_above(running_BN, aim_B, sums_BN)
    before_B = jnp.take_along_axis(running_BN - sums_BN, block_B[:, None], axis=-1)[:, 0]
    inside_BW = jnp.take_along_axis(weights_BNW, block_B[:, None, None], axis=1)[:, 0]
    offset_B = _first_above(jnp.cumsum(inside_BW, axis=-1), aim_B - before_B, inside_BW)
    drawn_B = block_B * BLOCK + offset_B
    greedy_B = temperature_B == 0
    best_B = jax.lax.cond(  # a pass over the logits that few runs need
        jnp.any(greedy_B),
        lambda: jnp.argmax(logits_BV, axis=-1),
        lambda: jnp.zeros_like(drawn_B),
    )
    ids_B = jnp.where(greedy_B, best_B, drawn_B).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0]
    logprobs_B = chosen_B - top_B1[:, 0] - jnp.log(total_B)
    # Adding 0 * total lets a NaN through where the log-probability itself is replaced.
    return ids_B, jnp.where(greedy_B, 0.0 * total_B, logprobs_B)


def by_rows(function: Callable[..., Any], *arrays: Any) -> Any:
    """Returns function(*arrays) for arrays with a leading axis of independent rows.

    On CPU, processes the vocabulary in row blocks so that each block stays in cache between passes.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    size = math.gcd(count, ROWS)

    def blocks(*arrays: Any) -> Any:
        split = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), arrays)
        results = jax.lax.map(lambda block: function(*block), split)
        return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), results)

    if size < ROWS:  # blocks too small to be worth a loop
        return function(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=blocks, default=function)


def _first_above(running_BN: jax.Array, aim_B: jax.Array, weights_BN: jax.Array) -> jax.Array:
    """Returns the first index whose running sum exceeds the aim, among the indices of non-zero weight."""
    N = weights_BN.shape[-1]
    above_BN = (running_BN > aim_B[:, None]) & (weights_BN > 0)
    last_B = N - 1 - jnp.argmax((weights_BN > 0)[:, ::-1], axis=-1)
    return jnp.where(jnp.any(above_BN, axis=-1), jnp.argmax(above_BN, axis=-1), last_B)


def uniforms(seed: int | jax.Array, noise_B3: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Returns one number in [0, 1) a row, keyed by (seed, stream, draw, sample, position) and nothing else."""

    def one(noise_3: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        for part in (noise_3[0], noise_3[1], noise_3[2], position):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key)

    return jax.vmap(one)(noise_B3, positions_B)
