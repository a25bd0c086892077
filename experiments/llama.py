"""Llama 3.1 8B Instruct: LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes one H100 with 63 GiB;
all parameters take four H100s with 45 GiB on each.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    return job("llama", "meta-llama/Llama-3.1-8B-Instruct", arg)
