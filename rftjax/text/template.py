"""Chat templates of models: rendered to text, with thinking on or off, and what becomes of a history they rewrite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rftjax.errors import UserError
from rftjax.types import Message

# What templates call it: Qwen3 and SmolLM3 the first, DeepSeek V3.1 and Granite the second; gpt-oss takes an effort.
SWITCHES, EFFORT = ("enable_thinking", "thinking"), "reasoning_effort"
OTHER = {"on": "off", "off": "on", "low": "high", "medium": "high", "high": "low"}
ATTRIBUTE = "rftjax_chat"  # of a tokenizer, which transformers does not save with it
PARTS = "rftjax_parts"  # another one: a template, and whether it shows contents in parts only
QUESTION: tuple[Message, ...] = ({"role": "user", "content": "What is 2 + 2?"},)


class TextError(UserError):
    """Says that a text cannot be shown to the model."""


class ChatTemplateError(TextError):
    """Says that a chat template does not render a conversation."""


class Settings(NamedTuple):
    """What a template is given beside messages and tools, and whether sampled turns stay as they were sampled."""

    variables: dict[str, Any]
    kept: bool


def settle(tokenizer: Any, *, thinking: str = "template", history: str = "template") -> Any:
    """Returns the tokenizer with the settings that its template is rendered with from then on.

    Raises UserError where the template renders no `thinking` otherwise than its contrary.
    """
    kept = history == "kept"
    if thinking == "template":
        setattr(tokenizer, ATTRIBUTE, Settings({}, kept))
        return tokenizer
    rendered = []
    for value in (OTHER[thinking], thinking):
        setattr(tokenizer, ATTRIBUTE, Settings(_variables(value), kept))
        rendered.append(text(tokenizer, list(QUESTION), True, None))
    if rendered[0] == rendered[1]:
        raise UserError(
            f"chat.thinking={thinking!r}: the chat template renders a question as with {OTHER[thinking]!r}, so it takes"
            f" neither {' nor '.join(SWITCHES)} (on, off) nor {EFFORT} (low, medium, high) in that way; choose among"
            ' the others, or leave it at "template"'
        )
    return tokenizer


def _variables(thinking: str) -> dict[str, Any]:
    return (
        dict.fromkeys(SWITCHES, thinking == "on")
        if thinking in ("on", "off")
        else {EFFORT: thinking}
    )


def settings_of(tokenizer: Any) -> Settings:
    """Returns what `settle` gave a tokenizer."""
    return getattr(tokenizer, ATTRIBUTE, Settings({}, False))


def _rendered(
    tokenizer: Any, messages: Sequence[Message], generation_prompt: bool, tools: list[Any] | None
) -> str:
    return tokenizer.apply_chat_template(
        list(messages),
        tools=tools or None,
        add_generation_prompt=generation_prompt,
        tokenize=False,
        **settings_of(tokenizer).variables,
    )


def _wants_parts(tokenizer: Any) -> bool:
    """Says whether the template shows a content only as a list of parts, as of some models that also see; others would
    leave a text out without a word."""
    template, wants = getattr(tokenizer, PARTS, (None, False))
    if template != tokenizer.chat_template:
        asked, shown = str(QUESTION[0]["content"]), []
        for messages in (QUESTION, _in_parts(QUESTION)):
            try:
                said = _rendered(tokenizer, messages, True, None)
                # A part as Python or JSON writes it is not its text.
                shown.append(asked in said and "'type'" not in said and '"type"' not in said)
            except Exception:  # what it refuses is told where a task's conversation is rendered
                shown.append(False)
        wants = shown == [False, True]
        setattr(tokenizer, PARTS, (tokenizer.chat_template, wants))
    return wants


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def text(
    tokenizer: Any, messages: list[Message], generation_prompt: bool, tools: list[Any] | None
) -> str:
    """Returns a conversation as the template writes it; raises ChatTemplateError where it refuses."""
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "the tokenizer has no chat template, which rows with `messages` need;"
            " give rows with `prompt` (plain text) or a model that has one"
        )
    try:
        messages = _in_parts(messages) if _wants_parts(tokenizer) else messages
        return _rendered(tokenizer, messages, generation_prompt, tools)
    except Exception as error:  # a template raises what its author wrote
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ChatTemplateError(
            f"the chat template refuses a conversation of roles {roles:.200}:"
            f" {type(error).__name__}: {error}"
        ) from error
