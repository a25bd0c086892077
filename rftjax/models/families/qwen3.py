"""Qwen3 (dense): a norm on the queries and keys of each head, an own head width, windows as in Qwen2."""

from __future__ import annotations

from typing import Any

from rftjax.models import reading
from rftjax.models.config import Config
from rftjax.models.families import qwen2
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names

ARCHITECTURE = "Qwen3ForCausalLM"
READ = qwen2.READ | {"attention_bias"}
EXACT = reading.EXACT
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "head_dim": 128,
    "num_key_value_heads": 32,
}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Qwen3 config that `hf.read_config` has checked."""
    bias = bool(fields.get("attention_bias", False))
    return reading.read_shared(
        "qwen3",
        fields,
        dtype,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        windows=qwen2.windows(fields),
    )


def of_vision(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the text fields of a Qwen3-VL model as those of Qwen3."""
    defaults = {"max_position_embeddings": 128000, "head_dim": 128}
    return defaults | reading.without_image_positions(fields, 500000.0)


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
