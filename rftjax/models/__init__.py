"""Model families by the `model_type` of their Hugging Face config."""

from rftjax.models.decoder import Config
from rftjax.models.families import llama, qwen2

FAMILIES = {"llama": llama, "qwen2": qwen2}


def logical_axes(config: Config) -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns what the model's family declares of its parameters' axes."""
    return FAMILIES[config.family].LOGICAL_AXES
