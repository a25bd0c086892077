"""Messages to tokens and back: what was sampled stays, the template writes what is around it.

`tokenizer` is a fast tokenizer of the transformers library throughout.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rftjax.text.template import ChatTemplateError, TextError, settings_of
from rftjax.text.template import text as _text
from rftjax.types import Message, Task

MARK = "8c1f0e5d7a"  # stands for an assistant's content while the text behind it is looked up
CHARACTERS = 64  # of text for each token that there is room for: a longer text is too long and is not encoded


class TooLong(TextError):
    """Says that a text is too long for the tokens that there is room for, whatever the tokenizer makes of it."""


class Rewriting(ChatTemplateError):
    """Says that a chat template changes a conversation's past, which can go on in a new sequence."""


def _check_text(text: str, most: int) -> None:
    """Raises TooLong for a text that `most` tokens (0: any number) cannot hold, TextError for one that is no text."""
    if most and len(text) > CHARACTERS * most:
        raise TooLong(
            f"rollout.max_length={most}: a text of {len(text)} characters is too long whatever its tokens"
            f" (more than {CHARACTERS} characters for each); raise rollout.max_length or shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        raise TextError(
            f"the text holds half of a surrogate pair, {text[start]!a}, at character {start}; put a whole character"
            f" in its place (text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') does)"
        ) from None


def encode(tokenizer: Any, text: str, most: int = 0, *, special: bool = False) -> list[int]:
    """Returns the ids of a text; `special` adds the tokenizer's own, which a template writes itself.

    Raises TooLong where they are surely more than `most` (0: any number), and TextError for lone surrogates.
    """
    _check_text(text, most)
    return list(tokenizer.encode(text, add_special_tokens=special))


def shorten(tokenizer: Any, text: str, most: int) -> str:
    """Returns the first `most` tokens of a text (0: all) with a note on how much is cut behind them."""
    if not most or len(text.encode("utf-8", "replace")) < most:
        return text
    start = text[: CHARACTERS * most]
    ids = encode(tokenizer, start)
    if len(ids) <= most and start == text:
        return text
    kept = tokenizer.decode(ids[:most]).rstrip("\ufffd")  # of a character that was cut in two
    return f"{kept}... [cut: {len(text) - len(kept)} more characters]"


def render(
    tokenizer: Any,
    messages: list[Message],
    *,
    generation_prompt: bool,
    tools: list[Any] | None = None,
) -> list[int]:
    """Returns the ids of a conversation; `generation_prompt` opens the assistant's next turn."""
    return encode(tokenizer, _text(tokenizer, messages, generation_prompt, tools))


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text without a template, with the tokenizer's own special tokens."""
    return encode(tokenizer, text, special=True)


def tools_of(task: Task, tools: Sequence[Any] | None = None) -> list[Any]:
    """Returns the tools that the template of a task is given: the row's field `tools`, then the environment's others.

    Raises TextError where the field holds something else than schemas, a list or its JSON.
    """
    given = task.data.get("tools")
    if isinstance(given, str) and given.strip():
        with contextlib.suppress(ValueError):  # then it is no list of schemas either
            given = json.loads(given)
    own = given or []
    names = [_tool_name(tool) for tool in own] if isinstance(own, (list, tuple)) else [""]
    if not all(names):
        raise TextError(
            f"tools={own!r:.60}: a row's tools are schemas as the chat template takes them"
            ' ({"type": "function", "function": {"name": ..., ...}}); give those, or rename the field in tasks.map'
        )
    return [*own, *(tool for tool in tools or () if _tool_name(tool) not in names)]


def _tool_name(tool: Any) -> str:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def prompt_text(
    tokenizer: Any,
    task: Task,
    messages: list[Message] | None = None,
    *,
    tools: Sequence[Any] | None = None,
) -> str:
    """Returns the text that the first turn of a task goes on from; `messages` are more than the task's own.

    A plain prompt is followed by a line for each further message.
    """
    if task.prompt is not None:
        more = [str(message["content"]) for message in (messages or [])[len(task.messages) :]]
        return "\n".join([task.prompt, *more, ""]) if more else task.prompt
    return _text(tokenizer, messages or task.messages, True, tools_of(task, tools))


def prompt(
    tokenizer: Any,
    task: Task,
    messages: list[Message] | None = None,
    *,
    tools: Sequence[Any] | None = None,
    most: int = 0,
) -> list[int]:
    """Returns the ids of `prompt_text`; raises TooLong where they are surely more than `most` (0: any number)."""
    text = prompt_text(tokenizer, task, messages, tools=tools)
    return encode(tokenizer, text, most, special=task.prompt is not None)


def prompts(
    tokenizer: Any, tasks: Sequence[Task], *, tools: Sequence[Any] | None = None
) -> list[list[int]]:
    """Returns what `prompt` does of many tasks, in half the time: the tokenizer takes them all at once."""
    found: list[list[int]] = [[]] * len(tasks)
    for plain in (True, False):
        chosen = [index for index, task in enumerate(tasks) if (task.prompt is not None) == plain]
        texts = [prompt_text(tokenizer, tasks[index], tools=tools) for index in chosen]
        for text in texts:
            _check_text(text, 0)
        for index, ids in zip(chosen, _encode_all(tokenizer, texts, special=plain), strict=True):
            found[index] = ids
    return found


def _encode_all(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def measure(
    tokenizer: Any, tasks: Sequence[Task], *, tools: Sequence[Any] | None = None, most: int = 0
) -> Iterator[int | TextError]:
    """Yields how many tokens each task's prompt has, or why it has none.

    A text that is too long for `most` tokens (0: any number) whatever they are is not encoded, and counts with the
    least that it can have.
    """
    found: dict[int, int | TextError] = {}
    texts: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for index, task in enumerate(tasks):
        try:
            text = prompt_text(tokenizer, task, tools=tools)
            _check_text(text, most)
            texts[task.prompt is not None][index] = text
        except TooLong:
            found[index] = len(text) // CHARACTERS
        except TextError as error:
            found[index] = error
    for plain, chosen in texts.items():
        ids = _encode_all(tokenizer, list(chosen.values()), special=plain)
        found |= {index: len(one) for index, one in zip(chosen, ids, strict=True)}
    for index in range(len(tasks)):
        yield found[index]


def decode(
    tokenizer: Any,
    ids: list[int],
    *,
    stop_tokens: tuple[int, ...] = (),
    stop_strings: tuple[str, ...] = (),
) -> str:
    """Returns a turn's text without what stopped it: a stop token at its end, or a stop string and what is behind it.

    Other special tokens stay: tags and calls may be written with them.
    """
    ids = list(ids)
    if ids and ids[-1] in (*stop_tokens, tokenizer.eos_token_id):
        ids = ids[:-1]
    text = show(tokenizer, ids)
    ends = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def show(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of ids with all special tokens visible."""
    return tokenizer.decode(list(ids), skip_special_tokens=False)


class StopStrings:
    """Finds the first token that completes one of `texts` in what was sampled in a turn.

    A text is looked for in the decoded tokens, so that it may begin and end within a token. Whether token k completes
    one depends on the tokens up to k alone.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, tuple(texts)
        # Each token of a text has at least one byte of it; some more, as a decoder may trim the first one's text.
        self.window = max(len(text.encode()) for text in texts) + 8

    def __call__(self, tokens: list[int], start: int) -> int:
        """Returns how many tokens there are up to the end of the first text, 0 without one; `start` have none."""
        if not self._within(tokens[max(0, start + 1 - self.window) :]):
            return 0
        counts = range(start + 1, len(tokens) + 1)
        ends = (n for n in counts if self._within(tokens[max(0, n - self.window) : n]))
        return next(ends, 0)

    def _within(self, tokens: list[int]) -> bool:
        text = show(self.tokenizer, tokens)
        return any(stop in text for stop in self.texts)


def continuation(
    tokenizer: Any,
    messages: list[Message],
    new_messages: list[Message],
    *,
    last_token: int = -1,
    tools: list[Any] | None = None,
) -> list[int]:
    """Returns the ids between the sampled ids of `messages[-1]` and the assistant's next turn.

    `last_token` is the stop token that ended the sampled turn, -1 where the turn was cut (the end
    of turn is then among the returned ids). Raises Rewriting where the template rewrites
    what came before; a caller that would rather split starts a new sequence with `render` then.
    White space around a turn's content is not compared.
    """
    prompt = _text(tokenizer, messages[:-1], True, tools)
    return follow(
        tokenizer, prompt, messages, new_messages, last_token=last_token, tools=tools
    )[0]  # fmt: skip


def follow(
    tokenizer: Any,
    prompt: str,
    messages: list[Message],
    new_messages: list[Message],
    *,
    last_token: int = -1,
    tools: list[Any] | None = None,
    most: int = 0,
) -> tuple[list[int], str]:
    """Returns what `continuation` does, and the text that the next turn goes on from: the `prompt` of the next call.

    `prompt` is the text that the sampled turn went on from, as rendered before. With `chat.history="kept"` nothing
    before the new messages is rendered again, whatever the template would make of it.
    """
    if settings_of(tokenizer).kept:
        content = str(messages[-1].get("content") or "")
        messages = _without_answers(messages)
        suffix = _suffix(tokenizer, messages, new_messages, tools)
        after = prompt + content + suffix
        _check_text(after, most)
        return _behind_stop(tokenizer, messages, suffix, last_token, tools), after
    after = _text(tokenizer, [*messages, *new_messages], True, tools)
    _check_text(after, most)
    suffix = _suffix(tokenizer, messages, new_messages, tools)
    if reason := _rewritten(prompt, str(messages[-1].get("content") or ""), after, suffix):
        raise Rewriting(reason)
    return _behind_stop(tokenizer, messages, suffix, last_token, tools), after


def _behind_stop(
    tokenizer: Any,
    messages: list[Message],
    suffix: str,
    last_token: int,
    tools: list[Any] | None,
) -> list[int]:
    """Returns the ids of a suffix without the end of turn that was sampled."""
    ids = encode(tokenizer, suffix)
    if last_token < 0 or not ids:
        return ids
    # Encoded together and cut, so that the rest is encoded as inside a text and not as its start. Some templates write
    # white space before their end of turn.
    for at in {0, _first_ink(tokenizer, ids)}:
        if ids[at] == last_token:
            return ids[at + 1 :]
    end = _behind_mark(_text(tokenizer, _marked(messages), False, tools))
    at, end_ids = _first_ink(tokenizer, ids), encode(tokenizer, end)
    same_end = bool(end_ids) and end_ids[_first_ink(tokenizer, end_ids)] == ids[at]
    if same_end and _is_special(tokenizer, ids[at]) and _is_special(tokenizer, last_token):
        # The stop token that was sampled stands in the place of the template's.
        return ids[at + 1 :]
    ends_last = bool(end_ids) and end_ids[_first_ink(tokenizer, end_ids)] == last_token
    if ends_last and all(_is_special(tokenizer, one) for one in (*ids[at : at + 2], last_token)):
        # The template ends a last turn with what was sampled and others with another token (gpt-oss); behind it a turn
        # begins with a token of its own.
        return ids[at + 1 :]
    stop = show(tokenizer, [last_token])
    if stop and end.startswith(stop) and suffix.startswith(stop):
        return encode(tokenizer, suffix.removeprefix(stop))
    return ids


def _without_answers(messages: list[Message]) -> list[Message]:
    """Returns the messages with a dot for what the model said: the template is to write what is around it alone."""
    return [
        message | {"content": "."} if message["role"] == "assistant" else message
        for message in messages
    ]


def _marked(messages: list[Message]) -> list[Message]:
    return [*messages[:-1], {"role": "assistant", "content": MARK}]


def _suffix(
    tokenizer: Any, messages: list[Message], new_messages: list[Message], tools: list[Any] | None
) -> str:
    """Returns the text behind the content of `messages[-1]` once the new messages follow."""
    return _behind_mark(_text(tokenizer, [*_marked(messages), *new_messages], True, tools))


def _first_ink(tokenizer: Any, ids: list[int]) -> int:
    """Returns the index of the first id that is more than white space, 0 where there is none."""
    return next((at for at, one in enumerate(ids) if show(tokenizer, [one]).strip()), 0)


def rewriting(
    tokenizer: Any,
    messages: list[Message],
    new_messages: list[Message],
    *,
    tools: list[Any] | None = None,
) -> str:
    """Returns how the template changes the past once `new_messages` follow, else an empty text."""
    assert messages and messages[-1]["role"] == "assistant", "the last message is the sampled one"
    prompt = _text(tokenizer, messages[:-1], True, tools)
    after = _text(tokenizer, [*messages, *new_messages], True, tools)
    suffix = _suffix(tokenizer, messages, new_messages, tools)
    return _rewritten(prompt, str(messages[-1].get("content") or ""), after, suffix)


def _rewritten(prompt: str, content: str, after: str, suffix: str) -> str:
    """Returns how `after` is not the prompt, a turn's content and the suffix, else an empty text."""
    if not after.startswith(prompt):
        common = next(
            i
            for i, pair in enumerate(zip(prompt, after + "\0", strict=False))
            if pair[0] != pair[1]
        )
        return (
            "the chat template rewrites history: with the next turn the prompt's"
            f" {prompt[common : common + 60]!r} becomes {after[common : common + 60]!r}"
        )
    body = after[len(prompt) :]
    kept = body[: len(body) - len(suffix)] if body.endswith(suffix) else body
    if not body.endswith(suffix) or kept.strip() != content.strip():
        return (
            "the chat template rewrites the assistant's turn: once the next turn follows,"
            f" {content[:60]!r} is rendered as {kept[:60]!r}"
        )
    return ""


def _behind_mark(text: str) -> str:
    before, mark, behind = text.rpartition(MARK)
    if not mark or MARK in before:
        raise Rewriting("the chat template does not render an assistant's content once")
    return behind


def _is_special(tokenizer: Any, index: int) -> bool:
    token = tokenizer.added_tokens_decoder.get(index)
    return token is not None and token.special


SAMPLE: tuple[Message, ...] = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "<think>\nThree and three.\n</think>\n\n6"},
    {"role": "user", "content": "Thanks."},
)


def instability(tokenizer: Any) -> str:
    """Returns how the template rewrites a sample with thinking and tools, else an empty text."""
    if settings_of(tokenizer).kept:
        return ""
    plain = [
        message | {"content": str(message["content"]).rpartition("</think>")[2].strip()}
        for message in SAMPLE
    ]
    for conversation in (plain, list(SAMPLE)):
        for turn in (2, 4):
            reason = rewriting(tokenizer, conversation[:turn], conversation[turn : turn + 1])
            if reason:
                return reason
    answer = {"role": "tool", "name": "add", "content": "4", "tool_call_id": "call00000"}
    try:
        _text(tokenizer, [*plain[:2], answer], True, None)
    except ChatTemplateError:
        return ""  # a template without tools
    return rewriting(tokenizer, plain[:2], [answer])


def drops_tools(tokenizer: Any, messages: list[Message], tools: list[Any]) -> bool:
    """Says whether the model never sees some tool: the template renders none, and no system message names it."""
    told = " ".join(str(m.get("content")) for m in messages if m["role"] == "system")
    names = {_tool_name(tool) for tool in tools}
    if names <= set(re.findall(r"[\w.-]+", told)):
        return False
    return _text(tokenizer, messages, True, tools) == _text(tokenizer, messages, True, None)


def rendered_call(tokenizer: Any, tools: list[Any], arguments: dict[str, Any]) -> str:
    """Returns the template's own text of a call of the first tool, encoded and decoded as a sampled turn would be.

    Empty where the template does not render `tool_calls`.
    """
    function = {"name": _tool_name(tools[0]), "arguments": arguments}
    call = {"id": "call00000", "type": "function", "function": function}
    user: Message = {"role": "user", "content": SAMPLE[0]["content"]}
    try:
        before = _text(tokenizer, [user], True, tools)
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        whole = _text(tokenizer, [user, asked], False, tools)
        silent = _text(tokenizer, [user, {"role": "assistant", "content": ""}], False, tools)
    except ChatTemplateError:
        return ""
    if whole == silent or not whole.startswith(before):
        return ""
    return decode(tokenizer, encode(tokenizer, whole[len(before) :].rstrip()))
