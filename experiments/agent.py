"""The multi-turn job with an agent that calls the model itself, over HTTP: SmolLM2-135M-Instruct learns to look up.

It needs the extra `agents`. `:debug` is the same job in a few seconds.
"""

from pathlib import Path

from ml_collections import ConfigDict
from multi_turn import get_config as multi_turn

HERE = Path(__file__).absolute().parent


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty or "debug"."""
    config = multi_turn(arg)
    config.environment = ""
    config.agent = f"{HERE}/directory_agent.py:run"
    return config
