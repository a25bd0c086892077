"""Qwen2 (and Qwen2.5): Llama with biases on query, key and value, and windows in some layers."""

from __future__ import annotations

from typing import Any

from rftjax.models import reading
from rftjax.models.config import FULL, Config
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names

ARCHITECTURE = "Qwen2ForCausalLM"
READ = reading.SHARED | {
    "layer_types",
    "max_window_layers",
    "sliding_window",
    "use_sliding_window",
}
EXACT = reading.EXACT | {"use_mrope": (False, None)}
DEFAULTS: dict[str, Any] = {"max_position_embeddings": 32768}


def windows(fields: dict[str, Any]) -> tuple[int, ...]:
    """Returns one window a layer, by `layer_types` or else from layer `max_window_layers` on."""
    layers = fields["num_hidden_layers"]
    first = fields.get("max_window_layers", 28)
    default = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    kinds = reading.read_kinds(fields, default)
    if not fields.get("use_sliding_window", False):
        return (FULL,) * layers
    return reading.windows_of(kinds, fields.get("sliding_window", 4096))


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Qwen2 config that `hf.read_config` has checked."""
    return reading.read_shared("qwen2", fields, dtype, qkv_bias=True, windows=windows(fields))


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
