"""Hugging Face directories in and out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rftjax.errors import UserError
from rftjax.text import tokenizer
from rftjax.weights import hf

DATA = Path(__file__).parent / "data"
REFERENCE = DATA / "reference"
TINY = [REFERENCE / name for name in ("llama_llama3", "llama_linear", "qwen2_window")]

SMOLLM2 = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
"is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
"model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
"num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
"rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
"tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "use_cache": true,
"vocab_size": 49152}"""
LLAMA32 = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
"head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
"intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling":
{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
"original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
"tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
"use_cache": true, "vocab_size": 128256}"""
QWEN25 = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
"bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
"initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
"max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
"torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": true,
"use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(TINY[0], tmp_path / "copy"))


def edit(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def assert_equal_trees(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("text", [SMOLLM2, LLAMA32, QWEN25])
def test_real_configs_are_read(text: str):
    fields = json.loads(text)
    config = hf.read_config(fields, "bfloat16")
    assert (config.width, config.layers) == (fields["hidden_size"], fields["num_hidden_layers"])
    assert config.rope.theta == fields["rope_theta"]
    assert config.tied
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_length", 4096),
        ("min_length", 0),
        ("do_sample", True),
        ("temperature", 0.6),
        ("top_p", 0.9),
        ("num_beams", 1),
        ("repetition_penalty", 1.1),
        ("bad_words_ids", [[3]]),
        ("suppress_tokens", [1]),
        ("use_bfloat16", False),
        ("max_sequence_length", 2048),
        ("unsloth_fixed", True),
        ("unsloth_something_new", 1),
        ("_attn_implementation", "sdpa"),
        ("dual_chunk_attention_config", {"chunk_size": 262144, "local_size": 8192}),
        ("resid_pdrop", 0.0),
    ],
)
def test_a_field_of_real_configs_without_effect_on_the_logits_is_accepted(field: str, value: Any):
    fields = json.loads(SMOLLM2)
    assert hf.read_config(fields | {field: value}) == hf.read_config(fields)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 100000.0}},
        {"rope_scaling": LINEAR | {"type": "linear"}, "rope_parameters": LINEAR},
        {"rope_theta": 100000, "rope_scaling": LINEAR},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": LINEAR | {"rope_theta": 1e5}},
    ],
)
def test_old_and_new_rope_fields_that_agree_are_read(fields: dict[str, Any]):
    rope = hf.read_config(json.loads(SMOLLM2) | fields).rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 2.0, 100000.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR},
        {"rope_theta": 100000, "rope_parameters": LINEAR | {"rope_theta": 5e5}},
        {"rope_scaling": LINEAR | {"rope_theta": 7.0}, "rope_parameters": LINEAR},
    ],
)
def test_rope_fields_that_contradict_each_other_are_refused(fields: dict[str, Any]):
    with pytest.raises(ValueError, match=r"config\.json: .*rope_.*contradict each other"):
        hf.read_config(json.loads(SMOLLM2) | fields)


def test_rope_settings_a_layer_type_are_refused():
    nested = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e5}}}
    with pytest.raises(ValueError, match=r"rope settings \['full_attention'\]"):
        hf.read_config(json.loads(SMOLLM2) | {"rope_theta": None} | nested)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "awq"}),
        ("quantization", {"group_size": 64, "bits": 4}),
        ("resid_pdrop", 0.1),
        ("hidden_act", "quick_gelu"),
        ("pretraining_tp", 2),
        ("rope_interleaved", True),
        ("sliding_window", 128),
        ("attention_dropout", 0.1),
        ("auto_map", {"AutoModel": "code.Model"}),
        ("logit_softcapping", 30.0),
        ("num_local_experts", 8),
    ],
)
def test_a_config_field_whose_effect_is_not_implemented_is_refused_by_name(field: str, value: Any):
    fields = json.loads(SMOLLM2) | {field: value}
    with pytest.raises(ValueError, match=rf"config\.json.*{field}="):
        hf.read_config(fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rms_norm_eps", "1e-5"), ("rope_theta", "10000"), ("max_position_embeddings", "long")),
        *(("num_key_value_heads", True), ("tie_word_embeddings", "false"), ("vocab_size", True)),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rope_parameters", [1.0]),
    ],
)
def test_a_config_field_of_the_wrong_kind_is_named(field: str, value: Any):
    fields = json.loads(SMOLLM2) | {field: value}
    with pytest.raises(UserError, match=r"config\.json: .*(number|true or false|integer|object)"):
        hf.read_config(fields)


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"model_type='mamba' is not implemented.*llama, ministral, .*qwen2"
    ):
        hf.read_config({"model_type": "mamba"})


@pytest.mark.parametrize("value", ["64", -1, None])
def test_a_config_with_a_broken_size_is_refused(value: Any):
    with pytest.raises(ValueError, match=r"hidden_size=.*positive integer"):
        hf.read_config(json.loads(SMOLLM2) | {"hidden_size": value})


@pytest.mark.parametrize("source", TINY, ids=lambda path: path.name)
@pytest.mark.parametrize("max_shard_bytes", [5e9, 2e4])
def test_saved_weights_read_back_equal_bit_for_bit(
    source: Path, max_shard_bytes: float, tmp_path: Path
):
    config, params, fields = hf.load(source)
    hf.save(tmp_path / "out", config, params, fields, max_shard_bytes=max_shard_bytes)
    again, found, _ = hf.load(tmp_path / "out")
    assert again == config
    assert_equal_trees(found, params)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes < 5e9)


def test_saved_names_shapes_and_values_are_those_of_the_source(tmp_path: Path):
    config, params, fields = hf.load(TINY[0])
    hf.save(tmp_path / "out", config, params, fields, dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(TINY[0] / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_a_sharded_save_lists_every_tensor_in_its_index(tmp_path: Path):
    config, params, fields = hf.load(TINY[0])
    out = hf.save(tmp_path / "out", config, params, fields, max_shard_bytes=2e4)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    by_file = {path.name: set(load_file(path)) for path in out.glob("*.safetensors")}
    assert len(by_file) > 2
    for name, file in index["weight_map"].items():
        assert name in by_file[file]
    assert sum(map(len, by_file.values())) == len(index["weight_map"])


def test_an_export_holds_config_generation_config_tokenizer_and_chat_template(tmp_path: Path):
    config, params, fields = hf.load(DATA / "tiny")
    words = tokenizer.load(DATA / "tiny")
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    out = hf.save(
        tmp_path / "out", config, params, fields, tokenizer=words, generation={"eos_token_id": 1}
    )
    assert hf.read_fields(out)["dtype"] == "float32"
    again = tokenizer.load(out)
    assert again.chat_template == words.chat_template
    assert again.encode("w1 w5 w60") == [4, 8, 63]
    assert again.special_tokens_map == words.special_tokens_map
    assert tokenizer.stop_tokens(out, again) == (1,)


class FullDisk:
    """A tokenizer whose files no longer fit."""

    def save_pretrained(self, path: str) -> None:
        raise OSError(28, f"No space left on device: {path}")


def test_a_failed_save_leaves_the_export_that_was_there(tmp_path: Path):
    config, params, fields = hf.load(TINY[1])
    out = hf.save(tmp_path / "out", config, params, fields)
    zeros = jax.tree.map(lambda leaf: 0 * leaf, params)
    with pytest.raises(OSError, match="No space"):
        hf.save(out, config, zeros, fields, tokenizer=FullDisk())
    assert_equal_trees(hf.load(out)[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_replaces_what_was_there(tmp_path: Path):
    config, params, fields = hf.load(TINY[1])
    out = hf.save(tmp_path / "out", config, params, fields, max_shard_bytes=2e4)
    hf.save(out, config, params, fields)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leaves_are_placed_one_by_one_in_the_dtype_that_is_asked_for(copy: Path):
    placed: dict[tuple[str, ...], tuple[int, ...]] = {}

    def place(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, None]:
        placed[path] = shape
        return "bfloat16", None

    _, params, _ = hf.load(copy, place=place)
    assert placed["layers", "attention", "key", "kernel"] == (2, 32, 2, 12)
    assert len(placed) == len(jax.tree.leaves(params))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_random_parameters_need_no_weights_and_follow_the_seed(copy: Path):
    (copy / "model.safetensors").unlink()
    _, first, _ = hf.load(copy, init="random", seed=1)
    _, again, _ = hf.load(copy / "config.json", init="random", seed=1)
    _, other, _ = hf.load(copy, init="random", seed=2)
    assert_equal_trees(first, again)
    assert not np.array_equal(first["head"]["kernel"], other["head"]["kernel"])
    with pytest.raises(ValueError, match=r"model\.init='fresh'"):
        hf.load(copy, init="fresh")


def test_a_missing_and_an_unknown_tensor_are_named(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight; unknown: .*q_norm"):
        hf.load(copy)


def test_a_tensor_of_the_wrong_shape_is_named(copy: Path):
    with pytest.raises(
        ValueError, match=r"mlp\.gate_proj\.weight has shape \(48, 32\).*\(50, 32\)"
    ):
        hf.load(edit(copy, intermediate_size=50))


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, 20000])
def test_truncated_safetensors_are_refused(copy: Path, kept_bytes: int):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        hf.load(copy)


def test_missing_files_are_named(copy: Path, tmp_path: Path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        hf.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        hf.load(copy)
    with pytest.raises(ValueError, match="no such directory"):
        hf.load(tmp_path / "nowhere")


def test_a_config_that_is_no_json_is_refused(copy: Path):
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not readable as JSON"):
        hf.load(copy)


def test_a_tied_checkpoint_may_ship_its_head_twice_if_both_are_equal(tmp_path: Path):
    copy = Path(shutil.copytree(TINY[1], tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, copy / "model.safetensors")
    assert_equal_trees(hf.load(copy)[1], hf.load(TINY[1])[1])
    head[3, 4] += 1
    save_file(tensors | {"lm_head.weight": head}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        hf.load(copy)


def test_integer_weights_are_refused(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8"):
        hf.load(copy)


def test_a_word_level_tokenizer_json_is_taken_as_it_is():
    words = tokenizer.load(DATA / "tiny")
    assert words.encode("w1 w5 w60") == [4, 8, 63]
    assert (words.eos_token_id, words.pad_token_id) == (1, 0)


def test_a_directory_without_a_tokenizer_says_so(copy: Path):
    assert not tokenizer.exists(copy)
    assert tokenizer.exists(DATA / "tiny")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        tokenizer.load(copy)


def test_a_generation_config_is_the_files_or_made_of_the_configs_ids(copy: Path):
    assert hf.read_generation(DATA / "tiny")["eos_token_id"] == 1
    assert hf.read_generation(edit(copy, pad_token_id=None)) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def test_loading_a_tokenizer_prints_nothing():
    code = f"from rftjax import tokenizer; tokenizer.load({str(DATA / 'tiny')!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
