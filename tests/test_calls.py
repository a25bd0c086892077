import re

import pytest

from rftjax.environments.calls import before_calls, tool_calls

NAMES = ("add", "search")
ONE = {"name": "add", "arguments": {"a": 1, "b": "x\ny"}}
TWO = {
    "name": "search",
    "arguments": {"query": 'a "quoted" {word}', "tags": ["p", "q"], "deep": {"on": True}},
}


def calls(text, names=NAMES):
    return tool_calls({"role": "assistant", "content": text}, names)


ONE_JSON, TWO_JSON = (
    '{"a": 1, "b": "x\\ny"}',
    '{"query": "a \\"quoted\\" {word}", "tags": ["p", "q"], "deep": {"on": true}}',
)
ONE_WHOLE, TWO_WHOLE = (
    f'{{"name": "add", "arguments": {ONE_JSON}}}',
    f'{{"name": "search", "arguments": {TWO_JSON}}}',
)
ONE_LLAMA, TWO_LLAMA = (
    text.replace('"arguments"', '"parameters"') for text in (ONE_WHOLE, TWO_WHOLE)
)
PYTHON = "add(a=1, b='x\\ny'){}search(query='a \"quoted\" {{word}}', tags=['p', 'q'], deep={{'on': True}})"

FORMATS = {
    "hermes": f"I look.\n<tool_call>\n{ONE_WHOLE}\n</tool_call>\n<tool_call>{TWO_WHOLE}</tool_call><|im_end|>",
    "hermes, unclosed": f"<tool_call>{ONE_WHOLE}<tool_call>{TWO_WHOLE}",
    "llama, bare": f"{ONE_LLAMA}; {TWO_LLAMA}<|eot_id|>",
    "llama, tagged": f"<|python_tag|>{ONE_LLAMA}; {TWO_LLAMA}<|eom_id|>",
    "llama, typed": f'{{"type": "function", {ONE_LLAMA[1:]}\n{TWO_LLAMA}',
    "llama, python": "[" + PYTHON.format(", ") + "]",
    "llama, built in": "<|python_tag|>" + PYTHON.format("\n").replace("(a", ".call(a").replace("(q", ".call(q"),
    "mistral, list": f"[TOOL_CALLS] [{ONE_WHOLE}, {TWO_WHOLE}]</s>",
    "mistral, named": f"[TOOL_CALLS]add[ARGS]{ONE_JSON}[TOOL_CALLS]search[CALL_ID]a1b2c3d4e[ARGS]{TWO_JSON}</s>",
    "mistral, bare name": f"Well.[TOOL_CALLS]add{ONE_JSON}[TOOL_CALLS]search{TWO_JSON}",
    "gemma, function": "<start_function_call>call:add{a:1,b:<escape>x\ny<escape>}<end_function_call>"
    '<start_function_call>call:search{query:<escape>a "quoted" {word}<escape>,tags:[<escape>p<escape>,'
    "<escape>q<escape>],deep:{on:true}}<end_function_call>",
    "gemma, quotes": '<|tool_call>call:add{a:1,b:<|"|>x\ny<|"|>}<tool_call|>'
    '<|tool_call>call:search{query:<|"|>a "quoted" {word}<|"|>,tags:[<|"|>p<|"|>,<|"|>q<|"|>],'
    "deep:{on:true}}<tool_call|>",
    "gemma, code": "Let me see.\n```tool_code\n" + PYTHON.format("\n") + "\n```<end_of_turn>",
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{ONE_JSON}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>search<｜tool▁sep｜>{TWO_JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
    "deepseek, blocks": "<｜tool▁calls▁begin｜>"
    + "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{text}\n```<｜tool▁call▁end｜>"
        for name, text in (("add", ONE_JSON), ("search", TWO_JSON))
    )
    + "<｜tool▁calls▁end｜>",
    "gpt-oss": f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
    f"<|constrain|>json<|message|>{ONE_JSON}<|call|><|start|>assistant<|channel|>commentary to=functions.search"
    f"<|message|>{TWO_JSON}<|call|>",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_parallel_calls_of_every_format_are_read(name):
    assert calls(FORMATS[name]) == [ONE, TWO]


def test_kimi_calls_keep_their_ids():
    text = "<|tool_calls_section_begin|>" + "".join(
        f"<|tool_call_begin|>{name}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for name, arguments in (("functions.add:0", ONE_JSON), ("functions.search:1", TWO_JSON))
    )
    expected = [
        ONE | {"tool_call_id": "functions.add:0"},
        TWO | {"tool_call_id": "functions.search:1"},
    ]
    assert calls(text + "<|tool_calls_section_end|>") == expected
    assert calls(text.removesuffix("<|tool_call_end|>")) == expected  # cut


def test_values_of_xml_calls_are_texts_and_json():
    values = "<parameter=query>\ntwo\nlines\n</parameter>\n<parameter=tags>\n[1, 2]\n</parameter>"
    body = f"<function=search>\n{values}\n</function>"
    expected = [{"name": "search", "arguments": {"query": "two\nlines", "tags": [1, 2]}}]
    assert calls(f"<tool_call>\n{body}\n</tool_call>") == expected
    assert calls(f"I look.\n{body}") == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "other", "parameters": {}}',  # no such tool
        '{"name": "add", "parameters": {}, "age": 3}',  # a record that happens to have a name
        f"The call would be {ONE_LLAMA}",
        f"{ONE_LLAMA} and more",
        '["add", "search"]',
        "[add, search]",
        "[unknown(a=1)]",
        "{'name': 'add'}",
        "add(a=1)",
        "No call at all.",
        "",
        "{",
        "[",
        "[" * 5000,
    ],
)
def test_an_answer_without_marks_that_is_not_calls_alone_is_an_answer(text):
    assert calls(text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>{broken}</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "a tool call must be"),
        ("[TOOL_CALLS]add[ARGS]{broken}", "arguments are not valid JSON"),
        ("[TOOL_CALLS][1]", "a tool call must be"),
        ("<|python_tag|>import os", "name\\(key=value\\)"),
        ("<|python_tag|>add(1, 2)", "must be named"),
        ("<|python_tag|>add(a=open('x'))", "malformed node"),
        ("<start_function_call>call:add{a:}<end_function_call>", "not valid JSON"),
        ("<｜tool▁call▁begin｜>add<｜tool▁sep｜>{<｜tool▁call▁end｜>", "not valid JSON"),
        (
            "<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>[1]<|tool_call_end|>",
            "must be a JSON object",
        ),
        ("<|channel|>commentary to=functions.add<|message|>{<|call|>", "not valid JSON"),
        ("<tool_call>" + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(text, problem):
    [call] = calls(text)
    assert re.search(problem, call["problem"]) and "arguments" not in call


def test_a_call_that_is_thought_about_is_not_made():
    thought = f"I could say {FORMATS['hermes']}, or not.\n</think>\n\n"
    for begin in ("<think>\n", ""):
        assert calls(begin + thought + "No.") == []
        assert calls(begin + thought + FORMATS["hermes"]) == [ONE, TWO]
        said = begin + thought + "I add.\n"
        assert before_calls(f"{said}<tool_call>{ONE_WHOLE}</tool_call>") == said
    assert calls(f"<think>\nI could say {FORMATS['hermes']}") == []
    begun = {"role": "assistant", "content": f"I could say {FORMATS['hermes']}"}
    assert tool_calls(begun) and not tool_calls(begun | {"begins_thinking": True})
    quoted = '<tool_call>{"name": "add", "arguments": {"a": "</think>"}}</tool_call>'
    assert calls(quoted) == [{"name": "add", "arguments": {"a": "</think>"}}]


def test_given_tool_calls_win_over_the_text():
    function = {"name": "add", "arguments": '{"a": 1}'}
    message = {
        "role": "assistant",
        "content": FORMATS["hermes"],
        "tool_calls": [{"id": "c1", "function": function}],
    }
    assert tool_calls(message) == [{"name": "add", "arguments": {"a": 1}, "tool_call_id": "c1"}]
