"""Converts a Hugging Face config.json to a decoder config; each field is read, known as harmless, or refused."""

from __future__ import annotations

import os
from typing import Any

from rftjax.errors import UserError
from rftjax.models import FAMILIES
from rftjax.models.config import Config
from rftjax.models.families import kimi_k2, qwen2, qwen3, qwen3_moe
from rftjax.models.rope import rope_fields
from rftjax.weights import gguf, packed
from rftjax.weights.directories import config_file, locate, read_json

# Fields that never change what a decoder computes, whatever their value.
HARMLESS = {
    "architectures",
    "bos_token_id",
    "dtype",
    "dual_chunk_attention_config",  # of other engines, beyond the length that the model was trained on
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_sequence_length",
    "model_max_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefix",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
    "use_flash_attn",
    "use_return_dict",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_from_model_config",
    "_name_or_path",
}
# Settings of transformers' generate(), which older versions wrote into every config.json. rftjax samples by its own
# config only.
GENERATION = {
    "bad_words_ids",
    "cache_implementation",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
# Prefixes of fields that tools add and that do not describe the model.
MARKS = ("unsloth_", "transformers.js")
# Fields of every family with the values that are implemented.
EXACT = {
    "add_cross_attention": (False, None),
    "attn_pdrop": (0, None),
    "auto_map": (None,),
    "bias": (False, None),
    "chunk_size_feed_forward": (0, None),
    "compression_config": (None,),
    "cross_attention_hidden_size": (None,),
    "embd_pdrop": (0, None),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization": (None,),
    "resid_pdrop": (0, None),
    "rope_interleaved": (False, None),
    "tie_encoder_decoder": (False, None),
}
# Fields of a model that also sees which count for the text model in it, wherever they stand.
OF_BOTH = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    "quantization_config",
)
# The text model of a kind of model whose text_config does not name it, as in transformers.
TOWERS = {
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
# Text models under names of their own: the family, and what returns their fields as those of it.
SEEING = {
    "qwen2_vl_text": ("qwen2", qwen2.of_vision),
    "qwen2_5_vl_text": ("qwen2", qwen2.of_vision),
    "qwen3_vl_text": ("qwen3", qwen3.of_vision),
    "qwen3_vl_moe_text": ("qwen3_moe", qwen3_moe.of_vision),
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Numbers of any family, beside those that it has a default of; null stands for one in the next line only.
NUMBERS = {
    *("head_dim", "initializer_range", "max_position_embeddings", "num_key_value_heads"),
    *("rms_norm_eps", "rope_theta", "sliding_window", "max_window_layers"),
    *("no_rope_layer_interval", "sliding_window_pattern"),
}
OPTIONAL = {"head_dim", "num_key_value_heads", "q_lora_rank", "rope_theta", "sliding_window"}
POSITIVE = (
    *("decoder_sparse_step", "no_rope_layer_interval", "rms_norm_eps"),
    *("sliding_window", "sliding_window_pattern"),
)
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
UNQUANTISED = "use the unquantised checkpoint of this model"
WAY_OUT = {
    "compression_config": UNQUANTISED,
    "quantization": UNQUANTISED,
    "auto_map": "code that comes with a checkpoint is never run",
}


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the Hugging Face config of a directory, a config.json or a GGUF file as a dict."""
    found = locate(path)
    if found.suffix == ".gguf" and found.is_file():
        return gguf.hf_fields(gguf.read(found))
    file = config_file(found)
    fields = text_fields(read_json(file))
    if "model_type" not in fields and file.name != "config.json":
        raise UserError(
            f"model.path={file}: is no config.json (no model_type); give the directory of the model, {file.parent}"
        )
    return fields


def text_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model that also sees as those of the language model in it, others as they are."""
    inner = fields.get("text_config")
    # As published: no section of its own.
    if fields.get("model_type") in ("qwen2_vl", "qwen2_5_vl") and inner is None:
        inner = fields | {"model_type": TOWERS[fields["model_type"]]}
    if not isinstance(inner, dict):
        return fields
    outer = {name: fields[name] for name in OF_BOTH if fields.get(name) is not None}
    found = inner | outer
    kind = found.get("model_type") or TOWERS.get(fields.get("model_type", ""), "")
    if kind in SEEING:
        kind, as_family = SEEING[kind]
        found = as_family(found)
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type={fields.get('model_type')!r} with a text_config of model_type={kind!r} is not"
            f" implemented; rftjax knows text models of {', '.join(FAMILIES)}"
        )
    return found | {"model_type": kind, "architectures": [FAMILIES[kind].ARCHITECTURE]}


def read_config(fields: dict[str, Any], dtype: str = "float32") -> Config:
    """Returns the shape of the model; refuses every field whose effect is not implemented."""
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type={kind!r} is not implemented;"
            f" rftjax knows {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    fields = family.DEFAULTS | fields
    exact = EXACT | family.EXACT
    exact = {name: values for name, values in exact.items() if name not in family.READ}
    packed.block_of(fields)
    for name, value in fields.items():
        if name in exact and value not in exact[name]:
            way_out = WAY_OUT.get(name, f"only {' or '.join(map(repr, exact[name]))} is")
            raise UserError(f"config.json: {name}={value!r} is not implemented; {way_out}")
    known = set(exact) | {"quantization_config"} | HARMLESS | GENERATION | family.READ
    unknown = sorted(name for name in set(fields) - known if not name.startswith(MARKS))
    if unknown:
        named = ", ".join(f"{name}={fields[name]!r}" for name in unknown)
        raise UserError(
            f"config.json: rftjax does not know what {named} does to a {kind} model, so it refuses"
            " to guess; remove the field if it has no effect on what the model computes"
        )
    _check_types(fields, kind)
    config = family.config(fields, dtype)
    turning = config.latent.rotated or config.channels
    if turning % 2:
        name = "qk_rope_head_dim" if config.latent.rank else "head_dim"
        raise UserError(
            f"config.json: {name}={turning}: must be even, for the channels of a head turn in pairs; correct it there"
            " (hidden_size over num_attention_heads where it is absent)"
        )
    if config.heads % config.kv_heads:
        raise UserError(
            f"config.json: num_attention_heads={config.heads} is no multiple of"
            f" num_key_value_heads={config.kv_heads}"
        )
    return config


def _check_types(fields: dict[str, Any], kind: str) -> None:
    """Raises UserError for a missing size and for a field with a value of the wrong type."""
    for name in REQUIRED:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"config.json: {name}={value!r}; a {kind} model needs a positive integer"
            )
    defaults = FAMILIES[kind].DEFAULTS
    counted = {name for name, one in defaults.items() if type(one) in (int, float)}
    for name in sorted((NUMBERS | counted) & set(fields)):
        value = fields[name]
        if value is None and name in OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"config.json: {name}={value!r}: must be a number; correct it there")
        if name in POSITIVE and value <= 0:
            raise UserError(f"config.json: {name}={value}: must be above 0; correct it there")
    for name in SWITCHES:
        if not isinstance(fields.get(name), bool | None):
            raise UserError(f"config.json: {name}={fields[name]!r}: must be true or false")


def exported_fields(fields: dict[str, Any], config: Config, dtype: str) -> dict[str, Any]:
    """Returns the config of an export, for both transformers 4 (which reads `torch_dtype`) and 5 (`dtype`)."""
    kept = {name: value for name, value in fields.items() if name != "quantization_config"}
    if FAMILIES[config.family] is kimi_k2:
        # Which transformers has under this name only; the code that came with the model is not exported.
        kept = {name: value for name, value in kept.items() if name != "auto_map"}
        kept["model_type"] = "deepseek_v3"
    # What transformers 5 takes from other fields, and 4 from none.
    if config.routing.experts and not config.latent.rank:
        kept |= dict.fromkeys(("num_experts", "num_local_experts"), config.routing.experts)
    if not config.latent.rank and not kept.get("head_dim"):
        kept["head_dim"] = config.channels
    return kept | {"dtype": dtype, "torch_dtype": dtype} | rope_fields(fields, config)
