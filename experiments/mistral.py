"""Mistral 7B Instruct v0.3: LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes one H100 with 60 GiB;
all parameters take four H100s with 42 GiB on each.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    return job("mistral", "mistralai/Mistral-7B-Instruct-v0.3", arg)
