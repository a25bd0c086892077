"""Qwen2 (and Qwen2.5): Llama with biases on query, key and value, and windows in some layers."""

from __future__ import annotations

from typing import Any

from rftjax.models.config import FULL, Config
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names
from rftjax.models.rope import read_rope

# Fields that `config`, `windows` and `read_rope` read.
READ = {
    "head_dim",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
}
EXACT = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "use_mrope": (False, None),
}


def windows(fields: dict[str, Any]) -> tuple[int, ...]:
    """Returns one window a layer, by `layer_types` or else from layer `max_window_layers` on."""
    layers = fields["num_hidden_layers"]
    window = fields.get("sliding_window", 4096)
    if not fields.get("use_sliding_window", False) or window is None:
        return (FULL,) * layers
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else FULL for kind in kinds)


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Qwen2 config that `hf.read_config` has checked."""
    heads = fields["num_attention_heads"]
    return Config(
        family="qwen2",
        vocab=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        channels=fields.get("head_dim") or fields["hidden_size"] // heads,
        ffn=fields["intermediate_size"],
        max_positions=fields.get("max_position_embeddings", 32768),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope=read_rope(fields),
        tied=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=True,
        windows=windows(fields),
        init_std=fields.get("initializer_range", 0.02),
        dtype=dtype,
    )


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
