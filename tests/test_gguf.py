"""GGUF files give the weights, the config and the tokenizer that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as writer
import jax
import numpy as np
import pytest
import seeded

from rftjax.config import embedded_model
from rftjax.errors import UserError
from rftjax.text import tokenizer
from rftjax.weights import gguf, hf, shards

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
    unused = [f"[PAD{index}]" for index in range(settings.get("unused", 0))]
    tokens = settings.get("tokens", WORDS)
    out.add_tokenizer_model(settings.get("model", "gpt2"))
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens + unused)
    types = settings.get("types", [3, 3] + [1] * (len(tokens) - 2))
    out.add_token_types(types + [5] * len(unused))
    if (merges := settings.get("merges", MERGES)) is not None:
        out.add_token_merges(merges)
    out.add_bos_token_id(1)
    ids = {"eos": settings.get("eos", 0)} | settings.get("ids", {})
    for name, index in ids.items():
        out.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    if (add := settings.get("add_bos", False)) is not None:
        out.add_add_bos_token(add)
    if "add_eos" in settings:
        out.add_add_eos_token(settings["add_eos"])
    out.add_vocab_size(len(tokens + unused))
    for key in ("embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        out.add_uint32(f"llama.{key}", 4)
    template = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    out.add_chat_template(template)
    if "tool_template" in settings:
        out.add_array("tokenizer.chat_templates", ["tool_use"])
        out.add_string("tokenizer.chat_template.tool_use", settings["tool_template"])
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


def as_converted(folder: Path, name: str, fields: dict[str, Any]) -> Path:
    """Writes a tiny model of a family as GGUF, with the gains, orders of rows and names of llama.cpp's converter."""
    source = seeded.checkpoint(folder / "source", name, **fields)
    fields = json.loads((source / "config.json").read_text())
    kind = fields["model_type"]
    arch = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}.get(kind, kind)
    out = writer.GGUFWriter(folder / "m.gguf", arch)
    ropes = fields["rope_parameters"]
    fields["rope_theta"] = ropes.get("full_attention", ropes)["rope_theta"]
    own_fields = {"gemma3": gguf.GEMMA_FIELDS, "qwen3moe": gguf.MOE_FIELDS}.get(arch, {})
    for key, field in (gguf.FIELDS | own_fields).items():
        add = out.add_float32 if isinstance(fields.get(field), float) else out.add_uint32
        add(f"{arch}.{key}", fields[field]) if field in fields else None
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    stored = hf.read_safetensors(source / "model.safetensors")
    for name in [name for name in stored if ".experts.0." in name]:
        of_all = [
            name.replace(".experts.0.", f".experts.{at}.") for at in range(fields["num_experts"])
        ]
        stacked = np.stack([stored.pop(one) for one in of_all])
        layer, part = name.split(".")[2], name.split(".")[-2].removesuffix("_proj")
        out.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", stacked)
    for hf_name, tensor in stored.items():
        part = hf_name.split(".")[-2]
        hf_name = hf_name.replace(".mlp.gate.", ".ffn_gate_inp.")
        if arch == "smollm3" and part in heads:
            tensor = interleave(tensor, fields[heads[part]])
        if arch == "gemma3" and part.endswith("norm"):
            tensor = tensor + np.float32(1.0)
        own = gguf.OWN_TENSORS.get(kind, {}).get(part, part)
        out.add_tensor(gguf_name(hf_name.replace(f".{part}.", f".{own}.")), tensor)
    finish(out)
    return folder / "m.gguf"


PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
# Tiny models of families whose files do not say some things, which then have their defaults.
UNSAID: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False, "rope_parameters": PLAIN},
    "olmo2": {"hidden_act": "silu", "rope_parameters": PLAIN},
    "qwen3_moe": {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 2, 3],
        "rope_parameters": PLAIN,
    },
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "sliding_window": None, "rope_parameters": PLAIN},
    "gemma3": {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 12,
        "rope_parameters": {"full_attention": PLAIN, "sliding_attention": LOCAL},
    },
}


@pytest.mark.parametrize("name", [*UNSAID])
def test_files_of_other_families_are_read(name: str, tmp_path: Path):
    config, params, _ = hf.load(as_converted(tmp_path, name, UNSAID[name]))
    expected, leaves, _ = hf.load(tmp_path / "source")
    assert config == expected
    assert jax.tree.structure(params) == jax.tree.structure(leaves)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(leaves), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


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


@pytest.mark.parametrize(
    ("model", "pre", "words"),
    [
        ("gpt2", "tekken", "pre='tekken' is not.*llama-bpe"),
        ("bert", "default", "model='bert' is not"),
    ],
)
def test_tokenizers_that_are_not_implemented_are_refused(model, pre, words, tmp_path: Path):
    with pytest.raises(ValueError, match=f"model.path=.*tokenizer.ggml.{words}"):
        tokenizer.load(write_words(tmp_path / "m.gguf", pre, model=model))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *(("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("falcon3", "llama-bpe")),
        *(("deepseek-r1-qwen", "qwen2"), ("megrez", "qwen2"), ("phi-2", "gpt-2")),
        *(("starcoder", "smollm"), ("dbrx", "smaug-bpe")),
    ],
)
def test_an_alias_of_a_pre_tokenizer_is_that_pre_tokenizer(alias: str, name: str, tmp_path: Path):
    one, two = (write_words(tmp_path / f"{pre}.gguf", pre) for pre in (alias, name))
    for text in ("ab 1234 12", " ab!! a\n\n  b", "it's  123"):
        assert encode(one, text) == encode(two, text)


@pytest.mark.parametrize(
    ("pre", "said", "expected"),
    [
        *(("llama-bpe", None, True), ("llama-bpe", False, False), ("falcon3", None, True)),
        *(("qwen2", None, False), ("qwen2", True, True), ("smaug-bpe", None, False)),
    ],
)
def test_a_text_begins_with_bos_as_llama_cpp_decides(pre, said, expected, tmp_path: Path):
    ids = tokenizer.load(write_words(tmp_path / "m.gguf", pre, add_bos=said)).encode("ab")
    assert ids == [1] * expected + [WORDS.index("ab")]


def test_end_and_beginning_of_sequence_are_added_where_the_file_says_so(tmp_path: Path):
    path = write_words(tmp_path / "m.gguf", "llama-bpe", add_bos=None, add_eos=True)
    assert tokenizer.load(path).encode("ab") == [1, WORDS.index("ab"), 0]


def test_unused_tokens_at_the_end_are_padding_and_no_vocabulary(tmp_path: Path):
    path = write_words(tmp_path / "m.gguf", "qwen2", unused=5)
    words = tokenizer.load(path)
    assert tokenizer.vocabulary(words) == len(WORDS)


def test_named_templates_are_kept_beside_the_first(tmp_path: Path):
    words = tokenizer.load(write_words(tmp_path / "m.gguf", "qwen2", tool_template="tools"))
    messages = [{"role": "user", "content": "a"}]
    assert words.apply_chat_template(messages, tokenize=False) == "<|start|>a<|end|>"
    assert words.apply_chat_template(messages, tools=[{}], tokenize=False) == "tools"


def test_stop_tokens_are_those_of_all_keys_and_of_the_template(tmp_path: Path):
    add = {"eot": WORDS.index("ab"), "eom": WORDS.index("12")}
    path = write_words(tmp_path / "m.gguf", "qwen2", eos=1, ids=add)
    stops = tokenizer.stop_tokens(path, tokenizer.load(path))
    assert stops == (1, WORDS.index("ab"), WORDS.index("12"), 0)


@pytest.mark.parametrize("name", ["eos", "eot", "eom"])
def test_a_stop_token_that_the_file_does_not_have_is_refused_by_its_key(name: str, tmp_path: Path):
    path = write_words(tmp_path / "m.gguf", "qwen2", ids={name: 1000})
    with pytest.raises(ValueError, match=rf"m\.gguf.*tokenizer\.ggml\.{name}_token_id"):
        tokenizer.stop_tokens(path, tokenizer.load(path))


def test_metadata_that_make_no_tokenizer_are_refused_by_key(tmp_path: Path):
    for settings, words in (
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["a zz"]}, "make no tokenizer"),
        ({"merges": ["ab"]}, "make no tokenizer"),
        ({"tokens": [*WORDS[:-1], "a"]}, "has 'a' at 2 and"),
        ({"types": [3, 3]}, "2 entries of tokenizer.ggml.token_type"),
        ({"model": "llama"}, "tokenizer.ggml.scores are not there"),
    ):
        with pytest.raises(ValueError, match=rf"model\.path=.*m\.gguf: .*{words}"):
            tokenizer.load(write_words(tmp_path / "m.gguf", "qwen2", **settings))


@pytest.fixture
def sentencepiece_file(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A file with the tokens, scores and types of a model that the sentencepiece package made."""
    known = json.loads((DATA / "sentencepiece.json").read_text(encoding="utf-8"))
    out = writer.GGUFWriter(tmp_path / "m.gguf", "llama")
    out.add_tokenizer_model("llama")
    out.add_token_list(known["pieces"])
    out.add_token_scores(known["scores"])
    out.add_token_types(known["types"])
    finish(out)
    return tmp_path / "m.gguf", known


def test_a_sentencepiece_file_encodes_as_sentencepiece_does(sentencepiece_file):
    path, known = sentencepiece_file
    words = tokenizer.load(path)
    for text, ids in zip(known["texts"], known["ids"], strict=True):
        assert words.encode(text, add_special_tokens=False) == ids, text
        assert words.encode(text) == [1, *ids]  # bos, unless the file says otherwise
        assert words.decode(ids) == text
    assert (words.bos_token, words.eos_token, words.unk_token) == ("<s>", "</s>", "<unk>")
    assert words.encode("a</s>b", add_special_tokens=False)[-3:].count(2) == 1


def test_an_exported_sentencepiece_tokenizer_is_the_same(sentencepiece_file, tmp_path: Path):
    path, known = sentencepiece_file
    tokenizer.load(path).save_pretrained(str(tmp_path / "out"))
    again = tokenizer.load(tmp_path / "out")
    assert [again.encode(text)[1:] for text in known["texts"]] == known["ids"]


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


@pytest.mark.parametrize("name", ["model.GGUF", "model"])
def test_a_gguf_file_of_another_name_is_recognised(name: str, tmp_path: Path):
    out = writer.GGUFWriter(tmp_path / name, "llama")
    finish(out)
    with pytest.raises(UserError, match="is a GGUF file; rename it"):
        hf.read_fields(tmp_path / name)
