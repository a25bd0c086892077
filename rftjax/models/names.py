"""Tables that families of the shared decoder declare: Hugging Face names, in both directions, logical axes, cache."""

from __future__ import annotations

from typing import NamedTuple

from rftjax.models.config import CacheLeaf, Config, Stack

DECODER_AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("embed", "embedding"): ("vocab", "width"),
    ("head", "kernel"): ("width", "vocab"),
    ("attention_norm", "scale"): ("gain",),
    ("mlp_norm", "scale"): ("gain",),
    ("attention_output_norm", "scale"): ("gain",),
    ("mlp_output_norm", "scale"): ("gain",),
    ("query_norm", "scale"): ("gain",),
    ("key_norm", "scale"): ("gain",),
    ("final_norm", "scale"): ("gain",),
    ("query", "kernel"): ("width", "heads", "channels"),
    ("query", "bias"): ("heads", "channels"),
    ("key", "kernel"): ("width", "kv_heads", "channels"),
    ("key", "bias"): ("kv_heads", "channels"),
    ("value", "kernel"): ("width", "kv_heads", "channels"),
    ("value", "bias"): ("kv_heads", "channels"),
    ("output", "kernel"): ("heads", "channels", "width"),
    ("output", "bias"): ("width",),
    ("gate", "kernel"): ("width", "ffn"),
    ("gate", "bias"): ("ffn",),
    ("up", "kernel"): ("width", "ffn"),
    ("up", "bias"): ("ffn",),
    ("down", "kernel"): ("ffn", "width"),
    ("down", "bias"): ("width",),
    ("attention", "sinks"): ("heads",),
}

EXPERT_AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("router", "weight"): ("width", "routes"),
    ("router", "correction"): ("routes",),
    ("router", "router_bias"): ("routes",),
    ("experts_gate", "kernel"): ("experts", "width", "ffn"),
    ("experts_up", "kernel"): ("experts", "width", "ffn"),
    ("experts_down", "kernel"): ("experts", "ffn", "width"),
    ("experts_gate", "bias"): ("experts", "ffn"),
    ("experts_up", "bias"): ("experts", "ffn"),
    ("experts_down", "bias"): ("experts", "width"),
}
LATENT_AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("query_down", "kernel"): ("width", "channels"),
    ("query_down", "bias"): ("channels",),
    ("query_up", "kernel"): ("rank", "heads", "channels"),
    ("latent", "kernel"): ("width", "channels"),
    ("latent", "bias"): ("channels",),
    ("latent_norm", "scale"): ("gain",),
    ("expand", "kernel"): ("rank", "heads", "channels"),
}
# Of a norm over all heads together, whose gain has their shape.
WHOLE_NORM_AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("query_norm", "scale"): ("heads", "channels"),
    ("key_norm", "scale"): ("kv_heads", "channels"),
}
# A layer's norms by where they stand (`Config.norms`): ours, and Hugging Face's name.
NORMS = {
    "before": {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
    "after": {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}


class Name(NamedTuple):
    """One tensor: `hf` holds `{layer}` where the tensor exists once a layer; `path` begins with its stack then.

    `inputs` is how many leading axes of ours (without L) are inputs: Hugging Face's matrices are
    (outputs, inputs), so a kernel is flattened to (inputs, outputs) and transposed; 0 means that
    the tensor is taken as it is, flattened unless it is the embedding. Where `hf` holds `{expert}`,
    each expert has a tensor, and `shape` an axis of experts in front.
    """

    path: tuple[str, ...]
    hf: str
    shape: tuple[int, ...]
    inputs: int

    @property
    def single(self) -> tuple[int, ...]:
        """The shape without the axis of experts."""
        return self.shape[1:] if "{expert}" in self.hf else self.shape


def layers_of(config: Config, name: Name) -> range:
    """Returns the layers of the model that a leaf holds, none where it is of no layer."""
    if "{layer}" not in name.hf:
        return range(0)
    stack = config.stack(name.path[0])
    return range(stack.first, stack.first + stack.count)


def tensors_of(config: Config, name: Name, hf: str = "") -> list[str]:
    """Returns the names of a leaf's tensors in the order in which it holds them, by its own pattern or another one."""
    experts = range(name.shape[0] if "{expert}" in name.hf else 1)
    layers = layers_of(config, name) or range(1)
    pattern = hf or name.hf
    return [pattern.format(layer=layer, expert=expert) for layer in layers for expert in experts]


def decoder_names(config: Config) -> list[Name]:
    """Returns every tensor of a checkpoint with its own (unstacked) shape."""
    c = config
    table = [Name(("embed", "embedding"), "model.embed_tokens.weight", (c.vocab, c.width), 0)]
    for stack in c.stacks:
        table += _layer_names(c, stack)
    table.append(Name(("final_norm", "scale"), "model.norm.weight", (c.width,), 0))
    if not c.tied:
        table.append(Name(("head", "kernel"), "lm_head.weight", (c.width, c.vocab), 1))
    return table


def _layer_names(config: Config, stack: Stack) -> list[Name]:
    c = config
    head, kv_head = (c.heads, c.channels), (c.kv_heads, c.channels)
    linears = [] if not c.latent.rank else _latent_linears(c)
    linears = linears or [
        ("attention", "query", "self_attn.q_proj", (c.width,), head, c.qkv_bias),
        ("attention", "key", "self_attn.k_proj", (c.width,), kv_head, c.qkv_bias),
        ("attention", "value", "self_attn.v_proj", (c.width,), kv_head, c.qkv_bias),
        ("attention", "output", "self_attn.o_proj", head, (c.width,), c.output_bias),
    ]
    if not stack.sparse:
        linears += _gated("mlp", "mlp.", c.width, c.ffn, c.mlp_bias)
    elif c.routing.shared:
        linears += _gated("shared", "mlp.shared_experts.", c.width, c.routing.shared, False)
    table = _expert_names(c, stack) if stack.sparse else []
    for part, ours, theirs, inputs, outputs, bias in linears:
        stem, path = "model.layers.{layer}." + theirs, (stack.name, part, ours)
        table.append(Name((*path, "kernel"), stem + ".weight", (*inputs, *outputs), len(inputs)))
        if bias:
            table.append(Name((*path, "bias"), stem + ".bias", outputs, 0))
    if c.latent.rank:
        norms = (
            {"query_norm": ("q_a_layernorm", c.latent.query_rank)} if c.latent.query_rank else {}
        )
        norms |= {"latent_norm": ("kv_a_layernorm", c.latent.rank)}
        for ours, (theirs, size) in norms.items():
            hf = "model.layers.{layer}.self_attn." + theirs + ".weight"
            table.append(Name((stack.name, "attention", ours, "scale"), hf, (size,), 0))
    if c.qk_norm:
        for ours, theirs, heads in (
            ("query_norm", "q_norm", head),
            ("key_norm", "k_norm", kv_head),
        ):
            shape = heads if c.qk_norm == "whole" else heads[1:]
            hf = "model.layers.{layer}.self_attn." + theirs + ".weight"
            table.append(Name((stack.name, "attention", ours, "scale"), hf, shape, 0))
    if c.sinks:
        hf = "model.layers.{layer}.self_attn.sinks"
        table.append(Name((stack.name, "attention", "sinks"), hf, (c.heads,), 0))
    for ours, theirs in NORMS[c.norms].items():
        hf = "model.layers.{layer}." + theirs + ".weight"
        table.append(Name((stack.name, ours, "scale"), hf, (c.width,), 0))
    return table


def _latent_linears(config: Config) -> list[tuple]:
    """Returns the rows of `_layer_names` of latent attention."""
    c, latent = config, config.latent
    width, heads = (c.width,), (c.heads, c.channels)
    both = (latent.rank + latent.rotated,)
    expanded = (c.heads, c.channels - latent.rotated + latent.values)
    down, part = (latent.query_rank,), "attention"
    if latent.query_rank:
        queries = [
            (part, "query_down", "self_attn.q_a_proj", width, down, c.qkv_bias),
            (part, "query_up", "self_attn.q_b_proj", down, heads, False),
        ]
    else:
        queries = [(part, "query", "self_attn.q_proj", width, heads, False)]
    values = (c.heads, latent.values)
    return [
        *queries,
        (part, "latent", "self_attn.kv_a_proj_with_mqa", width, both, c.qkv_bias),
        (part, "expand", "self_attn.kv_b_proj", (latent.rank,), expanded, False),
        (part, "output", "self_attn.o_proj", values, width, c.output_bias),
    ]


def _gated(part: str, theirs: str, width: int, ffn: int, bias: bool) -> list[tuple]:
    """Returns the rows of `_layer_names` of a gated feed-forward layer."""
    return [
        (part, "gate", theirs + "gate_proj", (width,), (ffn,), bias),
        (part, "up", theirs + "up_proj", (width,), (ffn,), bias),
        (part, "down", theirs + "down_proj", (ffn,), (width,), bias),
    ]


def _expert_names(config: Config, stack: Stack) -> list[Name]:
    """Returns the router's tensors and those of the experts, stored one by one (`weights.packed` reads fused ones)."""
    width, routing = config.width, config.routing
    E, F = routing.experts, routing.ffn
    path, stem = (stack.name, "mlp"), "model.layers.{layer}.mlp."
    theirs = "router" if routing.router_bias else "gate"
    table = [Name((*path, "router", "weight"), stem + theirs + ".weight", (width, E), 1)]
    if routing.router_bias:
        table.append(Name((*path, "router", "router_bias"), stem + theirs + ".bias", (E,), 0))
    if routing.corrected:
        hf = stem + "gate.e_score_correction_bias"
        table.append(Name((*path, "router", "correction"), hf, (E,), 0))
    shapes = {"gate": (E, width, F), "up": (E, width, F), "down": (E, F, width)}
    for ours, shape in shapes.items():
        hf, one = stem + "experts.{expert}." + ours + "_proj.", (*path, "experts_" + ours)
        table.append(Name((*one, "kernel"), hf + "weight", shape, 1))
        if routing.bias:
            table.append(Name((*one, "bias"), hf + "bias", (E, shape[-1]), 0))
    return table


def decoder_cache(config: Config, stack: Stack) -> tuple[CacheLeaf, ...]:
    """Returns what the cache holds of a token in a layer of grouped-query attention: rotated keys, and values."""
    shape, axes = (config.kv_heads, config.channels), ("kv_heads", "channels")
    return CacheLeaf("keys", shape, axes), CacheLeaf("values", shape, axes)
