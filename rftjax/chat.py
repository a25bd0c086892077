"""Messages to tokens and back: what was sampled stays, the template writes what is around it.

`tokenizer` is a fast tokenizer of the transformers library throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rftjax.errors import UserError
from rftjax.types import Message, Task

MARK = "8c1f0e5d7a"  # stands for an assistant's content while the text behind it is looked up


class ChatTemplateError(UserError):
    """Says that a chat template does not render a conversation, or rewrites its past."""


def _text(
    tokenizer: Any, messages: list[Message], generation_prompt: bool, tools: list[Any] | None
) -> str:
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "the tokenizer has no chat template, which rows with `messages` need;"
            " give rows with `prompt` (plain text) or a model that has one"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=generation_prompt, tokenize=False
        )
    except Exception as error:  # a template raises what its author wrote
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ChatTemplateError(
            f"the chat template refuses a conversation of roles {roles}:"
            f" {type(error).__name__}: {error}"
        ) from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    # The template writes beginning-of-sequence tokens itself.
    return list(tokenizer.encode(text, add_special_tokens=False))


def render(
    tokenizer: Any,
    messages: list[Message],
    *,
    generation_prompt: bool,
    tools: list[Any] | None = None,
) -> list[int]:
    """Returns the ids of a conversation; `generation_prompt` opens the assistant's next turn."""
    return _encode(tokenizer, _text(tokenizer, messages, generation_prompt, tools))


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text without a template, with the tokenizer's own special tokens."""
    return list(tokenizer.encode(text))


def prompt(
    tokenizer: Any,
    task: Task,
    messages: list[Message] | None = None,
    *,
    tools: list[Any] | None = None,
) -> list[int]:
    """Returns the ids that the first turn of a task goes on from; `messages` are more than the task's own."""
    if task.prompt is not None:
        return encode_plain(tokenizer, task.prompt)
    return render(tokenizer, messages or task.messages, generation_prompt=True, tools=tools)


def prompts(
    tokenizer: Any, tasks: Sequence[Task], *, tools: list[Any] | None = None
) -> list[list[int]]:
    """Returns what `prompt` does of many tasks, in half the time: the tokenizer takes them all at once."""
    found: list[list[int]] = [[]] * len(tasks)
    for plain in (True, False):
        chosen = [index for index, task in enumerate(tasks) if (task.prompt is not None) == plain]
        texts = [
            task.prompt if plain else _text(tokenizer, task.messages, True, tools)
            for task in map(tasks.__getitem__, chosen)
        ]
        if texts:
            ids = tokenizer(texts, add_special_tokens=plain)["input_ids"]
            for index, one in zip(chosen, ids, strict=True):
                found[index] = list(one)
    return found


def decode(
    tokenizer: Any, ids: list[int], *, stop_tokens: tuple[int, ...] = (), keep_special: bool = False
) -> str:
    """Returns a turn's text without the stop token at its end; other special tokens may be kept."""
    ids = list(ids)
    if ids and ids[-1] in (*stop_tokens, tokenizer.eos_token_id):
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=not keep_special)


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
    of turn is then among the returned ids). Raises ChatTemplateError where the template rewrites
    what came before; a caller that would rather split starts a new sequence with `render` then.
    White space around a turn's content is not compared.
    """
    reason = rewriting(tokenizer, messages, new_messages, tools=tools)
    if reason:
        raise ChatTemplateError(reason)
    marked = [*messages[:-1], {"role": "assistant", "content": MARK}]
    end = _behind_mark(_text(tokenizer, marked, False, tools))
    suffix = _behind_mark(_text(tokenizer, [*marked, *new_messages], True, tools))
    ids, end_ids = _encode(tokenizer, suffix), _encode(tokenizer, end)
    if last_token < 0 or not ids:
        return ids
    # Encoded together and cut, so that the rest is encoded as inside a text and not as its start.
    if ids[0] == last_token:
        return ids[1:]
    same_end = bool(end_ids) and end_ids[0] == ids[0]
    if same_end and _is_special(tokenizer, ids[0]) and _is_special(tokenizer, last_token):
        return ids[1:]  # the stop token that was sampled stands in the place of the template's
    stop = tokenizer.decode([last_token], skip_special_tokens=False)
    if stop and end.startswith(stop) and suffix.startswith(stop):
        return _encode(tokenizer, suffix.removeprefix(stop))
    return ids


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
    marked = [*messages[:-1], {"role": "assistant", "content": MARK}, *new_messages]
    suffix = _behind_mark(_text(tokenizer, marked, True, tools))
    content = str(messages[-1].get("content") or "")
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
        raise ChatTemplateError("the chat template does not render an assistant's content once")
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


def is_prefix_stable(tokenizer: Any) -> bool:
    """Returns whether each turn of a sample conversation renders as a prefix of the next."""
    return not instability(tokenizer)
