"""Kimi K2: DeepSeek V3's architecture under its own config name, with more experts in one group and fewer heads."""

from __future__ import annotations

from typing import Any

from rftjax.models.config import Config
from rftjax.models.families import deepseek_v3

ARCHITECTURE = deepseek_v3.ARCHITECTURE
READ = deepseek_v3.READ
EXACT = deepseek_v3.EXACT
DEFAULTS = deepseek_v3.DEFAULTS


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Kimi K2 config that `hf.read_config` has checked."""
    return deepseek_v3.read("kimi_k2", fields, dtype)


names = deepseek_v3.names
LOGICAL_AXES = deepseek_v3.LOGICAL_AXES
cache = deepseek_v3.cache
