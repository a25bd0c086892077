"""The decoder-only transformer that the Llama and Qwen2 families share.

Parameters are a plain nested dict; everything under `layers` carries a leading L axis:

    embed/embedding (V, D)
    layers/attention_norm/scale (L, D)          layers/mlp_norm/scale (L, D)
    layers/attention/query/kernel (L, D, H, C)  [bias (L, H, C)]; key and value with K for H
    layers/attention/output/kernel (L, H, C, D) [bias (L, D)]
    layers/mlp/gate/kernel, up/kernel (L, D, F) [bias (L, F)]; down/kernel (L, F, D) [bias (L, D)]
    final_norm/scale (D)
    head/kernel (D, V)                          only where the embedding is not tied

LoRA adapters are a tree of the same form in which each adapted linear layer holds a
(L, inputs, rank) and b (L, rank, outputs).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rftjax.models.attention import Layout, attend, plain
from rftjax.models.linear import linear
from rftjax.types import Params

FULL = 1 << 30  # a window that no sequence fills


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: `kind` is default, linear, llama3 or yarn; the rest are its settings."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # 0: yarn's own, 0.1 ln(factor) + 1
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a model; `windows` holds one attention window a layer (FULL: no limit)."""

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    channels: int
    ffn: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int, ...] = ()
    init_std: float = 0.02
    dtype: str = "float32"
    attention: str = "blocked"  # one of `attention.FORMS`, in the update

    @property
    def windowed(self) -> bool:
        """Whether any layer limits how far back a token attends."""
        return any(window < FULL for window in self.windows)


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
    """The four projections; what lies between them (cache or mask) is the caller's."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.query = Linear((c.heads, c.channels), c, use_bias=c.qkv_bias)
        self.key = Linear((c.kv_heads, c.channels), c, use_bias=c.qkv_bias)
        self.value = Linear((c.kv_heads, c.channels), c, use_bias=c.qkv_bias)
        self.output = Linear((c.width,), c, axes=2, use_bias=c.output_bias)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns q_BTHC, k_BTKC and v_BTKC before rotation."""
        return self.query(x), self.key(x), self.value(x)

    def __call__(self, attended_BTHC: jax.Array) -> jax.Array:
        return self.output(attended_BTHC)


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
    """One layer in two halves, around whatever attention the caller runs between them."""

    config: Config

    def setup(self) -> None:
        self.attention_norm = Norm(self.config)
        self.attention = Attention(self.config)
        self.mlp_norm = Norm(self.config)
        self.mlp = Mlp(self.config)

    def before(
        self, x_BTD: jax.Array, rotation: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated q_BTHC and k_BTKC, and v_BTKC."""
        q_BTHC, k_BTKC, v_BTKC = self.attention.project(self.attention_norm(x_BTD))
        return rotate(q_BTHC, rotation), rotate(k_BTKC, rotation), v_BTKC

    def after(self, x_BTD: jax.Array, attended_BTHC: jax.Array) -> jax.Array:
        """Returns the layer's output x_BTD."""
        x_BTD = x_BTD + self.attention(attended_BTHC)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    def __call__(self, x_BTD: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Runs the layer with causal attention (used to make initial parameters)."""
        q, k, v = self.before(x_BTD, rotation)
        ones_BTT = jnp.ones((x_BTD.shape[0], x_BTD.shape[1], x_BTD.shape[1]), bool)
        return self.after(x_BTD, plain(q, k, v, jnp.tril(ones_BTT)))


def frequencies(rope: Rope, channels: int) -> tuple[jax.Array, float]:
    """Returns the inverse frequencies (C / 2,) and the factor on sine and cosine.

    Sources: Su et al. 2021; linear: Chen et al. 2023; llama3: Llama 3.1; yarn: Peng et al. 2023.
    """
    exponents = jnp.arange(0, channels, 2, dtype=jnp.float32) / channels
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
    attention_factor = rope.attention_factor or 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    return plain / rope.factor * ramp + plain * (1 - ramp), attention_factor


def rotation(config: Config, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns sine and cosine (B, T, C / 2) in float32 for each position."""
    inverse, factor = frequencies(config.rope, config.channels)
    angles = positions_BT[..., None].astype(jnp.float32) * inverse[None, None, :]
    return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x_BTHC: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the two halves of the channels against each other (Hugging Face's layout)."""
    sine, cosine = (part[:, :, None, :] for part in rotation)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x_BTHC.dtype)


def reading_dtype(name: str, dtype: str) -> str:
    """Returns the dtype in which the forward pass reads a parameter whose path ends in `name`: norm gains in float32,
    all else in the compute dtype."""
    return "float32" if name == "scale" else dtype


def cast(params: Params, dtype: str) -> Params:
    """Returns the parameters as the forward pass reads them; leaves of that dtype are the same arrays."""

    def one(path: tuple, leaf: Any) -> Any:
        return leaf.astype(reading_dtype(path[-1].key, dtype))

    return jax.tree_util.tree_map_with_path(one, params)


def embed(config: Config, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Returns x_BTD in the compute dtype."""
    return jnp.take(params["embed"]["embedding"], tokens_BT, axis=0).astype(config.dtype)


def hidden(
    config: Config,
    params: Params,
    tokens_RX: jax.Array,
    positions_RX: jax.Array,
    groups_RX: jax.Array,
    segments_RX: jax.Array,
    *,
    lora: Params | None = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Returns the last layer's normed output x_RXD for packed rows (see `types.Pack`), which lie on the mesh."""
    block: Any = Block(config)
    final_norm: Any = Norm(config)
    turn = rotation(config, positions_RX)
    layout = Layout(groups_RX, segments_RX, positions_RX)

    def layer(x_RXD: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        tree, window = inputs
        q, k, v = block.apply(tree, x_RXD, turn, method="before")
        limit = window if config.windowed else None
        attended = attend(config.attention, q, k, v, layout, limit, mesh)
        return block.apply(tree, x_RXD, attended, method="after"), None

    trees = {"params": params["layers"]} | ({"lora": lora["layers"]} if lora else {})
    windows = config.windows or (FULL,) * config.layers
    x_RXD = embed(config, params, tokens_RX)
    body = jax.checkpoint(layer) if remat else layer
    if isinstance(params["layers"], dict):
        windows_L = jnp.asarray(windows, jnp.int32)
        x_RXD, _ = jax.lax.scan(body, x_RXD, (trees, windows_L))
    else:
        body = jax.jit(body)  # traced once for all layers
        for index, window in enumerate(windows):
            tree = {name: layers[index] for name, layers in trees.items()}
            x_RXD, _ = body(x_RXD, (tree, window))
    return final_norm.apply({"params": params["final_norm"]}, x_RXD)


def unroll(config: Config, tree: Params) -> Params:
    """Returns the tree in the form that runs fastest on CPU: a list of layers, and a separate head (D, V).

    In a scan, XLA's CPU backend copies the whole stacked gradient in every layer; a product with a (D, V) head is
    faster than with the embedding (V, D).
    """
    one = [
        jax.tree.map(lambda leaf, at=at: leaf[at], tree["layers"]) for at in range(config.layers)
    ]
    unrolled = tree | {"layers": one}
    if config.tied and "embed" in tree:
        unrolled["head"] = {"kernel": tree["embed"]["embedding"].T}
    return unrolled


def roll(config: Config, tree: Params) -> Params:
    """Returns a gradient of an unrolled tree as that of the tree itself."""
    rolled = tree | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["layers"])}
    if config.tied and "head" in tree:
        head = rolled.pop("head")["kernel"]
        rolled["embed"] = {"embedding": rolled["embed"]["embedding"] + head.T}
    return rolled


def logits(config: Config, params: Params, x_MD: jax.Array) -> jax.Array:
    """Returns logits_MV in float32; a tied head is the embedding where the tree holds none of its own."""
    if "head" in params:
        return linear(x_MD, params["head"]["kernel"], 1, True)
    kernel_VD = params["embed"]["embedding"].astype(config.dtype)
    return jnp.einsum("MD,VD->MV", x_MD, kernel_VD, preferred_element_type=jnp.float32)


def init(config: Config, key: jax.Array) -> Params:
    """Returns fresh float32 parameters, normal with the config's standard deviation."""
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    x_BTD = jnp.zeros((1, 1, config.width), config.dtype)
    turn = rotation(config, jnp.zeros((1, 1), jnp.int32))
    block = Block(config)
    layers = jax.vmap(lambda k: block.init(k, x_BTD, turn)["params"])(
        jax.random.split(layers_key, config.layers)
    )
    params = {
        "embed": {
            "embedding": jax.random.normal(embed_key, (config.vocab, config.width))
            * config.init_std
        },
        "layers": layers,
        "final_norm": {"scale": jnp.ones((config.width,))},
    }
    if not config.tied:
        kernel_DV = jax.random.normal(head_key, (config.width, config.vocab)) * config.init_std
        params["head"] = {"kernel": kernel_DV}
    return params
