"""Mistral: Llama without biases whose layers all have one sliding window, or none."""

from __future__ import annotations

from typing import Any

from rftjax.models import reading
from rftjax.models.config import Config
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names

ARCHITECTURE = "MistralForCausalLM"
READ = reading.SHARED | {"sliding_window"}
EXACT = reading.EXACT | {"attention_bias": (False, None), "mlp_bias": (False, None)}
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Mistral config that `hf.read_config` has checked."""
    kinds = ["sliding_attention"] * fields["num_hidden_layers"]
    windows = reading.windows_of(kinds, fields["sliding_window"])
    return reading.read_shared("mistral", fields, dtype, windows=windows)


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
