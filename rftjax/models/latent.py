"""Multi-head latent attention (DeepSeek-AI 2024): keys and values of all heads from one latent vector a token.

    attention/query/kernel (L, D, H, C)       or query_down/kernel (L, D, Q), query_norm/scale (L, Q) and
                                              query_up/kernel (L, Q, H, C)
    attention/latent/kernel (L, D, I + A)     the latent vector and a rotated key that all heads share
    attention/latent_norm/scale (L, I)
    attention/expand/kernel (L, I, H, C - A + O)  keys without their rotated part, and values
    attention/output/kernel (L, H, O, D)

The update expands keys and values. The sampler keeps I + A numbers a token, and multiplies queries and attended latent
vectors by the two halves of `expand` in place of them (absorbed).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rftjax.models.across import Expansion, Stays
from rftjax.models.config import CacheLeaf, Config, Stack
from rftjax.models.layers import Attend, Linear, Norm, mapped
from rftjax.models.rotary import Turn, rotate

NORM_EPS = 1e-6  # of the norms inside, whatever the config's is


def cache(config: Config, stack: Stack) -> tuple[CacheLeaf, ...]:
    """Returns what the cache holds of a token: its normed latent vector and the rotated key."""
    rank, rotated = config.latent.rank, config.latent.rotated
    return (
        CacheLeaf("latent", (rank,), ("channels",)),
        CacheLeaf("rotated", (rotated,), ("channels",)),
    )


def scaled(plain: jax.Array, turned: jax.Array, scale: float) -> jax.Array:
    """Returns both parts of queries, scaled in float32."""
    both = jnp.concatenate([plain, turned], axis=-1)
    return (both.astype(jnp.float32) * scale).astype(both.dtype)


def widened(x: jax.Array, size: int) -> jax.Array:
    """Returns x with zeros behind its channels."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def expanded(
    plain: int, size: int, weights: dict[str, jax.Array], new: dict[str, jax.Array], stays: Stays
) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values of `size` channels from latent vectors; the first `plain` ones of a key do not turn."""
    keys, values = jnp.split(stays(mapped(new["latent"], weights)), [plain], axis=-1)
    rotated = new["rotated"]
    shared = jnp.broadcast_to(rotated[:, :, None], (*keys.shape[:-1], rotated.shape[-1]))
    return widened(jnp.concatenate([keys, shared], axis=-1), size), widened(values, size)


class LatentAttention(nn.Module):
    """Projections and rotation around what the caller runs, as `layers.Attention`; `absorbed`: over latent vectors."""

    config: Config
    absorbed: bool = False

    def setup(self) -> None:
        c, latent = self.config, self.config.latent
        inner = dataclasses.replace(c, norm_eps=NORM_EPS)
        heads = (c.heads, c.channels)
        if latent.query_rank:
            self.query_down = Linear((latent.query_rank,), c, use_bias=c.qkv_bias)
            self.query_norm = Norm(inner)
            self.query_up = Linear(heads, c)
        else:
            self.query = Linear(heads, c)
        self.latent = Linear((latent.rank + latent.rotated,), c, use_bias=c.qkv_bias)
        self.latent_norm = Norm(inner)
        self.expand = Linear((c.heads, c.channels - latent.rotated + latent.values), c)
        self.output = Linear((c.width,), c, axes=2, use_bias=c.output_bias)

    def __call__(self, x_BTD: jax.Array, turn: Turn, attend: Attend) -> tuple[jax.Array, Any]:
        c, latent = self.config, self.config.latent
        if latent.query_rank:
            q_BTHC = self.query_up(self.query_norm(self.query_down(x_BTD)))
        else:
            q_BTHC = self.query(x_BTD)
        plain = c.channels - latent.rotated
        q_plain, q_turned = jnp.split(q_BTHC, [plain], axis=-1)
        q_turned = rotate(self._paired(q_turned), turn)
        both = self.latent(x_BTD)
        latent_BTI = self.latent_norm(both[..., : latent.rank])
        key = rotate(self._paired(both[..., None, latent.rank :]), turn)
        new = {"latent": latent_BTI, "rotated": key[:, :, 0]}
        if self.is_initializing():
            self.expand(latent_BTI)
        kernel = self.expand.get_variable("params", "kernel")
        if not self.absorbed:
            # Forms of attention take keys and values of one width, and divide by its root.
            size = max(c.channels, latent.values)
            queries = scaled(q_plain, q_turned, c.query_scale * math.sqrt(size))
            weights = {"kernel": kernel} | self.expand.adapter()
            expansion = Expansion(weights, functools.partial(expanded, plain, size))
            attended, kept = attend(widened(queries, size), new, expansion=expansion)
            return self.output(attended[..., : latent.values]), kept
        kernel = kernel.astype(x_BTD.dtype)
        to_key, to_value = kernel[..., :plain], kernel[..., plain:]
        queries = scaled(jnp.einsum("BTHc,IHc->BTHI", q_plain, to_key), q_turned, c.query_scale)
        attended, kept = attend(queries, new)
        return self.output(jnp.einsum("BTHI,IHO->BTHO", attended, to_value)), kept

    def _paired(self, x: jax.Array) -> jax.Array:
        """Returns channels in the order that `rotate` takes: the first of each pair, then the second ones."""
        if not self.config.latent.interleaved:
            return x
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return pairs.swapaxes(-1, -2).reshape(x.shape)
