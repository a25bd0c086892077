"""Tokenizers of directories: every file that adds tokens counts, and stop tokens come from all that name one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import rftjax
from rftjax.errors import UserError
from rftjax.text import tokenizer
from rftjax.weights import hf

TINY = Path(__file__).parent / "data" / "tiny"
TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The tiny model: 64 rows, words w0 to w60 as ids 3 to 63."""
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


def edit(path: Path, **fields: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | fields))


def cut(directory: Path, words: int = 0) -> None:
    """Takes the last words out of tokenizer.json, so that other files may add tokens in their place."""
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    vocab = value["model"]["vocab"]
    for word in sorted(vocab, key=lambda word: vocab[word])[len(vocab) - words :]:
        del vocab[word]
    path.write_text(json.dumps(value))


def entry(content: str, special: bool = True) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special, **flags}


def test_tokens_that_only_tokenizer_config_adds_are_whole_tokens(copy: Path):
    cut(copy, 2)
    added = {"62": entry("<turn>"), "63": entry("<call>", special=False)}
    edit(copy / "tokenizer_config.json", added_tokens_decoder=added)
    words = tokenizer.load(copy)
    assert words.encode("w1 <turn> w2<call>") == [4, 62, 5, 63]
    assert words.decode([62, 4, 63], skip_special_tokens=True).split() == ["w1", "<call>"]


def test_tokens_that_only_added_tokens_json_adds_are_whole_tokens(copy: Path):
    cut(copy, 2)
    edit(copy / "added_tokens.json", **{"<turn>": 62, "<call>": 63})
    assert tokenizer.load(copy).encode("w1 <turn> w2<call>") == [4, 62, 5, 63]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_an_added_token_with_another_id_than_the_tokenizer_gives_it_is_refused(copy: Path, file):
    cut(copy, 2)
    if file == "added_tokens.json":
        edit(copy / file, **{"<turn>": 63})
    else:
        edit(copy / file, added_tokens_decoder={"63": entry("<turn>")})
    with pytest.raises(UserError, match=rf"{file} gives token '<turn>' the id 63, .* has 62"):
        tokenizer.load(copy)


def test_templates_of_their_own_folder_are_found(copy: Path):
    (copy / "chat_template.jinja").write_text("plain")
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    words, messages = tokenizer.load(copy), [{"role": "user", "content": "w1"}]
    assert words.apply_chat_template(messages, tokenize=False) == "plain"
    assert words.apply_chat_template(messages, tools=[{}], tokenize=False) == "tools"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_file_is_an_error_of_one_line(copy: Path, file: str):
    (copy / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=rf"model\.path=.*{file}: a Git LFS pointer"):
        tokenizer.load(copy)
    (copy / file).write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"model\.path=.*(make no tokenizer|not readable as JSON)"):
        tokenizer.load(copy)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
)
def test_a_template_file_that_was_not_downloaded_is_refused(copy: Path, name: str):
    (copy / "chat_template.jinja").write_text("plain")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UserError, match=f"{name}: a Git LFS pointer"):
        tokenizer.load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_byte_order_mark_is_named_with_its_file(copy: Path, name: str):
    (copy / "chat_template.jinja").write_text("plain")
    (copy / name).write_bytes(b"\xef\xbb\xbf" + (copy / name).read_bytes())
    with pytest.raises(UserError, match=f"{name}: begins with a byte order mark"):
        tokenizer.load(copy)


def test_settings_without_a_vocabulary_make_no_empty_tokenizer(copy: Path):
    (copy / "tokenizer.json").unlink()
    edit(copy / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(UserError, match="has no tokenizer.json and none of"):
        tokenizer.load(copy)


def test_a_length_that_is_no_number_is_refused_by_name(copy: Path):
    edit(copy / "tokenizer_config.json", model_max_length="512")
    with pytest.raises(UserError, match="model_max_length='512' must be a number"):
        tokenizer.load(copy)


def test_stop_tokens_are_the_union_of_all_that_name_one(copy: Path):
    edit(copy / "generation_config.json", eos_token_id=[7, 9])
    edit(copy / "config.json", eos_token_id=5)
    words = tokenizer.load(copy)
    assert tokenizer.stop_tokens(copy, words) == (7, 9, 5, 1)
    assert tokenizer.stop_tokens(copy) == (7, 9, 5)
    (copy / "generation_config.json").unlink()
    edit(copy / "config.json", eos_token_id=[5, 7])
    assert tokenizer.stop_tokens(copy, words) == (5, 7, 1)


def test_the_token_that_the_template_ends_a_turn_with_is_a_stop_token(copy: Path):
    cut(copy, 2)
    added = {"62": entry("<turn>"), "63": entry("<end>")}
    edit(copy / "tokenizer_config.json", added_tokens_decoder=added, chat_template=TEMPLATE)
    words = tokenizer.load(copy)
    assert tokenizer.end_of_turn(words) == 63
    assert tokenizer.stop_tokens(copy, words) == (1, 63)
    for template in (
        "{% for m in messages %}{{ m['content'] }} w5 {% endfor %}",  # an ordinary word
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['content'][:3] }}<end>{% endfor %}",
    ):
        words.chat_template = template
        assert tokenizer.end_of_turn(words) is None


def test_an_export_stops_at_every_token_that_ended_a_turn_here(copy: Path, tmp_path: Path):
    cut(copy, 2)
    added = {"62": entry("<turn>"), "63": entry("<end>")}
    edit(copy / "tokenizer_config.json", added_tokens_decoder=added, chat_template=TEMPLATE)
    edit(copy / "generation_config.json", eos_token_id=1, temperature=0.5)
    out = rftjax.load(str(copy)).export(tmp_path / "out")
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == ([1, 63], 0.5)
    assert tokenizer.load(out).encode("w1 <turn> w2<end>") == [4, 62, 5, 63]


def test_an_exported_tokenizer_config_is_one_that_transformers_4_reads(copy: Path, tmp_path: Path):
    cut(copy, 1)
    edit(copy / "tokenizer_config.json", additional_special_tokens=["<turn>"])
    out = rftjax.load(str(copy)).export(tmp_path / "out")
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<turn>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & set(written)
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = tokenizer.load(out)
    assert again.encode("w1<turn>") == [4, 63]
    assert again.decode([4, 63], skip_special_tokens=True).strip() == "w1"


def test_a_tokenizer_that_needs_other_packages_says_how_to_convert_it(copy: Path):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"no tokenizer\.json.*sentencepiece.*save_pretrained"):
        tokenizer.load(copy)


@pytest.mark.parametrize("value", [64, -1, "1", 1.0, True, [1, None], {"a": 1}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_bad_stop_token_is_refused_with_its_file_and_field(copy: Path, file: str, value: Any):
    edit(copy / file, eos_token_id=value)
    with pytest.raises(UserError, match=rf"model\.path=.*{file}: eos_token_id"):
        tokenizer.stop_tokens(copy, tokenizer.load(copy))


def test_a_gap_between_ids_does_not_hide_the_last_tokens(copy: Path):
    cut(copy, 10)
    path = copy / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["last"] = 63
    path.write_text(json.dumps(value))
    model = rftjax.load(str(copy))
    assert len(model.tokenizer) == 55
    assert model.vocabulary == 64
    assert model.stop_tokens(["last"]) == (1, 63)


@pytest.fixture
def beyond(copy: Path) -> rftjax.Policy:
    """A policy whose chat template writes <turn>, id 64 of an embedding with 64 rows."""
    added = {"64": entry("<turn>"), "65": entry("<end>")}
    edit(copy / "tokenizer_config.json", added_tokens_decoder=added, chat_template=TEMPLATE)
    return rftjax.load(str(copy))


def test_ids_beyond_the_embedding_are_refused_before_anything_is_computed(beyond):
    chat = [[{"role": "user", "content": "w1"}]]
    with pytest.raises(UserError, match=r"template: token '<turn>' \(id 64\) .*vocab_size=64"):
        beyond.stop_tokens()
    with pytest.raises(UserError, match=r"prompt 0: token '<turn>' \(id 64\) .*vocab_size=64"):
        beyond.sample(chat, stop=[1])
    with pytest.raises(UserError, match=r"prompt 1: id 64 .*vocab_size=64"):
        beyond.sample([[5], [6, 64]], stop=[1])
    with pytest.raises(UserError, match=r"prompt 0: id -1 .*vocab_size=64"):
        beyond.sample([[-1]], stop=[1])
    with pytest.raises(UserError, match=r"stop: id 64 .*vocab_size=64"):
        beyond.sample([[5]], stop=[64])
    for call in (beyond.logits, beyond.logprobs):
        with pytest.raises(UserError, match=r"tokens: id 64 .*vocab_size=64"):
            call([[5, 64], [6, 7]])
        for wrong in ([5, 6], [[5, 6], [7]], [[0.5, 1.0]]):
            with pytest.raises(UserError, match=r"tokens must be \(B, T\) token ids"):
                call(wrong)
    for limits in ({"max_new_tokens": 0}, {"samples": 0}):
        with pytest.raises(UserError, match="=0: must be at least 1"):
            beyond.sample([[5]], stop=[1], **limits)


def test_every_rope_and_dtype_field_that_a_version_of_transformers_reads_is_exported(tmp_path):
    for name in ("llama_llama3", "llama_linear", "llama_yarn", "qwen2_window"):
        config, params, fields = hf.load(TINY.parent / "reference" / name)
        out = hf.save(tmp_path / name, config, params, fields)
        written = json.loads((out / "config.json").read_text())
        settings = written["rope_parameters"]
        assert written["rope_theta"] == settings["rope_theta"] == config.rope.theta
        assert written["dtype"] == written["torch_dtype"] == "float32"
        old = {key: value for key, value in settings.items() if key != "rope_theta"}
        default = settings["rope_type"] == "default"
        assert written["rope_scaling"] == (None if default else old)
        assert hf.read_config(written) == config
        old_only = {key: value for key, value in written.items() if key != "rope_parameters"}
        assert hf.read_config(old_only) == config
