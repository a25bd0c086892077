"""Messages to tokens: sampled ids stay as they are, and the template's past stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rftjax import chat
from rftjax.types import Task

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thinking of earlier turns is dropped, as some published templates do.
DROPS_THINKING = CHATML.replace(
    "+ m['content'] +",
    "+ (m['content'].split('</think>')[-1] if not loop.last and m['role'] == 'assistant'"
    " else m['content']) +",
)
# A default system prompt that goes away when the conversation grows.
FORGETS = (
    "{% if messages | length < 3 %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
TRIMS = CHATML.replace("m['content'] +", "m['content'] | trim +")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
# No token ends a turn here: the next role's token does.
NO_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
TOOLS_SEPARATELY = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['role'] == 'tool' and loop.index > 1 %}<results>{% endif %}",
)
USER = {"role": "user", "content": "say ab"}
AGAIN = {"role": "user", "content": "again"}


def make(template: str = CHATML) -> Any:
    """A byte-level tokenizer that merges `ab`, so that a sampled `a`, `b` is encoded otherwise."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *letters, "ab", "ĊĊ"])}
    built = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("Ċ", "Ċ")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    words = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>")
    words.chat_template = template
    return words


def ids(words: Any, *tokens: str) -> list[int]:
    return words.convert_tokens_to_ids(list(tokens))


def said(words: Any, sampled: list[int]) -> dict[str, str]:
    return {"role": "assistant", "content": chat.decode(words, sampled)}


def test_a_conversation_is_its_prompt_then_sampled_ids_then_what_follows_token_for_token():
    words = make()
    prompt = chat.render(words, [USER], generation_prompt=True)
    sampled = ids(words, "a", "b", "<|im_end|>")
    history = [USER, said(words, sampled)]
    after = chat.continuation(words, history, [AGAIN], last_token=sampled[-1])
    whole = prompt + sampled + after
    text = words.apply_chat_template([*history, AGAIN], tokenize=False, add_generation_prompt=True)
    assert words.decode(whole) == text
    encoded = chat.render(words, [*history, AGAIN], generation_prompt=True)
    assert len(encoded) == len(whole) - 1, "the tokenizer is meant to be ambiguous"
    assert whole[len(prompt) : len(prompt) + 3] == sampled


def test_a_cut_turn_gets_the_end_of_turn_that_it_lacks():
    words = make()
    sampled = ids(words, "a", "b")
    history = [USER, said(words, sampled)]
    cut = chat.continuation(words, history, [AGAIN])
    ended = chat.continuation(words, history, [AGAIN], last_token=words.eos_token_id)
    assert cut == [words.eos_token_id, *ended]
    assert words.decode(ended).startswith("\n<|im_start|>user\nagain")


def test_another_stop_token_stands_in_the_place_of_the_templates():
    words = make()
    other = ids(words, "<|endoftext|>")[0]
    after = chat.continuation(
        words, [USER, {"role": "assistant", "content": "a"}], [AGAIN], last_token=other
    )
    assert words.decode(after).startswith("\n<|im_start|>user\nagain")


def test_the_next_roles_token_is_kept_where_the_template_has_no_end_of_turn():
    words = make(NO_END)
    for last_token in (-1, words.eos_token_id):
        after = chat.continuation(
            words, [USER, {"role": "assistant", "content": "a"}], [AGAIN], last_token=last_token
        )
        assert words.decode(after) == "<|im_start|>user:again<|im_start|>assistant:"


def test_a_stop_token_that_is_plain_text_is_not_doubled():
    words = make(NO_END.replace("m['content'] }}", "m['content'] + '!!' }}"))
    bang = ids(words, "!")[0]
    after = chat.continuation(
        words, [USER, {"role": "assistant", "content": "a"}], [AGAIN], last_token=bang
    )
    assert words.decode(after).startswith("!<|im_start|>user")


def test_a_template_that_drops_thinking_is_refused_with_the_dropped_text():
    words = make(DROPS_THINKING)
    thought = {"role": "assistant", "content": "<think>hm</think>ab"}
    with pytest.raises(chat.ChatTemplateError, match=r"rewrites the assistant's turn.*<think>hm"):
        chat.continuation(words, [USER, thought], [AGAIN], last_token=2)
    plain = {"role": "assistant", "content": "ab"}
    assert chat.continuation(words, [USER, plain], [AGAIN], last_token=2)


def test_a_template_that_rewrites_an_earlier_turn_is_refused():
    words = make(FORGETS)
    reply = {"role": "assistant", "content": "ab"}
    with pytest.raises(chat.ChatTemplateError, match="rewrites history.*system"):
        chat.continuation(words, [USER, reply], [AGAIN], last_token=2)


def test_white_space_that_a_template_trims_is_no_rewriting():
    words = make(TRIMS)
    reply = {"role": "assistant", "content": " ab\n"}
    assert chat.continuation(words, [USER, reply], [AGAIN], last_token=2)


@pytest.mark.parametrize(
    ("template", "stable"),
    [(CHATML, True), (TRIMS, True), (NO_END, True), (DROPS_THINKING, False), (FORGETS, False)],
)
def test_the_check_at_the_start_tells_stable_templates_from_others(template: str, stable: bool):
    words = make(template)
    assert chat.is_prefix_stable(words) == stable
    assert bool(chat.instability(words)) != stable


def test_tool_messages_continue_a_conversation():
    words = make(TOOLS_SEPARATELY)
    result = {"role": "tool", "name": "add", "content": "4", "tool_call_id": "call00000"}
    reply = {"role": "assistant", "content": "<tool_call>add</tool_call>"}
    after = chat.continuation(words, [USER, reply], [result], last_token=2)
    assert (
        words.decode(after) == "\n<results><|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_are_given_to_the_template():
    words = make("{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + CHATML)
    tools = [{"type": "function", "function": {"name": "adder", "parameters": {}}}]
    with_tools = chat.render(words, [USER], generation_prompt=True, tools=tools)
    assert words.decode(with_tools).startswith("adder<|im_start|>")
    without = chat.render(words, [USER], generation_prompt=True, tools=[])
    assert words.decode(without).startswith("<|im_start|>")


def test_a_template_that_refuses_a_role_says_so():
    words = make(NO_SYSTEM + CHATML)
    with pytest.raises(chat.ChatTemplateError, match="roles system, user.*no system"):
        chat.render(words, [{"role": "system", "content": ""}, USER], generation_prompt=True)


def test_a_tokenizer_without_a_template_says_so():
    words = make("")
    with pytest.raises(ValueError, match="no chat template.*`prompt`"):
        chat.render(words, [USER], generation_prompt=True)


def test_plain_text_is_encoded_without_a_template():
    words = make("")
    assert chat.encode_plain(words, "ab") == ids(words, "ab")


def test_prompts_encoded_together_are_those_encoded_alone():
    words = make()
    tasks = [
        Task("a", [USER]),
        Task("b", [], prompt="ab"),
        Task("c", [USER, {"role": "assistant", "content": "b"}, USER]),
        Task("d", [], prompt="a"),
    ]
    alone = [chat.prompt(words, task) for task in tasks]
    assert chat.prompts(words, tasks) == alone and len(set(map(tuple, alone))) == len(tasks)
    assert chat.prompts(words, tasks[1:2]) == alone[1:2] and chat.prompts(words, []) == []


def test_decoding_drops_the_stop_token_and_keeps_what_is_asked_for():
    words = make()
    sampled = ids(words, "a", "<|endoftext|>", "b", "!")
    assert chat.decode(words, sampled) == "ab!"
    assert chat.decode(words, sampled, stop_tokens=(sampled[-1],)) == "ab"
    assert chat.decode(words, [*sampled, words.eos_token_id], keep_special=True) == (
        "a<|endoftext|>b!"
    )
    assert chat.decode(words, []) == ""
