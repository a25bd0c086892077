"""Kimi K2 (1 trillion parameters): LoRA, or `:full` for all parameters; `:debug` runs here from random weights.

    rftjax --config=kimi_k2 --mode=plan --device=H200 [--compile]

needs no weights: shapes/kimi_k2 holds the published config.json. A run takes
`--config.model.path=moonshotai/Kimi-K2-Instruct`; docs/planning.md says what it needs.
"""

from frontier import spec
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    return spec("kimi_k2", arg)
