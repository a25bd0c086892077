"""gpt-oss: windows in turn, heads with sinks, biases everywhere, and experts behind a clipped gate in every layer."""

from __future__ import annotations

from typing import Any

from rftjax.errors import UserError
from rftjax.models import reading
from rftjax.models.config import Config, Routing
from rftjax.models.names import DECODER_AXES, EXPERT_AXES, decoder_cache, decoder_names
from rftjax.models.rope import read_rope

ARCHITECTURE = "GptOssForCausalLM"
READ = (reading.SHARED - {"hidden_act"}) | {
    "attention_bias",
    "experts_per_token",
    "initial_context_length",  # which yarn's settings say too
    "layer_types",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",  # of transformers' loss only, as the next one
    "router_aux_loss_coef",
    "sliding_window",
    "swiglu_alpha",
    "swiglu_limit",
}
# Its gate is no activation of `layers.ACTIVATIONS`, and transformers reads no other one for it.
EXACT = reading.EXACT | {"hidden_act": ("silu", None)}
DEFAULTS: dict[str, Any] = {
    "attention_bias": True,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
THETA = 150000.0
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face gpt-oss config that `hf.read_config` has checked."""
    layers, limit = fields["num_hidden_layers"], float(fields["swiglu_limit"])
    if limit <= 0:
        raise UserError(f"config.json: swiglu_limit={limit}: must be above 0; correct it there")
    chosen, other = fields["num_experts_per_tok"], fields.get("experts_per_token")
    if other not in (None, chosen):
        raise UserError(
            f"config.json: num_experts_per_tok={chosen} and experts_per_token={other} contradict each other;"
            " transformers reads the first alone, as 4 where it is absent: give the number under both names"
        )
    kinds = reading.read_kinds(fields, [reading.KINDS[(at + 1) % 2] for at in range(layers)])
    bias = bool(fields["attention_bias"])
    scaled = fields.get("rope_parameters") or fields.get("rope_scaling")
    routing = Routing(
        experts=reading.same(fields, "num_local_experts", "num_experts", 128),
        chosen=chosen,
        ffn=fields["intermediate_size"],
        # Softmax over the chosen experts' logits is that over all, made to sum to 1.
        normalised=True,
        router_bias=True,
        bias=True,
        interleaved=True,
    )
    return reading.read_shared(
        "gpt_oss",
        fields,
        dtype,
        rope=read_rope(fields if scaled else fields | {"rope_scaling": YARN}, THETA),
        windows=reading.windows_of(kinds, fields["sliding_window"]),
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        gate_limit=limit,
        gate_gain=float(fields["swiglu_alpha"]),
        routing=reading.check_routing(routing),
        split=reading.split([True] * layers),
    )


names = decoder_names
LOGICAL_AXES = DECODER_AXES | EXPERT_AXES
cache = decoder_cache
