"""Messages to tokens: sampled ids stay as they are, and the template's past stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rftjax.text import chat
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
# The conversation's oldest messages go away, but only later on.
WINDOW = CHATML.replace(
    "in messages %}", "in (messages if messages | length < 5 else messages[-3:]) %}"
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
    # Nor does it stand in the place of a template's special token.
    after = chat.continuation(
        make(), [USER, {"role": "assistant", "content": "a"}], [AGAIN], last_token=bang
    )
    assert words.decode(after).startswith("<|im_end|>\n<|im_start|>user")


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
    [
        (CHATML, True),
        (TRIMS, True),
        (NO_END, True),
        (DROPS_THINKING, False),
        (FORGETS, False),
        (WINDOW, False),
    ],
)
def test_the_check_at_the_start_tells_stable_templates_from_others(template: str, stable: bool):
    assert bool(chat.instability(make(template))) != stable


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


def test_only_plain_prompts_get_the_tokenizers_own_special_tokens():
    words = make()
    begin = words.convert_tokens_to_ids("<|endoftext|>")
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    plain, chatty = Task("a", [], prompt="ab"), Task("b", [USER])
    assert chat.prompt(words, plain) == [begin, *ids(words, "ab")]
    assert chat.prompt(words, chatty)[0] != begin
    assert chat.prompts(words, [plain, chatty]) == [
        chat.prompt(words, one) for one in (plain, chatty)
    ]


def test_decoding_drops_the_stop_token_and_keeps_every_other_special_one():
    words = make()
    sampled = ids(words, "a", "<|endoftext|>", "b", "!")
    assert chat.decode(words, sampled) == "a<|endoftext|>b!"
    assert chat.decode(words, sampled, stop_tokens=(sampled[-1],)) == "a<|endoftext|>b"
    assert chat.decode(words, [*sampled, words.eos_token_id]) == "a<|endoftext|>b!"
    assert chat.decode(words, []) == ""


def test_the_text_ends_before_a_stop_string_wherever_the_tokens_end():
    words = make()
    sampled = ids(words, "b", "<", "/", "ab", ">", "!")
    assert chat.decode(words, sampled, stop_strings=("zz", "</a", "!")) == "b"
    assert chat.decode(words, sampled, stop_strings=("zz",)) == "b</ab>!"


def test_a_stop_string_ends_with_the_token_that_completes_it():
    words = make()
    find = chat.StopStrings(words, ("</a", "é"))
    sampled = ids(words, "b", "<", "/", "ab", ">", "<", "/", "ab")
    assert find(sampled, 0) == 4
    assert [find(sampled[:end], end - 1) for end in range(1, 5)] == [0, 0, 0, 4]
    assert find(sampled[:3], 0) == 0
    accent = words.encode("é")
    assert len(accent) == 2 and find([*sampled[:1], *accent], 2) == 3
    assert find(sampled[:1] * 500 + sampled[:4], 500) == 504


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
)


def test_a_template_with_a_space_before_its_end_of_turn_writes_no_second_one():
    words = make(LLAMA2)
    history = [USER, {"role": "assistant", "content": "a"}]
    ended = chat.continuation(words, history, [AGAIN], last_token=words.eos_token_id)
    assert words.decode(ended) == "<|im_start|>[INST] again [/INST]"
    cut = chat.continuation(words, history, [AGAIN])
    assert words.decode(cut) == " <|im_end|><|im_start|>[INST] again [/INST]"


def test_half_a_surrogate_pair_is_named_and_no_crash():
    words = make()
    for text in ("ab\ud83d", "\udc00"):
        with pytest.raises(chat.TextError, match=r"half of a surrogate pair.*character [02]"):
            chat.encode(words, text)
        with pytest.raises(chat.TextError, match="surrogate"):
            chat.render(words, [USER, {"role": "user", "content": text}], generation_prompt=True)
    faults = list(chat.measure(words, [Task("a", [USER]), Task("b", [], prompt="\ud83d")]))
    assert isinstance(faults[0], int) and isinstance(faults[1], chat.TextError)


def test_a_text_is_cut_to_a_number_of_tokens_with_a_note_of_the_rest():
    tokenizer = make()
    assert chat.shorten(tokenizer, "abab cd", 0) == "abab cd"
    assert chat.shorten(tokenizer, "ababab", 3) == "ababab"  # three tokens of six characters
    assert chat.shorten(tokenizer, "ababab", 2) == "abab... [cut: 2 more characters]"
    # Half of a character is not shown, and of a long text only the start is encoded.
    assert chat.shorten(tokenizer, "ab\u00e9", 2) == "ab... [cut: 1 more characters]"
    assert chat.shorten(tokenizer, "ab" * 10**6, 2) == "abab... [cut: 1999996 more characters]"


def test_a_text_beyond_any_room_is_not_encoded():
    words = make()
    most = "a" * (10 * chat.CHARACTERS)  # may have 10 tokens, for all that is known
    assert len(chat.encode(words, most, 10)) == len(most)
    words.encode = None  # nothing is to be encoded
    with pytest.raises(chat.TooLong):
        chat.encode(words, most + "a", 10)
    with pytest.raises(chat.TooLong, match=r"rollout.max_length=10: a text of 20000000 characters"):
        chat.encode(words, "a" * 20_000_000, 10)
    (count,) = chat.measure(words, [Task("a", [], prompt="a" * 20_000_000)], most=10)
    assert count == 20_000_000 // chat.CHARACTERS


def test_a_turn_renders_the_conversation_twice():
    words, calls = make(), []
    render = words.apply_chat_template
    words.apply_chat_template = lambda *args, **kwargs: calls.append(1) or render(*args, **kwargs)
    prompt = chat.prompt_text(words, Task("a", [USER]))
    history = [USER, {"role": "assistant", "content": "a"}]
    calls.clear()
    ids, after = chat.follow(words, prompt, history, [AGAIN], last_token=words.eos_token_id)
    assert len(calls) == 2
    assert after == render([*history, AGAIN], tokenize=False, add_generation_prompt=True)
    assert ids == chat.continuation(words, history, [AGAIN], last_token=words.eos_token_id)


LISTS_TOOLS = "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}{% endif %}"


def schema(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {}}}


def test_a_rows_own_tools_reach_the_template_before_the_environments():
    words = make(LISTS_TOOLS + CHATML)
    task = Task("a", [USER], {"tools": [schema("add"), schema("find")]})
    text = chat.prompt_text(words, task, tools=[schema("find"), schema("ask")])
    assert text.startswith("add,find,ask<|im_start|>")
    as_json = Task("a", [USER], {"tools": '[{"type": "function", "function": {"name": "add"}}]'})
    assert chat.prompt_text(words, as_json).startswith("add<|im_start|>")
    for nothing in (None, [], ""):
        assert chat.prompt_text(words, Task("a", [USER], {"tools": nothing})).startswith(
            "<|im_start|>"
        )
    for odd in (["hammer"], "saw", {"name": "add"}, 3):
        with pytest.raises(chat.TextError, match="tools=.*tasks.map"):
            chat.prompt_text(words, Task("a", [USER], {"tools": odd}))


def test_a_plain_prompt_goes_on_with_what_the_environment_opens_with():
    words = make("")
    task = Task("a", [USER], prompt="say ab")
    assert chat.prompt_text(words, task, [USER, AGAIN, USER]) == "say ab\nagain\nsay ab\n"
    assert chat.prompt_text(words, task, [USER]) == "say ab"


def test_a_template_that_drops_tools_is_told_from_one_that_shows_them():
    assert chat.drops_tools(make(), [USER], [schema("add")])
    assert not chat.drops_tools(make(LISTS_TOOLS + CHATML), [USER], [schema("add")])
    taught = {"role": "system", "content": "Call `add`(a, b) to add."}
    assert not chat.drops_tools(make(), [taught, USER], [schema("add")])
    # A longer word is not the tool's name.
    other = {"role": "system", "content": "Answer with an address."}
    assert chat.drops_tools(make(), [other, USER], [schema("add")])


def test_a_call_is_rendered_as_the_model_would_write_it():
    calls = "{% for c in m['tool_calls'] %}{{ '<call>' + c['function'] | tojson + '</call>' }}{% endfor %}"
    words = make(CHATML.replace("{% endfor %}", "", 1).replace(
        "+ m['content'] + '<|im_end|>\n' }}", "+ m['content'] }}" + calls + "{{ '<|im_end|>\n' }}{% endfor %}"
    ))  # fmt: skip
    text = chat.rendered_call(words, [schema("add")], {"a": 1})
    assert text == '<call>{"name": "add", "arguments": {"a": 1}}</call>'
    assert chat.rendered_call(make(), [schema("add")], {"a": 1}) == ""
