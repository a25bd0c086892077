"""Ministral: Mistral whose `layer_types` say which layers have the sliding window."""

from __future__ import annotations

from typing import Any

from rftjax.models import reading
from rftjax.models.config import Config
from rftjax.models.families import mistral
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names

ARCHITECTURE = "MinistralForCausalLM"
READ = mistral.READ | {"layer_types"}
EXACT = mistral.EXACT
DEFAULTS = mistral.DEFAULTS


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Ministral config that `hf.read_config` has checked."""
    kinds = reading.read_kinds(fields, ["sliding_attention"] * fields["num_hidden_layers"])
    windows = reading.windows_of(kinds, fields["sliding_window"])
    return reading.read_shared("ministral", fields, dtype, windows=windows)


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
