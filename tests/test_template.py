"""Templates with thinking on or off, and histories that they would rewrite."""

from __future__ import annotations

from typing import Any

import pytest
import test_chat

from rftjax.config import base_config, rules
from rftjax.errors import UserError
from rftjax.text import chat, template, tokenizer

# As Qwen3's: earlier thinking is dropped; without thinking the answer begins behind an empty one.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ (m['content'].split('</think>')[-1].lstrip('\n')"
    " if m['role'] == 'assistant' and not loop.last else m['content']) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not"
    " enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As gpt-oss's: an effort; the last answer ends otherwise than earlier ones, and channels are refused within a content.
HARMONY = (
    "{{ '<|im_start|>system\nReasoning: ' + (reasoning_effort or 'medium') + '<|im_end|>' }}{% for m in messages %}"
    "{% if '<|channel|>' in m['content'] %}{{ raise_exception('channels belong into thinking') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '<|message|>' + m['content'] }}{% if loop.last and m['role'] == 'assistant' and"
    " not add_generation_prompt %}{{ '<|endoftext|>' }}{% else %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# As DeepSeek V3.1's: one variable, and thinking begins in the prompt.
DEEPSEEK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


# As those of models that also see: a content is a list of parts, and of a text they would show nothing.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}{{ part.text }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def made(text: str, **settings: str) -> Any:
    return template.settle(test_chat.make(text), **settings)


def prompt(words: Any) -> str:
    return template.text(words, [test_chat.USER], True, None)


@pytest.mark.parametrize(
    ("text", "thinking", "ending"),
    [
        (QWEN, "template", "assistant\n"),
        (QWEN, "on", "assistant\n"),
        (QWEN, "off", "<think>\n\n</think>\n\n"),
        (DEEPSEEK, "template", "</think>"),
        (DEEPSEEK, "on", "<think>"),
        (DEEPSEEK, "off", "</think>"),
    ],
)
def test_a_template_is_told_whether_the_model_thinks(text: str, thinking: str, ending: str):
    assert prompt(made(text, thinking=thinking)).endswith(ending)


def test_a_template_is_told_how_much_the_model_thinks():
    efforts = {
        value: prompt(made(HARMONY, thinking=value)) for value in ("template", "low", "high")
    }
    assert "Reasoning: medium" in efforts["template"]
    assert "Reasoning: low" in efforts["low"] and "Reasoning: high" in efforts["high"]


@pytest.mark.parametrize(
    ("text", "thinking"), [(QWEN, "high"), (HARMONY, "off"), (test_chat.CHATML, "on")]
)
def test_thinking_that_a_template_does_not_know_is_refused(text: str, thinking: str):
    with pytest.raises(UserError, match=f"chat.thinking='{thinking}': the chat template renders"):
        made(text, thinking=thinking)


def test_a_template_that_shows_parts_alone_is_given_them():
    asked, answer = [test_chat.USER], {"role": "assistant", "content": "Four."}
    words = made(PARTS)
    assert test_chat.USER["content"] in prompt(words)
    _, after = chat.follow(words, prompt(words), [*asked, answer], asked)
    assert after == template.text(words, [*asked, answer, *asked], True, None)
    assert after.count("Four.") == 1 and prompt(made(QWEN)).count("Four.") == 0


def test_other_settings_are_refused_by_name():
    config = base_config()
    config.chat.thinking, config.chat.history = "sometimes", "forgotten"
    with pytest.raises(UserError) as refused:
        rules.check(config)
    for said in ("chat.thinking='sometimes'", "chat.history='forgotten'"):
        assert said in str(refused.value)


def test_what_the_template_would_drop_stays_where_the_history_is_kept():
    said = {"role": "assistant", "content": "<think>\nhm</think>\n\nab"}
    turns = [test_chat.USER, said]
    dropping, keeping = made(QWEN), made(QWEN, history="kept")
    assert "rewrites" in chat.instability(dropping) and chat.instability(keeping) == ""
    stop = keeping.eos_token_id
    with pytest.raises(chat.Rewriting):
        chat.continuation(dropping, turns, [test_chat.AGAIN], last_token=stop)
    before = prompt(keeping)
    ids, after = chat.follow(keeping, before, turns, [test_chat.AGAIN], last_token=stop)
    assert (
        after
        == f"{before}{said['content']}<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.show(keeping, [stop, *ids]) == after.removeprefix(before + said["content"])
    # And so on: a turn n is a prefix of turn n + 1.
    more = [*turns, test_chat.AGAIN, {"role": "assistant", "content": "<think>\nso</think>\n\nb"}]
    last = chat.follow(keeping, after, more, [test_chat.USER], last_token=stop)[1]
    assert last.startswith(after + more[-1]["content"])


def test_a_prompt_that_ends_in_an_empty_thought_goes_on_where_the_history_is_kept():
    words = made(QWEN, thinking="off", history="kept")
    turns = [test_chat.USER, {"role": "assistant", "content": "ab"}]
    after = chat.follow(words, prompt(words), turns, [test_chat.AGAIN], last_token=-1)[1]
    assert after.count("<think>\n\n</think>\n\n") == 2 and after.endswith("</think>\n\n")


def test_an_answer_in_channels_goes_on_with_one_end_of_turn():
    words = made(HARMONY, history="kept")
    stop = words.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.end_of_turn(words) == stop
    turns = [test_chat.USER, {"role": "assistant", "content": "<|channel|>final<|message|>ab"}]
    ids, _ = chat.follow(words, prompt(words), turns, [test_chat.AGAIN], last_token=stop)
    assert (
        chat.show(words, ids) == "<|im_start|>user<|message|>again<|im_end|><|im_start|>assistant"
    )
    with pytest.raises(chat.ChatTemplateError, match="channels belong"):
        chat.continuation(made(HARMONY), turns, [test_chat.AGAIN], last_token=stop)


# The forms of published templates: text, end of a turn, and how it changes the past ("" for not at all).
FAMILIES = {
    "llama3": (
        "<|begin|>{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
        "{{ m['content'] | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
        "<|eot|>",
        "",
    ),
    "mistral": (
        "<|begin|>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% else %}"
        " {{ m['content'] }}</s>{% endif %}{% endfor %}",
        "</s>",
        "",
    ),
    "gemma3": (
        "<|begin|>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|head|>{{ 'model' if m['role'] == 'assistant' else"
        " m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<|head|>model\n{% endif %}",
        "<end_of_turn>",
        "",
    ),
    "olmo2": (
        "<|begin|>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        "<|endoftext|>{% endif %}{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}",
        "<|endoftext|>",
        "",
    ),
    "kimi_k2": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['role'] }}<|middle|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>assistant<|middle|>{% endif %}",
        "<|im_end|>",
        "",
    ),
    "deepseek_r1": (
        "<|begin|>{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>"
        "{{ m['content'].split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        "</s>",
        "rewrites",
    ),
    "qwen3": (QWEN, "<|im_end|>", "rewrites the assistant's turn"),
    "gpt_oss": (HARMONY, "<|endoftext|>", "rewrites the assistant's turn"),
}
TOKENS = (
    *(
        "<|begin|>",
        "<|head|>",
        "<|/head|>",
        "<|eot|>",
        "</s>",
        "[INST]",
        "[/INST]",
        "<end_of_turn>",
    ),
    *("<|user|>", "<|assistant|>", "<|middle|>"),
)


@pytest.mark.parametrize("history", ["template", "kept"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_ends_its_turns_and_goes_on_or_says_how_it_changes_the_past(
    name: str, history: str
):
    text, end, reason = FAMILIES[name]
    words = made(text, history=history)
    words.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    stop = words.convert_tokens_to_ids(end)
    assert tokenizer.end_of_turn(words) == stop
    if history == "template" and reason:
        assert reason in chat.instability(words)
        return
    assert chat.instability(words) == ""
    messages = [test_chat.USER]
    before = template.text(words, messages, True, None)
    ids = chat.encode(words, before)
    for answer in ("ab", "a b", "<think>\nb</think>\n\na"):
        sampled = [*chat.encode(words, answer), stop]
        messages += [{"role": "assistant", "content": answer}]
        more, before = chat.follow(words, before, messages, [test_chat.AGAIN], last_token=stop)
        messages += [test_chat.AGAIN]
        ids += [*sampled, *more]
    shown = chat.show(words, ids)
    assert all(f"{answer}{end}" in shown for answer in ("ab", "a b")) and end * 2 not in shown
    if not reason:  # white space around an answer is the model's own
        whole = template.text(words, messages, True, None)
        assert shown.split() == whole.replace("[/INST] ", "[/INST]").split()
