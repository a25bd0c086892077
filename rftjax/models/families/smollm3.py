"""SmolLM3: Llama with layers that do not rotate queries and keys."""

from __future__ import annotations

from typing import Any

from rftjax.errors import UserError
from rftjax.models import reading
from rftjax.models.config import Config, Rope
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names
from rftjax.models.rope import read_rope

ARCHITECTURE = "SmolLM3ForCausalLM"
READ = reading.SHARED | {
    "attention_bias",
    "layer_types",
    "max_window_layers",  # without effect in transformers, as is pretraining_tp
    "mlp_bias",
    "no_rope_layer_interval",
    "no_rope_layers",
    "pretraining_tp",
    "sliding_window",
    "use_sliding_window",
}
EXACT = reading.EXACT
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
THETA = 2000000.0


def rotated(fields: dict[str, Any]) -> list[bool]:
    """Returns for each layer whether it rotates: `no_rope_layers` holds a 1 for those that do."""
    layers, given = fields["num_hidden_layers"], fields.get("no_rope_layers")
    if given is None:
        interval = fields.get("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(given) < layers or not all(one in (0, 1) for one in given):
        raise UserError(
            f"config.json: no_rope_layers={given}: must hold a 1 (rotates) or a 0 for each of the {layers} layers;"
            " correct it there"
        )
    return [bool(one) for one in given[:layers]]


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face SmolLM3 config that `hf.read_config` has checked."""
    rope, turns = read_rope(fields, THETA), rotated(fields)
    sliding, window = fields.get("use_sliding_window", False), fields.get("sliding_window")
    default = ["sliding_attention" if sliding and not one else "full_attention" for one in turns]
    bias = bool(fields.get("attention_bias", False))
    return reading.read_shared(
        "smollm3",
        fields,
        dtype,
        rope=rope,
        ropes=tuple(rope if one else Rope(kind="none") for one in turns),
        windows=reading.windows_of(reading.read_kinds(fields, default), window),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
