"""Tool calls in the text of a model's turn, as the chat templates of common families teach to write them.

The formats have marks of their own, so that none has to be chosen. Only JSON and Python without any mark, as Llama 3
writes them, are taken for a call on a condition: the whole text is calls of tools that exist.

| format | what a call looks like |
|---|---|
| Hermes, Qwen | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
| Qwen3-Coder | `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` |
| Llama 3 | `{"name": ..., "parameters": {...}}`, `[NAME(key=value)]` |
| the same, marked | `<|python_tag|>` before one of these or before `NAME.call(key=value)` |
| Mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, `[TOOL_CALLS]NAME[ARGS]{...}` |
| Gemma | `<start_function_call>call:NAME{key:<escape>text<escape>}<end_function_call>`, a block `tool_code` of Python |
| DeepSeek | `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>` |
| DeepSeek V3, R1 | the same with `function<｜tool▁sep｜>NAME` and a block of JSON |
| Kimi K2 | `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` |
| gpt-oss | `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>` |
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from rftjax.types import THINKING_TAGS, THINKS, Message

Call = dict[
    str, Any
]  # name and arguments; `problem` in place of arguments where they cannot be read

_ENDS = re.compile(r"(\s|<\|[a-z_]+\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>)+\Z")
_XML_CALL = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_VALUE = re.compile(
    r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)
_ESCAPED = re.compile(r"(?:<escape>(.*?)<escape>|<\|\"\|>(.*?)<\|\"\|>)", re.DOTALL)
_KEY = re.compile(r"(?<=[{,])\s*([A-Za-z_][\w.-]*)\s*:")


# Without gpt-oss's channels, of which one is that of its calls.
_THINKING, _THOUGHT = tuple(THINKING_TAGS), tuple(THINKING_TAGS.values())
# What stands before calls, apart from those without any mark.
STARTS = (
    "<tool_call>",
    "[TOOL_CALLS]",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<start_function_call>",
    "<|tool_call>",
    "```tool_code",
    "<|channel|>",
    "<|python_tag|>",
    "<function=",
)


def before_calls(text: str, *, begun: bool = False) -> str:
    """Returns what a text, behind thinking that was `begun` before it or not, says before anything that may be a call:
    nothing of one that begins like a call without any mark."""
    begin = _thought(text, begun=begun)
    if text[begin:].lstrip()[:1] in ("{", "["):
        return text[:begin]
    starts = [at for mark in STARTS if (at := text.find(mark, begin)) >= 0]
    return text[: min(starts)] if starts else text


def _thought(text: str, *, begun: bool = False) -> int:
    """Returns where the text begins behind thinking: a call that is thought about is not made. Thinking that has not
    ended takes all of it, also where it was `begun` before the text; a text that begins with a call has none."""
    first = text.lstrip()
    if first.startswith(STARTS) or (first[:1] in ("{", "[") and not first.startswith(_THINKING)):
        return 0
    ends = [at + len(mark) for mark in _THOUGHT if (at := text.find(mark)) >= 0]
    return min(ends, default=len(text) if begun or first.startswith(_THINKING) else 0)


def tool_calls(message: Message, names: Collection[str] = ()) -> list[Call]:
    """Returns the calls in a message's `tool_calls`, else in its text; `names` are those of the tools that exist.

    What stands in the thinking is no call. A malformed call has `problem`, which says what is wrong, in place of
    `arguments`.
    """
    calls = []
    for given in message.get("tool_calls") or []:
        given = given if isinstance(given, dict) else {}
        call = _call(given.get("function", given))
        calls.append(call | ({"tool_call_id": given["id"]} if given.get("id") else {}))
    if calls:
        return calls
    text = message.get("content") or ""
    text = text[_thought(text, begun=bool(message.get(THINKS))) :]
    for pattern, read in _FORMATS:
        if found := list(pattern.finditer(text)):
            return [call for match in found for call in _attempt(read, match)]
    return _unmarked(_ENDS.sub("", text).strip(), names)


def _attempt(read: Callable[[re.Match[str]], list[Call]], match: re.Match[str]) -> list[Call]:
    try:
        return read(match)
    except (ValueError, SyntaxError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else error
        return [{"problem": f"the tool call is not valid JSON: {told}"}]


def _call(value: Any) -> Call:
    """Returns the call that a parsed object stands for."""
    value = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return {"problem": 'a tool call must be {"name": ..., "arguments": {...}}'}
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # OpenAI's format has JSON inside JSON
        try:
            arguments = _loads(arguments or "{}")
        except ValueError as error:
            return {"name": value["name"], "problem": f"the arguments are not valid JSON: {error}"}
    if arguments is None:  # a function without parameters
        arguments = {}
    if not isinstance(arguments, dict):
        return {"name": value["name"], "problem": "the arguments must be a JSON object"}
    return {"name": value["name"], "arguments": arguments}


def _named(name: str, arguments: str) -> Call:
    return _call({"name": name.strip(), "arguments": arguments.strip()})


def _loads(text: str) -> Any:
    """Parses JSON and allows raw newlines in strings, which models write; raises ValueError for invalid JSON."""
    try:
        return json.loads(text, strict=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _objects(text: str) -> Iterator[Any]:
    """Yields JSON values that follow each other, with white space, commas or semicolons between them."""
    decoder, at = json.JSONDecoder(strict=False), 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,;"))


def _hermes(match: re.Match[str]) -> list[Call]:
    text = match[1]
    if found := _XML_CALL.findall(text):
        return [_from_xml(name, body) for name, body in found]
    return [_call(_loads(text))]


def _from_xml(name: str, body: str) -> Call:
    """Values are texts or JSON; a tool with annotations converts texts itself."""
    arguments: dict[str, Any] = {}
    for key, value in _XML_VALUE.findall(body):
        arguments[key] = value
        if value[:1] in "{[":
            with contextlib.suppress(ValueError):
                arguments[key] = _loads(value)
    return {"name": name, "arguments": arguments}


def _mistral(match: re.Match[str]) -> list[Call]:
    text = _ENDS.sub("", match[1]).strip()
    if named := re.match(
        r"([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(\{.*)\Z", text, re.DOTALL
    ):
        return [_named(named[1], named[2])]
    value = _loads(text)
    return [_call(one) for one in (value if isinstance(value, list) else [value])]


def _python_tag(match: re.Match[str]) -> list[Call]:
    text = _ENDS.sub("", match[1]).strip()
    return [_call(one) for one in _objects(text)] if text[:1] == "{" else _from_python(text)


def _from_python(text: str) -> list[Call]:
    """Returns the calls of one expression or of a line each; raises ValueError where it is anything else."""
    calls = []
    for line in ast.parse(text).body:
        value = line.value if isinstance(line, ast.Expr) else None
        if (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id == "print"
        ):
            value = value.args[0] if value.args else None
        for node in value.elts if isinstance(value, ast.List) else [value]:
            if not isinstance(node, ast.Call):
                raise ValueError("a call must be written as name(key=value)")
            name = ast.unparse(node.func).removesuffix(".call")
            if node.args or any(word.arg is None for word in node.keywords):
                calls.append({"name": name, "problem": "arguments must be named: name(key=value)"})
                continue
            arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            calls.append({"name": name, "arguments": arguments})
    return calls


def _gemma(match: re.Match[str]) -> list[Call]:
    """Rewrites `{key:<escape>text<escape>,other:3}` as JSON."""
    texts: list[str] = []

    def hold(found: re.Match[str]) -> str:
        texts.append(found[1] if found[1] is not None else found[2])
        return f'"\x00{len(texts) - 1}"'

    held = _KEY.sub(r'"\1":', _ESCAPED.sub(hold, match[2]))
    written = re.sub(r'"\x00(\d+)"', lambda found: json.dumps(texts[int(found[1])]), held)
    return [_named(match[1], written)]


def _deepseek(match: re.Match[str]) -> list[Call]:
    kind, rest = match[1].strip(), match[2].strip()
    if kind == "function":
        kind, _, rest = rest.partition("\n")
    rest = re.sub(r"\A```(?:json)?\s*|\s*```\Z", "", rest.strip())
    return [_named(kind, rest)]


def _kimi(match: re.Match[str]) -> list[Call]:
    name = match[1].strip()
    call = _named(name.rpartition(":")[0].rpartition(".")[2] or name, match[2])
    return [call | {"tool_call_id": name}]


def _harmony(match: re.Match[str]) -> list[Call]:
    return [_named(match[1].removeprefix("functions."), match[2])]


def _unmarked(text: str, names: Collection[str]) -> list[Call]:
    """Returns calls where the whole text is calls of tools that exist, as JSON or Python; else none."""
    try:
        if text[:1] == "{":
            values = list(_objects(text))
            calls = [
                _call(one)
                for one in values
                if set(one) <= {"name", "arguments", "parameters", "type"}
            ]
        elif text[:1] == "[" and text[-1:] == "]":
            values = calls = _from_python(text)
        else:
            return []
    except (ValueError, SyntaxError, TypeError, RecursionError):
        return []
    known = all(call.get("name") in names for call in calls)
    return calls if known and len(calls) == len(values) else []


def _format(pattern: str, read: Callable[[re.Match[str]], list[Call]]) -> tuple[Any, Any]:
    return re.compile(pattern, re.DOTALL), read


_FORMATS = (
    _format(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|(?=<tool_call>)|\Z)", _hermes),
    _format(r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|\Z)", _mistral),
    _format(
        r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)"
        r"(?:<\|tool_call_end\|>|(?=<\|tool_call_begin\|>)|\Z)",
        _kimi,
    ),
    _format(
        r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|(?=<｜tool▁call▁begin｜>)|\Z)",
        _deepseek,
    ),
    _format(
        r"(?:<start_function_call>|<\|tool_call>)\s*call:([\w.-]+)(\{.*?\})\s*"
        r"(?:<end_function_call>|<tool_call\|>|(?=<start_function_call>)|\Z)",
        _gemma,
    ),
    _format(r"```tool_code\n(.*?)(?:```|\Z)", _python_tag),
    _format(
        r"<\|channel\|>[^<]*?\bto=(\S+?)\s*(?:<\|constrain\|>\w+)?<\|message\|>(.*?)(?:<\|call\|>|\Z)",
        _harmony,
    ),
    _format(r"<\|python_tag\|>(.*)\Z", _python_tag),
    _format(r"(?s)(<function=[^>\s]+>.*?(?:</function>|\Z))", _hermes),
)
