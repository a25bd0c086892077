"""gpt-oss 20B: LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes two H100s with 45 GiB on each;
all parameters take eight H100s with 52 GiB on each.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    config = job("gpt_oss", "openai/gpt-oss-20b", arg)
    if "debug" not in arg:
        config.chat.thinking = "low"  # answers within 1,024 tokens
        config.mesh.tensor = 2  # decoding has its weights whole on each device but for this axis
    if config.lora.rank:  # peft has no adapters of its fused experts
        config.lora.targets = "query,key,value,output"
    return config
