"""Llama: its Hugging Face config in terms of the shared decoder, and the names of its weights."""

from __future__ import annotations

from typing import Any

from rftjax.models import reading
from rftjax.models.config import Config
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names

ARCHITECTURE = "LlamaForCausalLM"
READ = reading.SHARED | {"attention_bias", "mlp_bias"}
EXACT = reading.EXACT | {"pretraining_tp": (1, None), "sliding_window": (None,)}
DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Llama config that `hf.read_config` has checked."""
    bias = bool(fields.get("attention_bias", False))
    return reading.read_shared(
        "llama",
        fields,
        dtype,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
