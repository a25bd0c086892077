"""The shape of a model: what a family reads from its Hugging Face config, and all that the layers are built from."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

FULL = 1 << 30  # a window that no sequence fills


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: `kind` is default, linear, llama3, yarn or none (nothing turns); the rest are its settings."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = (
        0.0  # 0: yarn's own, 0.1 ln(factor) + 1, with the next two mscale's over mscale_all_dim's
    )
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


class Stack(NamedTuple):
    """Layers with parameters of equal shapes that follow each other: `name` is theirs in the tree, `first` the index of
    the first one in the model, `sparse` says that they have experts."""

    name: str
    first: int
    count: int
    sparse: bool = False


@dataclasses.dataclass(frozen=True)
class Routing:
    """Layers of experts: `chosen` of `experts` compute a token, each `ffn` wide, beside those of `shared` width that
    compute every token; no experts: none.

    `scoring` is softmax or sigmoid; `corrected`: a bias takes part in the choice and not in the weights, which sum to
    `scale` where `normalised`. A token's experts lie in `open_groups` of `groups` groups.
    """

    experts: int = 0
    chosen: int = 0
    ffn: int = 0
    shared: int = 0
    scoring: str = "softmax"
    corrected: bool = False
    normalised: bool = False
    scale: float = 1.0
    groups: int = 1
    open_groups: int = 1
    router_bias: bool = False
    bias: bool = False  # of each map of an expert
    interleaved: bool = False  # stored and exported fused, columns of gate and up in turn (gpt-oss)
    recorded: bool = False  # the sampler's cache holds the experts of each token too

    @property
    def dtype(self) -> str:
        """The smallest dtype that holds every expert's number, and -1 for none."""
        return "int8" if self.experts <= 128 else "int16"


@dataclasses.dataclass(frozen=True)
class Latent:
    """Latent attention: keys and values of a token come from `rank` numbers (0: no latent attention), queries from
    `query_rank` (0: from the token itself).

    `rotated` of a head's channels turn with the position, those of keys being shared by all heads, in pairs of
    neighbours where `interleaved`; `values` are the channels of a head's values.
    """

    rank: int = 0
    query_rank: int = 0
    rotated: int = 0
    values: int = 0
    interleaved: bool = True


class CacheLeaf(NamedTuple):
    """What the cache holds of a token in one layer: a shape, and the logical axis of each of its axes.

    The array of all rows has the positions before the last axis: (rows, K, S, C) for a shape of (K, C). `dtype` is ""
    for that of the computation.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a model; `windows` holds one attention window a layer (FULL: no limit), `ropes` one rotary embedding a
    layer (empty: `rope` in each).

    What differs between layers of equal shapes is data, one entry a layer; layers of other shapes are other `stacks`.
    """

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
    split: tuple[Stack, ...] = ()  # the stacks of a model with layers of several shapes
    routing: Routing = Routing()  # of the layers in sparse stacks
    latent: Latent = Latent()
    ropes: tuple[Rope, ...] = ()
    norms: str = "before"  # of a layer's halves: "before" or "after" them, or "both"
    norm_offset: float = 0.0  # a norm multiplies by its gain plus this
    qk_norm: str = ""  # of queries and keys before they turn: "head" (each head alone), "whole" (all heads together)
    query_scale: float = 0.0  # of attention scores, 0.0: 1 / sqrt(channels)
    activation: str = "silu"  # one of `layers.ACTIVATIONS`
    embed_scale: float = 1.0  # of embeddings
    sinks: bool = False  # each head has a score of attending to nothing
    gate_limit: float = 0.0  # see `layers.gated`, 0.0: off
    gate_gain: float = 1.0
    logit_cap: float = 0.0  # logits become cap * tanh(logits / cap), 0.0: off

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks in the order in which a token passes them."""
        return self.split or (Stack("layers", 0, self.layers),)

    @property
    def choices(self) -> tuple[int, int, str]:
        """The experts of one token: layers that have some, how many each chooses, and the dtype of their numbers."""
        layers = sum(stack.count for stack in self.stacks if stack.sparse)
        return layers, self.routing.chosen, self.routing.dtype

    def recording(self) -> Config:
        """Returns the same model, whose sampler's cache holds the experts of each token too."""
        return dataclasses.replace(self, routing=dataclasses.replace(self.routing, recorded=True))

    def stack(self, name: str) -> Stack:
        """Returns the stack of that name in the tree."""
        return next(stack for stack in self.stacks if stack.name == name)

    @property
    def distinct_ropes(self) -> tuple[Rope, ...]:
        """The rotary embeddings that any layer has, each once."""
        return tuple(dict.fromkeys(self.ropes)) or (self.rope,)

    @property
    def rope_indices(self) -> tuple[int, ...]:
        """Which of `distinct_ropes` each layer has."""
        distinct = self.distinct_ropes
        return tuple(map(distinct.index, self.ropes)) or (0,) * self.layers

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The window of each layer."""
        return self.windows or (FULL,) * self.layers

    @property
    def windowed(self) -> bool:
        """Whether any layer limits how far back a token attends."""
        return any(window < FULL for window in self.windows)
