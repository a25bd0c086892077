"""DeepSeek V3 (and R1): latent attention, dense first layers, then experts chosen by sigmoid scores within groups."""

from __future__ import annotations

from typing import Any

from rftjax.errors import UserError
from rftjax.models import latent, reading
from rftjax.models.config import Config, Latent, Routing
from rftjax.models.names import DECODER_AXES, EXPERT_AXES, LATENT_AXES, decoder_names
from rftjax.models.rope import read_rope
from rftjax.models.rotary import magnitude

ARCHITECTURE = "DeepseekV3ForCausalLM"
READ = reading.SHARED | {
    "attention_bias",
    "auto_map",
    "first_k_dense_replace",
    "kv_lora_rank",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_local_experts",
    "q_lora_rank",
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rope_interleave",
    "routed_scaling_factor",
    "topk_group",
    "v_head_dim",
    # Layers that predict more tokens are left out; the rest is of training, or of other engines.
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "aux_loss_alpha",
    "ep_size",
    "output_router_logits",
    "seq_aux",
}
EXACT = reading.EXACT | {
    "moe_layer_freq": (1, None),
    "pretraining_tp": (1, None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
}
DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "v_head_dim": 128,
}


def config(fields: dict[str, Any], dtype: str) -> Config:
    """Reads a Hugging Face DeepSeek V3 config that `hf.read_config` has checked."""
    return read("deepseek_v3", fields, dtype)


def read(family: str, fields: dict[str, Any], dtype: str) -> Config:
    """Reads the config of a family of this architecture."""
    _check(fields)
    bias, heads = bool(fields.get("attention_bias", False)), fields["num_attention_heads"]
    rotated = fields["qk_rope_head_dim"]
    channels = fields["qk_nope_head_dim"] + rotated
    rope = read_rope(fields)
    # transformers' models of this architecture alone scale attention by it, twice.
    scale = magnitude(rope.factor, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
    ffn = fields["moe_intermediate_size"]
    routing = reading.check_routing(
        Routing(
            experts=reading.same(fields, "n_routed_experts", "num_local_experts", 256),
            chosen=fields["num_experts_per_tok"],
            ffn=ffn,
            shared=ffn * fields["n_shared_experts"],
            scoring="sigmoid",
            corrected=True,
            normalised=bool(fields["norm_topk_prob"]),
            scale=float(fields["routed_scaling_factor"]),
            groups=fields["n_group"],
            open_groups=fields["topk_group"],
        )
    )
    dense = fields["first_k_dense_replace"]
    return reading.read_shared(
        family,
        fields,
        dtype,
        rope=rope,
        kv_heads=heads,
        channels=channels,
        qkv_bias=bias,
        output_bias=bias,
        query_scale=channels**-0.5 * scale * scale,
        routing=routing,
        split=reading.split([at >= dense for at in range(fields["num_hidden_layers"])]),
        latent=Latent(
            rank=fields["kv_lora_rank"],
            query_rank=fields["q_lora_rank"] or 0,
            rotated=rotated,
            values=fields["v_head_dim"],
            interleaved=bool(fields["rope_interleave"]),
        ),
    )


def _check(fields: dict[str, Any]) -> None:
    """Raises UserError for fields that say something else than those that are read."""
    rotated, plain = fields["qk_rope_head_dim"], fields["qk_nope_head_dim"]
    implied = {
        "head_dim": rotated,
        "qk_head_dim": rotated + plain,
        "num_key_value_heads": fields["num_attention_heads"],
    }
    for name, value in implied.items():
        if fields.get(name) not in (None, value):
            raise UserError(
                f"config.json: {name}={fields[name]}: must be {value} in a model with latent attention of"
                f" num_attention_heads={fields['num_attention_heads']}, qk_nope_head_dim={plain} and"
                f" qk_rope_head_dim={rotated}; correct or remove it"
            )
    own = ("DeepseekV3Config", "DeepseekV3Model", "DeepseekV3ForCausalLM")
    code = fields.get("auto_map") or {}
    strange = [value for value in code.values() if str(value).rpartition(".")[2] not in own]
    if strange:
        raise UserError(
            f"config.json: auto_map={code!r} is not implemented; code that comes with a checkpoint is never run, and"
            f" {strange[0]} is none of {', '.join(own)}"
        )


names = decoder_names
LOGICAL_AXES = DECODER_AXES | EXPERT_AXES | LATENT_AXES
cache = latent.cache
