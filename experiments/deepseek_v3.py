"""DeepSeek V3 (671 billion parameters): LoRA, or `:full` for all parameters; `:debug` runs here from random weights.

    rftjax --config=deepseek_v3 --mode=plan --device=H200 [--compile]

needs no weights: shapes/deepseek_v3 holds the published config.json. A run takes
`--config.model.path=deepseek-ai/DeepSeek-V3`; docs/planning.md says what it needs.
"""

from frontier import spec
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty, "full", "debug" or "full,debug"."""
    return spec("deepseek_v3", arg)
