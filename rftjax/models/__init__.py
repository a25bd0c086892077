"""Model families by the `model_type` of their Hugging Face config."""

from rftjax.models.config import CacheLeaf, Config
from rftjax.models.families import llama, qwen2

FAMILIES = {"llama": llama, "qwen2": qwen2}


def logical_axes(config: Config) -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns what the model's family declares of its parameters' axes."""
    return FAMILIES[config.family].LOGICAL_AXES


def cache_leaves(config: Config) -> list[tuple[CacheLeaf, ...]]:
    """Returns what the model's family declares of its cache, for each layer."""
    cache = FAMILIES[config.family].cache
    return [leaves for stack in config.stacks for leaves in [cache(config, stack)] * stack.count]
