"""The layers of the decoder as Flax modules; attention over a cache or a packed row is the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rftjax.models.attention import plain
from rftjax.models.config import Config, Stack
from rftjax.models.linear import linear
from rftjax.models.rotary import rotate

# What a layer calls with the queries and with what the cache holds of its new tokens, by the names that the family
# declares, each (B, T, ...); returns attended values (B, T, H, C) and whatever the caller wants to keep.
Attend = Callable[[jax.Array, dict[str, jax.Array]], tuple[jax.Array, Any]]


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
        y: Any = linear(x, kernel, self.axes)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            flat = x.reshape(*x.shape[: x.ndim - self.axes], math.prod(inputs))
            added: Any = linear(linear(flat, a, 1), b, 1)
            y = y + added.reshape(y.shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            y = y + bias.astype(y.dtype).reshape(
                (1,) * (y.ndim - len(self.features)) + self.features
            )
        return y


class Norm(nn.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019)."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.config.norm_eps)
        return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): projections and rotation around what the caller runs."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.query = Linear((c.heads, c.channels), c, use_bias=c.qkv_bias)
        self.key = Linear((c.kv_heads, c.channels), c, use_bias=c.qkv_bias)
        self.value = Linear((c.kv_heads, c.channels), c, use_bias=c.qkv_bias)
        self.output = Linear((c.width,), c, axes=2, use_bias=c.output_bias)

    def __call__(
        self, x_BTD: jax.Array, turn: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        q_BTHC, k_BTKC, v_BTKC = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        new = {"keys": rotate(k_BTKC, turn), "values": v_BTKC}
        attended_BTHC, kept = attend(rotate(q_BTHC, turn), new)
        return self.output(attended_BTHC), kept


class Mlp(nn.Module):
    """Gated feed-forward layer with SiLU (Shazeer 2020)."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = Linear((c.ffn,), c, use_bias=c.mlp_bias, name="gate")(x)
        up = Linear((c.ffn,), c, use_bias=c.mlp_bias, name="up")(x)
        return Linear((c.width,), c, use_bias=c.mlp_bias, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer of a stack."""

    config: Config
    stack: Stack

    def setup(self) -> None:
        self.attention_norm = Norm(self.config)
        self.attention = Attention(self.config)
        self.mlp_norm = Norm(self.config)
        self.mlp = Mlp(self.config)

    def __call__(
        self, x_BTD: jax.Array, turn: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Returns the layer's output x_BTD and what `attend` kept."""
        added_BTD, kept = self.attention(self.attention_norm(x_BTD), turn, attend)
        x_BTD = x_BTD + added_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kept


def causal(q_BTHC: jax.Array, new: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    """Attends among the new tokens alone, each to those before it (used to make initial parameters)."""
    T = q_BTHC.shape[1]
    mask_BTT = jnp.tril(jnp.ones((q_BTHC.shape[0], T, T), bool))
    return plain(q_BTHC, new["keys"], new["values"], mask_BTT), None
