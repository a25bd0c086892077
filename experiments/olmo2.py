"""OLMo 2 7B Instruct: LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes four H100s with 49 GiB on each;
all parameters take four H100s with 66 GiB on each.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    return job("olmo2", "allenai/OLMo-2-1124-7B-Instruct", arg)
