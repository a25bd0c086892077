"""GGUF files give the weights, the config and the tokenizer that they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as writer
import jax
import numpy as np
import pytest

from rftjax import gguf, hf, shards, tokenizer
from rftjax.config import embedded_model

DATA = Path(__file__).parent / "data"
WORDS = [
    "<|end|>",
    "<|start|>",
    *"abcdefgh0123456789.,!'",
    "Ġ",
    "Ċ",
    "ab",
    "Ġa",
    "Ġab",
    "12",
    "123",
]
MERGES = ["a b", "Ġ a", "Ġ ab", "1 2", "12 3"]

needs_model = pytest.mark.skipif(
    not Path(embedded_model()).exists(), reason="scripts/fetch_model.py has not fetched the model"
)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Orders the rows of a q or k projection as the Llama converter of GGUF does."""
    channels = rows.shape[0] // heads
    order = [
        head * channels + half * (channels // 2) + pair
        for head in range(heads)
        for pair in range(channels // 2)
        for half in range(2)
    ]
    return rows[np.asarray(order)]


def write(path: Path, source: Path, kind: Any = None, **metadata: Any) -> Path:
    """Writes a checkpoint as a GGUF file, `metadata` over what its config says."""
    fields = hf.read_fields(source)
    arch = fields["model_type"]
    out = writer.GGUFWriter(path, arch)
    out.add_block_count(fields["num_hidden_layers"])
    out.add_context_length(fields["max_position_embeddings"])
    out.add_embedding_length(fields["hidden_size"])
    out.add_feed_forward_length(fields["intermediate_size"])
    out.add_head_count(fields["num_attention_heads"])
    out.add_head_count_kv(fields["num_key_value_heads"])
    out.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    out.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    out.add_vocab_size(fields["vocab_size"])
    if "head_dim" in fields:
        out.add_key_length(fields["head_dim"])
        out.add_value_length(fields["head_dim"])
    for key, value in metadata.items():
        name = f"{arch}.{key.replace('__', '.')}"
        out.add_float32(name, value) if isinstance(value, float) else out.add_string(name, value)
    for name, read in shards.open_directory(source).items():
        tensor = read().astype(np.float32)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            tensor = interleave(tensor, fields[heads[part]])
        quantised = kind is not None and tensor.ndim == 2
        data = writer.quants.quantize(tensor, kind) if quantised else tensor
        out.add_tensor(gguf_name(name), data, raw_dtype=kind if quantised else None)
    finish(out)
    return path


def gguf_name(name: str) -> str:
    for ours, theirs in gguf.TENSORS.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def finish(out: Any) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write_words(path: Path, pre: str, **settings: Any) -> Path:
    """Writes a GGUF file that holds a tokenizer and nothing else."""
    out = writer.GGUFWriter(path, "llama")
    out.add_tokenizer_model(settings.get("model", "gpt2"))
    out.add_tokenizer_pre(pre)
    out.add_token_list(WORDS)
    out.add_token_types([3, 3] + [1] * (len(WORDS) - 2))
    out.add_token_merges(MERGES)
    out.add_bos_token_id(1)
    out.add_eos_token_id(0)
    out.add_add_bos_token(settings.get("add_bos", False))
    out.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")
    finish(out)
    return path


def encode(path: Path, text: str) -> list[str]:
    words = tokenizer.load(path)
    return words.convert_ids_to_tokens(words.encode(text))


@pytest.mark.parametrize("source", ["tiny", "reference/llama_linear"])
def test_weights_and_settings_are_those_of_the_source(source: str, tmp_path: Path):
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}
    path = write(tmp_path / "m.gguf", DATA / source, **(scaling if "linear" in source else {}))
    config, params, fields = hf.load(path)
    expected, leaves, _ = hf.load(DATA / source)
    assert config == expected
    assert fields["architectures"] in (["LlamaForCausalLM"], ["Qwen2ForCausalLM"])
    assert jax.tree.structure(params) == jax.tree.structure(leaves)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(leaves), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_biases_and_an_untied_head_are_read(tmp_path: Path):
    source = DATA / "reference" / "llama_llama3"
    config, params, _ = hf.load(write(tmp_path / "m.gguf", source))
    _, expected, _ = hf.load(source)
    assert config.qkv_bias
    assert config.mlp_bias
    assert not config.tied
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_quantised_tensors_are_dequantised(tmp_path: Path):
    kind = writer.GGMLQuantizationType.Q8_0
    _, params, _ = hf.load(write(tmp_path / "m.gguf", DATA / "tiny", kind))
    _, expected, _ = hf.load(DATA / "tiny")
    ours, theirs = (tree["layers"]["attention"]["query"]["kernel"] for tree in (params, expected))
    assert 0 < np.abs(ours - theirs).max() < np.abs(theirs).max() / 100


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(7, 32), (96, 576), (65, 2048)])
def test_quantised_tensors_are_what_the_gguf_package_makes_of_them(kind, shape, tmp_path: Path):
    quantisation = writer.GGMLQuantizationType[kind]
    data = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    stored = writer.quants.quantize(data, quantisation)
    out = writer.GGUFWriter(tmp_path / "m.gguf", "llama")
    out.add_tensor("one", stored, raw_dtype=quantisation)
    finish(out)
    found = gguf.read(tmp_path / "m.gguf").tensors["one"]()
    np.testing.assert_array_equal(found, writer.quants.dequantize(stored, quantisation))


def test_metadata_are_what_the_gguf_package_reads(tmp_path: Path):
    out = writer.GGUFWriter(tmp_path / "m.gguf", "llama")
    lists = {
        "texts": ["", "Ġa", "ß" * 300],
        "numbers": [-3, 2**31 - 1],
        "fractions": [0.5, -1.25],
        "switches": [True, False],
        "lists": [[1, 2], [3, 4]],
        "none": [],
    }
    for name, values in lists.items():
        out.add_array(name, values)
    out.add_string("text", "Ġ")
    out.add_float64("fraction", 1e-9)
    finish(out)
    found, plain = gguf.read(tmp_path / "m.gguf"), writer.GGUFReader(tmp_path / "m.gguf")
    assert set(found.keys) == set(plain.fields)
    for key, field in plain.fields.items():
        assert found.metadata(key) == field.contents(), key
    assert found.metadata("texts") == lists["texts"]


def test_yarn_scaling_without_its_original_length_is_refused(tmp_path: Path):
    path = write(tmp_path / "m.gguf", DATA / "tiny", rope__scaling__type="yarn")
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not implemented"):
        hf.load(path)


def test_metadata_that_is_not_implemented_are_refused_by_name(tmp_path: Path):
    path = write(tmp_path / "m.gguf", DATA / "tiny", attention__logit_softcap=30.0)
    with pytest.raises(ValueError, match=r"attention\.logit_softcap.*not implemented"):
        hf.load(path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_factors(factor: float, tmp_path: Path):
    # The converter's own rule, written as one case a frequency.
    factors = []
    for exponent in np.arange(0, 64, 2) / 64:
        wavelength = 2 * np.pi * 500000.0**exponent
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    table = np.asarray(factors, np.float32)
    fields = {"rope_theta": 500000.0}
    tensors = {"rope_freqs.weight": lambda: table}
    file = gguf.File(tmp_path / "m.gguf", (), lambda key: None, tensors)
    assert gguf._llama3_scaling(file, fields, 64) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    table[3] = 1.5
    with pytest.raises(ValueError, match="are not those of Llama 3"):
        gguf._llama3_scaling(file, fields, 64)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path):
    path = write(tmp_path / "m.gguf", DATA / "tiny")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        hf.load(path)


def test_a_file_of_another_kind_or_architecture_is_refused(tmp_path: Path):
    (tmp_path / "text.gguf").write_text("{}" * 100)
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        hf.load(tmp_path / "text.gguf")
    finish(writer.GGUFWriter(tmp_path / "m.gguf", "gemma"))
    with pytest.raises(ValueError, match="architecture 'gemma' is not implemented"):
        hf.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapter.type", "lora", "is a LoRA adapter.* lora.path"),
        ("general.type", "adapter", "is a LoRA adapter.* lora.path"),
        ("general.type", "mmproj", "holds a mmproj and no language model"),
        ("split.count", 3, "one of 3 parts.* --merge"),
        ("llama.block_count", 2, "has no llama.feed_forward_length, llama.embedding_length"),
    ],
)
def test_a_file_that_is_no_whole_model_says_what_it_is(key, value, words, tmp_path: Path):
    out = writer.GGUFWriter(tmp_path / "m.gguf", "llama")
    out.add_uint16(key, value) if isinstance(value, int) else out.add_string(key, value)
    finish(out)
    with pytest.raises(ValueError, match=f"model.path=.*m.gguf: .*{words}"):
        hf.load(tmp_path / "m.gguf")


def test_a_part_of_a_split_file_is_recognised_by_its_name(tmp_path: Path):
    path = write(tmp_path / "m-00001-of-00001.gguf", DATA / "tiny")
    assert hf.load(path)[0].layers == 2
    part = path.rename(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(ValueError, match="is part 2 of 3 of a split GGUF file.*--merge"):
        hf.load(part)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["Ġab", "Ġ", "1", "2", "3", "4"]),
        ("gpt-2", ["Ġab", "Ġ", "123", "4"]),
        ("qwen2", ["Ġab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["Ġab", "Ġ", "123", "4"]),
        ("default", ["Ġab", "Ġ", "123", "4"]),
    ],
)
def test_numbers_are_split_as_the_pre_tokenizer_says(pre: str, expected: list[str], tmp_path: Path):
    assert encode(write_words(tmp_path / "m.gguf", pre), " ab 1234") == expected


def test_control_tokens_are_special_and_the_template_is_kept(tmp_path: Path):
    words = tokenizer.load(write_words(tmp_path / "m.gguf", "qwen2", add_bos=True))
    assert words.encode("ab<|end|>") == [1, WORDS.index("ab"), 0]
    assert words.encode("ab", add_special_tokens=False) == [WORDS.index("ab")]
    assert words.decode([1, WORDS.index("ab"), 0], skip_special_tokens=True) == "ab"
    assert (words.bos_token_id, words.eos_token_id) == (1, 0)
    messages = [{"role": "user", "content": "a"}]
    assert words.apply_chat_template(messages, tokenize=False) == "<|start|>a<|end|>"


@pytest.mark.parametrize(("model", "pre"), [("gpt2", "tekken"), ("llama", "default")])
def test_tokenizers_that_are_not_implemented_are_refused(model: str, pre: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"'{model}' with pre-tokenizer '{pre}' is not"):
        tokenizer.load(write_words(tmp_path / "m.gguf", pre, model=model))


@needs_model
def test_the_embedded_model_has_its_known_tokens():
    words = tokenizer.load(embedded_model())
    assert len(words) == 49152
    assert words.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    text = "<|im_start|>user\nWhat is 1234 + 56? It's héllo\n\n  x\tÅ 你好 ﷺ<|im_end|>\n"
    ids = words.encode(text)
    assert ids[:4] == [1, 4093, 198, 1780]
    assert words.convert_ids_to_tokens(ids[6:10]) == ["1", "2", "3", "4"]
    assert words.decode(ids) == text
    assert tokenizer.stop_tokens(embedded_model(), words) == (2,)


@needs_model
def test_the_embedded_models_config_is_the_published_one():
    fields = hf.read_fields(embedded_model())
    assert fields["rms_norm_eps"] == 1e-5
    assert fields["rope_theta"] == 100000
    assert fields["tie_word_embeddings"]
    assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == (9, 3)
