"""Rotary embedding: frequencies of each kind, and how queries and keys turn."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rftjax.models.config import Config, Rope

Turn = tuple[jax.Array, jax.Array]  # sine and cosine (B, T, C / 2)


def frequencies(rope: Rope, channels: int) -> tuple[jax.Array, float]:
    """Returns the inverse frequencies (C / 2,) and the factor on sine and cosine.

    Sources: Su et al. 2021; linear: Chen et al. 2023; llama3: Llama 3.1; yarn: Peng et al. 2023.
    """
    exponents = jnp.arange(0, channels, 2, dtype=jnp.float32) / channels
    if rope.kind == "none":
        return jnp.zeros_like(exponents), 1.0
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / plain
        low = rope.original_max_positions / rope.low_freq_factor
        high = rope.original_max_positions / rope.high_freq_factor
        span = rope.high_freq_factor - rope.low_freq_factor
        smooth = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / span
        mixed = (1 - smooth) * plain / rope.factor + smooth * plain
        scaled = jnp.where(wavelengths > low, plain / rope.factor, plain)
        return jnp.where((wavelengths <= low) & (wavelengths >= high), mixed, scaled), 1.0
    assert rope.kind == "yarn", rope.kind

    def turn(rotations: float) -> float:
        ratio = rope.original_max_positions / (rotations * 2 * math.pi)
        return channels * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = turn(rope.beta_fast), turn(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    last = last + 0.001 if first == last else last
    ramp = jnp.clip((jnp.arange(channels // 2, dtype=jnp.float32) - first) / (last - first), 0, 1)
    attention_factor = rope.attention_factor or magnitude(rope.factor)
    if not rope.attention_factor and rope.mscale and rope.mscale_all_dim:
        whole = magnitude(rope.factor, rope.mscale_all_dim)
        attention_factor = magnitude(rope.factor, rope.mscale) / whole
    return plain / rope.factor * ramp + plain * (1 - ramp), attention_factor


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """Returns what yarn multiplies attention with for a context that is `factor` times as long (Peng et al. 2023)."""
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0


def rotations(config: Config, positions_BT: jax.Array) -> list[Turn]:
    """Returns sine and cosine (B, T, C / 2) in float32 for each position, by each of the distinct rotary embeddings."""
    turns = []
    for rope in config.distinct_ropes:
        inverse, factor = frequencies(rope, config.latent.rotated or config.channels)
        angles = positions_BT[..., None].astype(jnp.float32) * inverse[None, None, :]
        turns.append((jnp.sin(angles) * factor, jnp.cos(angles) * factor))
    return turns


def rotate(x_BTHC: jax.Array, turn: Turn, scale: float = 1.0) -> jax.Array:
    """Rotates the two halves of the channels against each other (Hugging Face's layout), and scales them."""
    if scale != 1.0:
        turn = turn[0] * scale, turn[1] * scale
    sine, cosine = (part[:, :, None, :] for part in turn)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHC.dtype)
