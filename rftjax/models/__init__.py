"""Model families by the `model_type` of their Hugging Face config."""

from rftjax.models.config import CacheLeaf, Config
from rftjax.models.families import (
    deepseek_v3,
    gemma3,
    gpt_oss,
    kimi_k2,
    llama,
    ministral,
    mistral,
    olmo2,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)

FAMILIES = {
    "deepseek_v3": deepseek_v3,
    "gemma3_text": gemma3,
    "gpt_oss": gpt_oss,
    "kimi_k2": kimi_k2,
    "llama": llama,
    "ministral": ministral,
    "mistral": mistral,
    "olmo2": olmo2,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}

CHOSEN = "chosen"  # the leaf of a layer's cache with the experts of each token, (rows, S, U)


def logical_axes(config: Config) -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns what the model's family declares of its parameters' axes."""
    return FAMILIES[config.family].LOGICAL_AXES


def cache_leaves(config: Config) -> list[tuple[CacheLeaf, ...]]:
    """Returns what the model's family declares of its cache, for each layer, and the experts of a token where they are
    recorded."""
    cache, routing = FAMILIES[config.family].cache, config.routing
    experts = (CacheLeaf(CHOSEN, (routing.chosen,), ("routes",), routing.dtype),)
    found = []
    for stack in config.stacks:
        own = cache(config, stack) + (experts if stack.sparse and routing.recorded else ())
        found += [own] * stack.count
    return found
