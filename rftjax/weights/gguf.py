"""Reads GGUF files: metadata as a Hugging Face config, tensors dequantised under Hugging Face names."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rftjax.errors import UserError
from rftjax.models import FAMILIES
from rftjax.weights.directories import check_content, check_split

# Metadata keys (after `ARCHITECTURE.`) and the config field of each.
FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
GEMMA_FIELDS = {
    "attention.sliding_window": "sliding_window",
    "final_logit_softcapping": "final_logit_softcapping",
}
MOE_FIELDS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Keys that are read separately, or do not affect what the model computes.
OTHERS = {
    "attention.value_length",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
NEEDED = ("block_count", "feed_forward_length", "embedding_length", "attention.head_count")
# Architectures, each with its `model_type`.
ARCHITECTURES = {
    "gemma3": "gemma3_text",
    "llama": "llama",
    "olmo2": "olmo2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "smollm3": "smollm3",
}
INTERLEAVED = ("llama", "smollm3")  # whose rotary channels lie in pairs
GEMMA_27B = 62  # layers; the one Gemma 3 whose attention scores are not scaled by the head's width
# GGUF stores Llama 3's rotary scaling as a table of factors, computed from these settings.
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_SETTINGS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

BLOCKS = 512  # of a quantised tensor in one row for dequantisation

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# Norms of a layer where these differ.
OWN_TENSORS = {
    "gemma3_text": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "olmo2": {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "qwen3_moe": {"mlp.gate": "ffn_gate_inp"},
}
# All experts of a layer in one tensor.
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


@dataclasses.dataclass(frozen=True)
class File:
    """An open GGUF file: `metadata(key)` returns a value or None, each reader in `tensors` a float32 array."""

    path: Path
    keys: tuple[str, ...]
    metadata: Callable[[str], Any]
    tensors: dict[str, Callable[[], np.ndarray]]


def read(path: str | os.PathLike[str]) -> File:
    """Opens a GGUF file; raises UserError for a truncated file or another kind of file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model.path={path}: no such file")
    check_content(path)
    check_split(path)
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


def _in_long_rows(entry: Any) -> np.ndarray:
    """Returns a tensor's bytes in rows of up to BLOCKS blocks; the gguf package dequantises 16 rows at a time."""
    import gguf

    values, type_bytes = gguf.GGML_QUANT_SIZES[entry.tensor_type]
    if values == 1:  # not quantised
        return entry.data
    return entry.data.reshape(-1, type_bytes * math.gcd(entry.data.size // type_bytes, BLOCKS))


@functools.lru_cache(maxsize=1)
def _read(path: Path, modified_ns: int, size_bytes: int) -> File:
    # Parsing takes seconds, and weights and tokenizer each need it: cache the last file.
    del modified_ns
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"model.path={path}: GGUF files need the gguf package: pip install 'rftjax[gguf]'"
        ) from error

    class Reader(gguf.GGUFReader):
        """Reads through an ndarray view of the mapped file, whose slices take a third of the time of a memmap's."""

        @property
        def data(self) -> np.ndarray:
            return self._view

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._view = np.asarray(mapped)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """Reads a list, such as a vocabulary, in a tenth of the time of the base class."""
            view, at = self._view, orig_offs + 12
            if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            number, count = struct.unpack_from("=IQ", view.data, orig_offs)
            kind = gguf.GGUFValueType(number)
            parts = [view[orig_offs : orig_offs + 4], view[orig_offs + 4 : at]]
            scalar = self.gguf_scalar_to_np.get(kind)
            if scalar:
                end = at + count * np.dtype(scalar).itemsize
                parts.append(view[at:end].view(scalar))
                at = end
            elif kind == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    text = at + 8
                    end = text + struct.unpack_from("=Q", view.data, at)[0]
                    parts += [view[at:text], view[text:end]]
                    at = end
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            first, step = (2, 1) if scalar else (3, 2)
            texts_or_numbers = list(range(first, len(parts), step))
            return at - orig_offs, parts, texts_or_numbers, [gguf.GGUFValueType.ARRAY, kind]

    try:
        reader = Reader(path)
    except Exception as error:  # on a damaged file the reader raises any exception of NumPy
        raise UserError(
            f"model.path={path}: not a whole GGUF file of {size_bytes} bytes ({error});"
            " download it again"
        ) from error

    def metadata(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    def tensor(entry: Any) -> np.ndarray:
        if not math.prod(entry.shape) or entry.data_offset + entry.n_bytes > size_bytes:
            raise UserError(f"model.path={path}: tensor {entry.name} ends beyond the file's end")
        try:
            values = gguf.quants.dequantize(_in_long_rows(entry), entry.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"model.path={path}: tensor {entry.name} is quantised as {entry.tensor_type.name},"
                " which the gguf package cannot dequantise; use another quantisation of this model"
            ) from error
        return np.asarray(values, np.float32).reshape(tuple(int(n) for n in reversed(entry.shape)))

    tensors = {entry.name: functools.partial(tensor, entry) for entry in reader.tensors}
    return File(path, tuple(reader.fields), metadata, tensors)


def hf_fields(file: File) -> dict[str, Any]:
    """Returns the equivalent Hugging Face config; raises UserError for what is not implemented."""
    arch = file.metadata("general.architecture")
    kind = file.metadata("general.type") or "model"
    if kind == "adapter" or file.metadata("adapter.type"):
        raise UserError(
            f"model.path={file.path}: is a LoRA adapter and no model; give its base as model.path, and as lora.path"
            " the directory (adapter_config.json) that peft wrote before the adapter was made a GGUF file"
        )
    if kind != "model":
        raise UserError(f"model.path={file.path}: holds a {kind} and no language model")
    parts = file.metadata("split.count") or 1
    if parts > 1:
        raise UserError(
            f"model.path={file.path}: is one of {parts} parts of a model, rftjax reads whole files; join them with"
            " llama.cpp: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if arch not in ARCHITECTURES:
        raise UserError(
            f"model.path={file.path}: architecture {arch!r} is not implemented;"
            f" rftjax reads {', '.join(ARCHITECTURES)} from GGUF"
        )
    own = {key.removeprefix(f"{arch}."): key for key in file.keys if key.startswith(f"{arch}.")}
    known = FIELDS | {"gemma3": GEMMA_FIELDS, "qwen3moe": MOE_FIELDS}.get(arch, {})
    unknown = sorted(set(own) - set(known) - OTHERS)
    if unknown:
        raise UserError(f"model.path={file.path}: {arch} metadata {unknown} is not implemented")
    kind = ARCHITECTURES[arch]
    fields: dict[str, Any] = {"architectures": [FAMILIES[kind].ARCHITECTURE]}
    fields |= {"model_type": kind, "torch_dtype": "float32"}
    fields |= {} if arch == "gemma3" else {"hidden_act": "silu"}
    for theirs, ours in known.items():
        if theirs in own:
            fields[ours] = _short(file.metadata(own[theirs]))
            if isinstance(fields[ours], list):
                raise UserError(f"model.path={file.path}: {own[theirs]} differs between layers")
    tokens = len(file.metadata("tokenizer.ggml.tokens") or ())
    fields.setdefault("vocab_size", tokens)
    lacking = [f"{arch}.{key}" for key in NEEDED if FIELDS[key] not in fields]
    lacking += [] if fields["vocab_size"] else ["tokenizer.ggml.tokens"]
    if lacking:
        raise UserError(
            f"model.path={file.path}: has no {', '.join(lacking)}; make the file again with llama.cpp's"
            " convert_hf_to_gguf.py, or give the model's Hugging Face directory"
        )
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    channels = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    fields["head_dim"] = channels
    fields |= _own_fields(arch, file, fields)
    for key in ("rope.dimension_count", "attention.value_length"):
        found = file.metadata(own[key]) if key in own else channels
        if found != channels:
            raise UserError(
                f"model.path={file.path}: {own[key]}={found} is not implemented, only the head's"
                f" {channels} channels"
            )
    scaling = _rope_scaling(file, own, fields, channels)
    if scaling:
        fields["rope_scaling"] = scaling
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{ours}_token_id"] = file.metadata(f"tokenizer.ggml.{theirs}_token_id")
    return fields


def _own_fields(arch: str, file: File, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns what the file's tensors and sizes say about an architecture's settings."""
    found: dict[str, Any] = {}
    if arch != "qwen2":
        found["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch in INTERLEAVED:
        found["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if arch == "qwen3moe":
        routers = [f"blk.{at}.ffn_gate_inp.weight" for at in range(fields["num_hidden_layers"])]
        found["mlp_only_layers"] = [
            at for at, name in enumerate(routers) if name not in file.tensors
        ]
        found["norm_topk_prob"] = True  # as llama.cpp computes it
    if arch == "gemma3":
        width = fields["hidden_size"] // fields["num_attention_heads"]
        large = fields["num_hidden_layers"] == GEMMA_27B
        found["query_pre_attn_scalar"] = width if large else fields["head_dim"]
    return found


def _short(value: Any) -> Any:
    # Floats are stored as float32: take the shortest decimal that rounds to the same float32.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(
    file: File, own: dict[str, str], fields: dict[str, Any], channels: int
) -> dict[str, Any]:
    kind = file.metadata(own["rope.scaling.type"]) if "rope.scaling.type" in own else "none"
    factor = file.metadata(own["rope.scaling.factor"]) if "rope.scaling.factor" in own else 1.0
    if "rope.scale_linear" in own and kind == "none":
        kind, factor = "linear", file.metadata(own["rope.scale_linear"])
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, fields, channels)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": _short(factor)}
    if kind == "yarn" and "rope.scaling.original_context_length" in own:
        original = file.metadata(own["rope.scaling.original_context_length"])
        return {
            "rope_type": "yarn",
            "factor": _short(factor),
            "original_max_position_embeddings": original,
        }
    raise UserError(f"model.path={file.path}: rope scaling {kind!r} is not implemented")


def _llama3_scaling(file: File, fields: dict[str, Any], channels: int) -> dict[str, Any]:
    table = file.tensors["rope_freqs.weight"]()
    if np.all(table == 1.0):
        return {}
    theta = fields.get("rope_theta", 10000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, channels, 2) / channels)
    low, high = LLAMA3_SETTINGS["low_freq_factor"], LLAMA3_SETTINGS["high_freq_factor"]
    turns = LLAMA3_SETTINGS["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    for factor in LLAMA3_FACTORS:
        expected = 1.0 / ((1 - smooth) / factor + smooth)
        if table.shape == expected.shape and np.allclose(table, expected, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3_SETTINGS}
    raise UserError(
        f"model.path={file.path}: the factors in rope_freqs.weight are not those of Llama 3.1 or"
        " 3.2; use the model's Hugging Face directory"
    )


def tensors(file: File, fields: dict[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns readers by Hugging Face name, in Hugging Face's layout."""
    theirs = {gguf_name: name for name, gguf_name in TENSORS.items()}
    heads = {
        "attn_q": fields["num_attention_heads"],
        "attn_k": fields.get("num_key_value_heads") or fields["num_attention_heads"],
    }
    theirs |= {stem: name for name, stem in OWN_TENSORS.get(fields["model_type"], {}).items()}
    found: dict[str, Callable[[], np.ndarray]] = {}
    for name, reader in file.tensors.items():
        stem, _, kind = name.rpartition(".")
        layer = ""
        if stem.startswith("blk."):
            _, index, stem = stem.split(".", 2)
            layer = f"model.layers.{index}."
        if name == "rope_freqs.weight":
            continue  # read as a setting
        if fields["model_type"] == "gemma3_text" and stem.endswith("norm"):
            reader = functools.partial(_centred, reader)
        if fields["model_type"] in INTERLEAVED and stem in heads:
            reader = functools.partial(_unpermuted, reader, heads[stem])
        if stem in EXPERTS and fields.get("num_experts"):
            for at in range(fields["num_experts"]):
                name = f"{layer}mlp.experts.{at}.{EXPERTS[stem]}.{kind}"
                found[name] = functools.partial(_expert, reader, at)
            continue
        # Unknown tensors keep their GGUF name, with which the loader then refuses them.
        found[f"{layer}{theirs[stem]}.{kind}" if stem in theirs else name] = reader
    return found


@functools.lru_cache(maxsize=1)
def _experts(reader: Callable[[], np.ndarray]) -> np.ndarray:
    return reader()


def _expert(reader: Callable[[], np.ndarray], at: int) -> np.ndarray:
    # Experts are read one behind the other: all of a tensor are dequantised at once.
    experts = _experts(reader)
    if at == experts.shape[0] - 1:
        _experts.cache_clear()
    return experts[at]


def _centred(reader: Callable[[], np.ndarray]) -> np.ndarray:
    # GGUF files of Gemma hold one plus the gain.
    return reader() - np.float32(1.0)


def _unpermuted(reader: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    # GGUF files of INTERLEAVED families interleave the two halves of each head's rotary channels.
    rows = reader()
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
