"""Llama: its Hugging Face config in terms of the shared decoder, and the names of its weights."""

from __future__ import annotations

from typing import Any

from rftjax.models.config import FULL, Config
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names
from rftjax.models.rope import read_rope

# Fields that `config` and `read_rope` read.
READ = {
    "attention_bias",
    "head_dim",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}
# Fields that change what the model computes, each with the values under which this port is exact.
EXACT = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "sliding_window": (None,),
}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Llama config that `hf.read_config` has checked."""
    heads = fields["num_attention_heads"]
    bias = bool(fields.get("attention_bias", False))
    return Config(
        family="llama",
        vocab=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        channels=fields.get("head_dim") or fields["hidden_size"] // heads,
        ffn=fields["intermediate_size"],
        max_positions=fields.get("max_position_embeddings", 2048),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope=read_rope(fields),
        tied=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        windows=(FULL,) * fields["num_hidden_layers"],
        init_std=fields.get("initializer_range", 0.02),
        dtype=dtype,
    )


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
