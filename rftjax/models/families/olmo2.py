"""OLMo 2: norms after attention and feed-forward layer, and one on all queries and all keys of a token."""

from __future__ import annotations

from typing import Any

from rftjax.models import reading
from rftjax.models.config import Config
from rftjax.models.names import DECODER_AXES, WHOLE_NORM_AXES, decoder_cache, decoder_names

ARCHITECTURE = "Olmo2ForCausalLM"
READ = reading.SHARED | {"attention_bias"}
EXACT = reading.EXACT | {"clip_qkv": (None,)}
DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face OLMo 2 config that `hf.read_config` has checked."""
    bias = bool(fields.get("attention_bias", False))
    return reading.read_shared(
        "olmo2",
        fields,
        dtype,
        qkv_bias=bias,
        output_bias=bias,
        norms="after",
        qk_norm="whole",
    )


names = decoder_names
LOGICAL_AXES = DECODER_AXES | WHOLE_NORM_AXES
cache = decoder_cache
