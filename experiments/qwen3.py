"""Qwen3 8B: LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes one H100 with 67 GiB;
all parameters take four H100s with 47 GiB on each.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    config = job("qwen3", "Qwen/Qwen3-8B", arg)
    if "debug" not in arg:
        config.chat.thinking = "off"  # answers within 1,024 tokens; "on" needs longer ones
    return config
