"""Gemma 3 4B (its text model): LoRA, or `:full` for all parameters; `:debug` runs anywhere from random weights.

By `--mode=plan --device=H100` it takes one H100 with 50 GiB;
all parameters take two H100s with 47 GiB on each.
"""

from families import job
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    return job("gemma3", "google/gemma-3-4b-it", arg)
