"""Qwen3 MoE: Qwen3 with experts in its layers, in all of them or in every so many."""

from __future__ import annotations

from typing import Any

from rftjax.models import reading
from rftjax.models.config import FULL, Config, Routing
from rftjax.models.names import DECODER_AXES, EXPERT_AXES, decoder_cache, decoder_names

ARCHITECTURE = "Qwen3MoeForCausalLM"
READ = reading.SHARED | {
    "attention_bias",
    "decoder_sparse_step",
    "max_window_layers",  # of Qwen2: Qwen3 MoE has the window in each layer or in none
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",  # of transformers' loss only, as the next one
    "router_aux_loss_coef",
    "sliding_window",
    "use_sliding_window",
}
EXACT = reading.EXACT
DEFAULTS: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face Qwen3 MoE config that `hf.read_config` has checked."""
    bias, layers = bool(fields.get("attention_bias", False)), fields["num_hidden_layers"]
    count = reading.same(fields, "num_experts", "num_local_experts", 128)
    routing = Routing(
        experts=count,
        chosen=fields["num_experts_per_tok"],
        ffn=fields["moe_intermediate_size"],
        normalised=bool(fields["norm_topk_prob"]),
    )
    step, dense = fields["decoder_sparse_step"], fields["mlp_only_layers"] or []
    sparse = [count > 0 and at not in dense and (at + 1) % step == 0 for at in range(layers)]
    limit = fields.get("sliding_window", 4096) if fields.get("use_sliding_window") else None
    return reading.read_shared(
        "qwen3_moe",
        fields,
        dtype,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        windows=(FULL if limit is None else limit,) * layers,
        routing=reading.check_routing(routing) if count else Routing(),
        split=reading.split(sparse),
    )


def of_vision(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the text fields of a Qwen3-VL MoE model as those of Qwen3 MoE; its experts' weights always sum to 1."""
    defaults = {
        "max_position_embeddings": 128000,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
    }
    if fields.get("num_local_experts") is not None:
        del defaults["num_experts"]
    rest = reading.without_image_positions(fields, 500000.0)
    return defaults | rest | {"norm_topk_prob": True}


names = decoder_names
LOGICAL_AXES = DECODER_AXES | EXPERT_AXES
cache = decoder_cache
