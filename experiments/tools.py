"""A job with a tool: SmolLM2-135M-Instruct learns to call a function for what it needs before it answers.

`:debug` is the same job in a few seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict
from multi_turn import get_config as multi_turn

HERE = Path(__file__).absolute().parent


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty or "debug"."""
    config = multi_turn(arg)
    config.steps = min(config.steps, 4)
    config.environment = f"{HERE}/directory_tools.py:environment"
    config.tasks.train = config.tasks.heldout = f"{HERE}/directory_tools.py:rows"
    config.batch.pack_tokens = 512
    config.sampler.max_new_tokens = 32  # a call has 26 tokens and its end
    config.rollout.max_length = 384
    return config
