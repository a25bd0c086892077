"""Model families by the `model_type` of their Hugging Face config."""

from rftjax.models.families import llama, qwen2

FAMILIES = {"llama": llama, "qwen2": qwen2}
