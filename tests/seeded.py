"""Tiny models of the families: configs whose settings differ from every default, and weights from a seed.

`scripts/reference/make_families.py` gives transformers the same ones, so that only its numbers are stored.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).parent / "data" / "families"

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 700.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "attention_bias": True,
    "final_logit_softcapping": 2.0,
    "tie_word_embeddings": False,
    "hidden_activation": "gelu",
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": SHAPE
    | {
        "model_type": "qwen3",
        "head_dim": 12,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "rope_parameters": YARN,
    },
    "mistral": SHAPE
    | {
        "model_type": "mistral",
        "head_dim": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "sliding_window": 6,
        "hidden_act": "relu",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
    },
    "ministral": SHAPE
    | {
        "model_type": "ministral",
        "head_dim": 10,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 200.0},
    },
    "smollm3": SHAPE
    | {
        "model_type": "smollm3",
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [1, 0, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 6,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3,
    },
    "olmo2": SHAPE
    | {
        "model_type": "olmo2",
        "attention_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
    "qwen3_moe": SHAPE
    | {
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "rope_parameters": YARN,
    },
    "deepseek_v3": SHAPE
    | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 14,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 9,
        "qk_rope_head_dim": 8,
        "v_head_dim": 7,
        "attention_bias": True,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    },
    "kimi_k2": SHAPE
    | {
        "model_type": "kimi_k2",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8,
        "v_head_dim": 9,
        "rope_interleave": False,
        "n_routed_experts": 7,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.1,
        "rope_theta": 50.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "gpt_oss": SHAPE
    | {
        "model_type": "gpt_oss",
        "head_dim": 12,
        "sliding_window": 5,
        "layer_types": [
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "swiglu_alpha": 1.3,
        "swiglu_limit": 0.8,
        "tie_word_embeddings": True,
        "rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    },
    "gemma3": SHAPE | GEMMA | {"sliding_window_pattern": 3},
}
# Text towers inside of models that also see.
VISION: dict[str, dict[str, Any]] = {
    "gemma3_seeing": {
        "model_type": "gemma3",
        "text_config": SHAPE
        | GEMMA
        | {"sliding_window_pattern": 3, "tie_word_embeddings": True, "final_logit_softcapping": None},
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 47,
        "tie_word_embeddings": True,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": SHAPE
        | {
            "model_type": "qwen3_vl_text", "head_dim": 12, "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 400.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2,
            "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
        },
        "image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": SHAPE
        | {
            "model_type": "qwen2_5_vl_text", "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 400.0, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2,
            "patch_size": 4, "out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 8,
        },
        "image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43,
        "tie_word_embeddings": False,
    },
    "mistral3": {
        "model_type": "mistral3",
        "text_config": CONFIGS["mistral"] | {"tie_word_embeddings": False},
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "head_dim": 4, "image_size": 8, "patch_size": 4,
        },
        "image_token_index": 40,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def tensors(shapes: dict[str, tuple[int, ...]], *, centred: bool) -> dict[str, np.ndarray]:
    """Returns float32 weights by name, each from a seed of its name; gains of norms are around 1, or 0 if `centred`."""
    made = {}
    for name, shape in shapes.items():
        noise = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        gain = "norm" in name and not centred
        made[name] = (noise + 1.0 if gain else noise).astype(np.float32)
    return made


def one_by_one(made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the weights with each expert's in tensors of its own, as checkpoints are published."""
    found = {}
    for name, whole in made.items():
        stem, _, part = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = whole
            continue
        for index, matrix in enumerate(whole):
            parts = {"down_proj": matrix}
            if part == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True))
            for single, one in parts.items():
                found[f"{stem}.{index}.{single}.weight"] = np.ascontiguousarray(one)
    return found


def tokens(name: str) -> np.ndarray:
    """Returns (2, 24) token ids, below those that stand for images."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(3, 40, (2, 24))


def checkpoint(folder: Path, name: str, renamed: Callable[[str], str] = str, **fields: Any) -> Path:
    """Writes the checkpoint of a name, as it was when transformers gave its numbers, with `fields` over its config."""
    stored = json.loads((DATA / f"{name}.json").read_text())
    shapes = {key: tuple(shape) for key, shape in stored.items()}
    made = tensors(shapes, centred="gemma3" in name)
    made = made if name == "gpt_oss" else one_by_one(made)  # it is published with fused experts
    folder.mkdir(parents=True)
    save_file({renamed(key): one for key, one in made.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps((CONFIGS | VISION)[name] | fields))
    return folder
