"""The layers of the decoder as Flax modules; attention over a cache or a packed row is the caller's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rftjax.models.config import Config
from rftjax.models.linear import linear, narrow
from rftjax.models.remat import kept
from rftjax.models.rotary import Turn, rotate

# What a layer calls with the queries and with what the cache holds of its new tokens, by the names that the family
# declares, each (B, T, ...); returns attended values (B, T, H, C) and whatever the caller wants to keep.
# A third argument are the sinks_H of attention that has any; `expansion=` says how keys and values come from what the
# cache holds, where these are something else (see `across.Expansion`).
Attend = Callable[..., tuple[jax.Array, Any]]

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class Linear(nn.Module):
    """A linear map over the trailing `axes` axes, plus a LoRA path where the tree holds one."""

    features: tuple[int, ...]
    config: Config
    axes: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[-self.axes :]
        init = nn.initializers.normal(self.config.init_std)
        kernel = self.param("kernel", init, (*inputs, *self.features), jnp.float32)
        y = mapped(x, {"kernel": kernel} | self.adapter(), self.axes)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            y = y + bias.astype(y.dtype).reshape(
                (1,) * (y.ndim - len(self.features)) + self.features
            )
        return kept(y)

    def adapter(self) -> dict[str, jax.Array]:
        """Returns the factors of the LoRA path, of which the second has the features' axes."""
        if not self.has_variable("lora", "a"):
            return {}
        a, b = narrow(self.get_variable("lora", "a")), self.get_variable("lora", "b")
        return {"a": a, "b": b.reshape(-1, *self.features)}


def mapped(x: jax.Array, weights: dict[str, jax.Array], axes: int = 1) -> jax.Array:
    """Returns the product of the trailing `axes` axes with a kernel, plus that of the adapter where there is one."""
    y: Any = linear(x, weights["kernel"], axes)
    if "a" in weights:
        flat = x.reshape(*x.shape[: x.ndim - axes], -1)
        y = y + linear(linear(flat, weights["a"], 1), weights["b"], 1)
    return y


class Norm(nn.Module):
    """Root-mean-square norm over the trailing `axes` axes, computed in float32 (Zhang and Sennrich 2019)."""

    config: Config
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        offset, over = self.config.norm_offset, tuple(range(-self.axes, 0))
        one = nn.initializers.constant(1.0 - offset)
        scale = self.param("scale", one, x.shape[-self.axes :], jnp.float32)
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=over, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.config.norm_eps)
        gain = scale + offset if offset else scale
        return (normed * gain.reshape((1,) * (x.ndim - self.axes) + gain.shape)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): projections and rotation around what the caller runs."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.query = Linear((c.heads, c.channels), c, use_bias=c.qkv_bias)
        self.key = Linear((c.kv_heads, c.channels), c, use_bias=c.qkv_bias)
        self.value = Linear((c.kv_heads, c.channels), c, use_bias=c.qkv_bias)
        self.output = Linear((c.width,), c, axes=2, use_bias=c.output_bias)
        if c.qk_norm:
            axes = {"head": 1, "whole": 2}[c.qk_norm]
            self.query_norm, self.key_norm = Norm(c, axes), Norm(c, axes)
        if c.sinks:
            init = nn.initializers.normal(c.init_std)
            self.sinks = self.param("sinks", init, (c.heads,), jnp.float32)

    def __call__(self, x_BTD: jax.Array, turn: Turn, attend: Attend) -> tuple[jax.Array, Any]:
        c = self.config
        q_BTHC, k_BTKC, v_BTKC = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if c.qk_norm:
            q_BTHC, k_BTKC = self.query_norm(q_BTHC), self.key_norm(k_BTKC)
        # Attention divides by sqrt(C) itself.
        scale = c.query_scale * math.sqrt(c.channels) if c.query_scale else 1.0
        new = {"keys": rotate(k_BTKC, turn), "values": v_BTKC}
        sinks = (self.sinks,) if c.sinks else ()
        attended_BTHC, held = attend(rotate(q_BTHC, turn, scale), new, *sinks)
        return self.output(attended_BTHC), held


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(config: Config, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns the inner vectors of a gated feed-forward layer (Shazeer 2020); with a `gate_limit`, of gpt-oss's form:
    both sides clipped, a sigmoid of `gate_gain` times the gate, and one added to `up` (Agarwal et al. 2025).

    Computed in float32 and rounded once; gate and up alone stay for the backward pass.
    """
    return _gated(config, gate, up)


def _gated(config: Config, gate: jax.Array, up: jax.Array) -> jax.Array:
    wide, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    limit = config.gate_limit
    if not limit:
        return (ACTIVATIONS[config.activation](wide) * up).astype(gate.dtype)
    wide, up = jnp.minimum(wide, limit), jnp.clip(up, -limit, limit)
    return (wide * jax.nn.sigmoid(wide * config.gate_gain) * (up + 1)).astype(gate.dtype)


def _gated_forward(config: Config, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple]:
    return _gated(config, gate, up), (gate, up)


def _gated_backward(config: Config, saved: tuple, gradient: jax.Array) -> tuple:
    return jax.vjp(functools.partial(_gated, config), *saved)[1](gradient)


gated.defvjp(_gated_forward, _gated_backward)


class Mlp(nn.Module):
    """Gated feed-forward layer of width `ffn`, 0: the config's."""

    config: Config
    ffn: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, ffn = self.config, self.ffn or self.config.ffn
        gate = Linear((ffn,), c, use_bias=c.mlp_bias, name="gate")(x)
        up = Linear((ffn,), c, use_bias=c.mlp_bias, name="up")(x)
        return Linear((c.width,), c, use_bias=c.mlp_bias, name="down")(gated(c, gate, up))
