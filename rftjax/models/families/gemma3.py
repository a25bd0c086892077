"""Gemma 3 (text): sliding and full layers, each kind with its own rotary embedding; four norms a layer and more on
queries and keys, all of which multiply by one plus their gain; embeddings scaled by the root of the width."""

from __future__ import annotations

import math
from typing import Any

from rftjax.errors import UserError
from rftjax.models import reading
from rftjax.models.config import Config, Rope
from rftjax.models.names import DECODER_AXES, decoder_cache, decoder_names
from rftjax.models.rope import read_rope

ARCHITECTURE = "Gemma3ForCausalLM"
READ = (reading.SHARED - {"hidden_act"}) | {
    "_sliding_window_pattern",  # of an export of transformers, which has layer_types too
    "attention_bias",
    # A cap of attention scores has no effect on Gemma 3 in transformers, and its checkpoints have none.
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "layer_types",
    "query_pre_attn_scalar",
    "rope_local_base_freq",
    "sliding_window",
    "sliding_window_pattern",
}
EXACT = reading.EXACT | {"use_bidirectional_attention": (False, None)}
# Published text configs leave out what has the default of transformers.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
FULL_THETA, SLIDING_THETA = 1000000.0, 10000.0


def read_ropes(fields: dict[str, Any]) -> dict[str, Rope]:
    """Returns the rotary embedding of each kind of layer, of old fields and of new ones (one section a kind)."""
    both = fields.get("rope_parameters") or {}
    if both and not set(reading.KINDS) & set(both):
        raise UserError(
            f"config.json: rope_parameters={both}: must have a section for each of {', '.join(reading.KINDS)}; write"
            " one, or rope_theta, rope_scaling (both of full attention) and rope_local_base_freq instead"
        )
    positions = {"max_position_embeddings": fields.get("max_position_embeddings")}
    full = {name: fields.get(name) for name in ("rope_theta", "rope_scaling")}
    full |= positions | {"rope_parameters": both.get("full_attention")}
    sliding = positions | {
        "rope_theta": fields.get("rope_local_base_freq"),
        "rope_parameters": both.get("sliding_attention"),
    }
    return {
        "full_attention": read_rope(full, FULL_THETA),
        "sliding_attention": read_rope(sliding, SLIDING_THETA),
    }


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Gemma 3 text config that `hf.read_config` has checked."""
    pattern, layers = fields.get("sliding_window_pattern", 6), fields["num_hidden_layers"]
    kinds = reading.read_kinds(
        fields, [reading.KINDS[bool((layer + 1) % pattern)] for layer in range(layers)]
    )
    ropes = read_ropes(fields)
    bias = bool(fields.get("attention_bias", False))
    return reading.read_shared(
        "gemma3_text",
        fields,
        dtype,
        rope=ropes["full_attention"],
        ropes=tuple(ropes[kind] for kind in kinds),
        windows=reading.windows_of(kinds, fields["sliding_window"]),
        qkv_bias=bias,
        output_bias=bias,
        norms="both",
        norm_offset=1.0,
        qk_norm="head",
        query_scale=fields["query_pre_attn_scalar"] ** -0.5,
        activation=reading.read_activation("hidden_activation", fields["hidden_activation"]),
        embed_scale=math.sqrt(fields["hidden_size"]),
        logit_cap=float(fields.get("final_logit_softcapping") or 0.0),
    )


names = decoder_names
LOGICAL_AXES = DECODER_AXES
cache = decoder_cache
