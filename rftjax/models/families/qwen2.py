"""Qwen2 (and Qwen2.5): Llama with biases on query, key and value, and windows in some layers."""

from __future__ import annotations

from typing import Any

from rftjax.errors import UserError
from rftjax.models import reading
from rftjax.models.config import FULL, Config
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names

ARCHITECTURE = "Qwen2ForCausalLM"
READ = reading.SHARED | {
    "layer_types",
    "max_window_layers",
    "sliding_window",
    "use_sliding_window",
}
EXACT = reading.EXACT | {"use_mrope": (False, None)}
DEFAULTS: dict[str, Any] = {"max_position_embeddings": 32768, "num_key_value_heads": 32}


def windows(fields: dict[str, Any]) -> tuple[int, ...]:
    """Returns one window a layer, by `layer_types` or else from layer `max_window_layers` on."""
    layers = fields["num_hidden_layers"]
    first = fields.get("max_window_layers", 28)
    default = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    kinds = reading.read_kinds(fields, default)
    if not fields.get("use_sliding_window", False):
        if "sliding_attention" in (fields.get("layer_types") or ()):
            raise UserError(
                f"config.json: layer_types={kinds} with use_sliding_window=False: no layer can have a window then;"
                " correct one of them"
            )
        return (FULL,) * layers
    return reading.windows_of(kinds, fields.get("sliding_window", 4096))


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Qwen2 config that `hf.read_config` has checked."""
    return reading.read_shared("qwen2", fields, dtype, qkv_bias=True, windows=windows(fields))


def of_vision(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the text fields of a Qwen2-VL or Qwen2.5-VL model as those of Qwen2; older ones have those of images
    among them."""
    of_images = (
        "vision_config",
        *(name for name in fields if name.startswith(("image_", "video_", "vision_"))),
    )
    rest = {name: one for name, one in fields.items() if name not in of_images}
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80}
    return defaults | reading.without_image_positions(rest, 1000000.0)


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
