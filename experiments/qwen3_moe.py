"""Qwen3 30B-A3B: LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes four H100s with 35 GiB on each;
all parameters take sixteen H100s with 37 GiB on each.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    config = job("qwen3_moe", "Qwen/Qwen3-30B-A3B", arg)
    if "debug" not in arg:
        config.chat.thinking = "off"  # answers within 1,024 tokens; "on" needs longer ones
        config.mesh.tensor = 4  # decoding has its weights whole on each device but for this axis
    if config.lora.rank:  # adapters of all experts would lie whole on each device
        config.lora.targets = "query,key,value,output"
    return config
