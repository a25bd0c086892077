"""SmolLM3 3B: LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes one H100 with 30 GiB;
all parameters take one H100 with 61 GiB.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    config = job("smollm3", "HuggingFaceTB/SmolLM3-3B", arg)
    if "debug" not in arg:
        config.chat.thinking = "off"  # answers within 1,024 tokens; "on" needs longer ones
    return config
