"""Tokenizers of a file of ranks give the ids that the tiktoken package gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rftjax.errors import UserError
from rftjax.text import chat, tokenizer

KNOWN = json.loads((Path(__file__).parent / "data" / "tiktoken.json").read_text(encoding="utf-8"))
TEMPLATE = (
    "{% for m in messages %}<|im_user|>{{ m['role'] }}<|im_middle|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_user|>assistant<|im_middle|>{% endif %}"
)


def write(folder: Path, **settings: Any) -> Path:
    """Writes a directory as Kimi K2 has it: ranks, names of added tokens, a template."""
    ranks = [f"{piece} {rank}" for rank, piece in enumerate(KNOWN["ranks"])]
    (folder / "tiktoken.model").write_text("\n".join(ranks) + "\n")
    added = {
        str(index): {"content": text, "special": True} for text, index in KNOWN["special"].items()
    }
    given = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]"},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(given | settings))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer.load(write(tmp_path_factory.mktemp("kimi")))


def test_odd_texts_have_the_ids_of_tiktoken_and_come_back(loaded: Any):
    assert len(KNOWN["texts"]) > 200
    wrong = {
        text: ids
        for text, ids in KNOWN["texts"].items()
        if loaded.encode(text, add_special_tokens=False) != ids or loaded.decode(ids) != text
    }
    assert not wrong


def test_added_tokens_have_their_ids_and_the_rest_is_reserved(loaded: Any):
    first = len(KNOWN["ranks"])
    assert tokenizer.vocabulary(loaded) == first + 256
    assert all(loaded.convert_tokens_to_ids(text) == at for text, at in KNOWN["special"].items())
    assert loaded.convert_ids_to_tokens(first + 255) == f"<|reserved_token_{first + 255}|>"
    assert (loaded.bos_token, loaded.eos_token) == ("[BOS]", "[EOS]")
    assert tokenizer.end_of_turn(loaded) == KNOWN["special"]["<|im_end|>"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert not chat.rewriting(loaded, messages, [{"role": "user", "content": "c"}])


def test_an_exported_tokenizer_is_read_again_without_the_ranks(loaded: Any, tmp_path: Path):
    loaded.save_pretrained(str(tmp_path))
    again = tokenizer.load(tmp_path)
    text = " ".join(list(KNOWN["texts"])[:20])
    assert again.encode(text) == loaded.encode(text) and again.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("settings", "line", "rule"),
    [
        ({"tokenizer_class": "QWenTokenizer"}, "", "not with 'QWenTokenizer'"),
        ({"added_tokens_decoder": {"3": {"content": "[BOS]"}}}, "", "'.BOS.' the id 3"),
        ({}, "!? 9", "line 477 is no piece"),
        ({}, "YWJj 9", "ranks are not 0, 1, 2"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    settings: dict[str, Any], line: str, rule: str, tmp_path: Path
):
    write(tmp_path, **settings)
    with (tmp_path / "tiktoken.model").open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=rf"model\.path=.*{rule}"):
        tokenizer.load(tmp_path)
