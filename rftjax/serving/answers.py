"""What was sampled as text, calls and log-probabilities in OpenAI's formats, whole or as it comes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection
from typing import Any

from rftjax.environments.calls import STARTS, before_calls, tool_calls
from rftjax.sampler.engine import SampledTurn
from rftjax.text import chat
from rftjax.types import THINKS, Message


class Answer:
    """One choice: takes tokens as they are sampled and says what can be shown of them by then.

    `tools` are the names of those that the model was shown: calls of them are read in the format of any template.
    `offset` is the number of tokens before the answer, which makes the ids of calls unlike those of other turns. Where
    the prompt `begun` the thinking, the answer has no call before that ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_tokens: tuple[int, ...],
        stop_strings: tuple[str, ...] = (),
        tools: Collection[str] = (),
        offset: int = 0,
        begun: bool = False,
    ) -> None:
        self.tokenizer, self.stop_tokens, self.stop_strings = tokenizer, stop_tokens, stop_strings
        self.tools, self.offset, self.begun = tools, offset, begun
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.shown = ""
        self.text = ""  # the whole answer, once it is there
        self.message: Message = {}
        self.finish_reason = ""

    def add(self, tokens: list[int], logprobs: list[float]) -> str:
        """Takes tokens of an answer that goes on; returns the text that can be shown beside what was."""
        self.tokens += tokens
        self.logprobs += logprobs
        text = self._decoded().rstrip("\ufffd")  # half a character is a replacement at the end
        held = (*self.stop_strings, *STARTS) if self.tools else self.stop_strings
        if self.tools:
            text = before_calls(text, begun=self.begun)
        text = text[: len(text) - max((_overlap(text, one) for one in held), default=0)]
        # White space before a call is not shown.
        return self._show(text.rstrip() if self.tools else text)

    def finish(self, turn: SampledTurn) -> str:
        """Takes the whole turn; returns the text that was not shown yet. Sets `message` and `finish_reason`."""
        self.tokens, self.logprobs = list(turn.tokens), list(turn.logprobs)
        self.text = self._decoded()
        self.finish_reason = "stop" if turn.stopped else "length"
        content: str | None = self.text
        calls = self._calls() if self.tools and turn.stopped else []
        self.message = {"role": "assistant", "content": content}
        if calls:
            content = before_calls(self.text, begun=self.begun).rstrip() or None
            self.message |= {"content": content, "tool_calls": calls}
            self.finish_reason = "tool_calls"
        return self._show(content or "")

    def _decoded(self) -> str:
        return chat.decode(
            self.tokenizer,
            self.tokens,
            stop_tokens=self.stop_tokens,
            stop_strings=self.stop_strings,
        )

    def _show(self, text: str) -> str:
        # A decoder may rewrite its last characters once more tokens are there: what was shown stays.
        new = text[len(self.shown) :] if text.startswith(self.shown) else ""
        self.shown += new
        return new

    def _calls(self) -> list[dict[str, Any]]:
        """Returns the calls of an answer, none where one of them is malformed: the text is the answer then."""
        found = tool_calls({"content": self.text, THINKS: self.begun}, self.tools)
        if any("problem" in call for call in found):
            return []
        return [
            {
                "id": self._id(index),
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                },
            }
            for index, call in enumerate(found)
        ]

    def _id(self, index: int) -> str:
        seen = f"{self.offset} {index} {self.tokens}"
        return f"call_{hashlib.blake2b(seen.encode(), digest_size=12).hexdigest()}"

    def chat_logprobs(self, start: int = 0) -> dict[str, Any]:
        """Returns the field `logprobs` of a choice of chat completions, from token number `start` on."""
        pairs = zip(self.tokens[start:], self.logprobs[start:], strict=True)
        content = []
        for token, logprob in pairs:
            text = chat.show(self.tokenizer, [token])
            entry = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
            content.append(entry | {"top_logprobs": []})
        return {"content": content, "refusal": None}

    def text_logprobs(self, start: int = 0) -> dict[str, Any]:
        """Returns the field `logprobs` of a choice of completions, from token number `start` on."""
        texts = [chat.show(self.tokenizer, [token]) for token in self.tokens]
        ends = [0]
        for text in texts:
            ends.append(ends[-1] + len(text))
        return {
            "tokens": texts[start:],
            "token_logprobs": self.logprobs[start:],
            "top_logprobs": None,
            "text_offset": ends[start:-1],
        }


def said(message: Message) -> tuple[str, str]:
    """Returns a key that an assistant's message has as it was answered and as a client sends it back: its text
    without white space around it, and its calls by name and arguments."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments or "{}", strict=False)
        calls.append([function["name"], arguments])
    text = (message.get("content") or "").strip()
    return text, json.dumps(calls, sort_keys=True) if calls else ""


def with_text_arguments(message: Message) -> Message:
    """Returns a message whose calls have their arguments as text, as clients send and read them."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": given
                if isinstance(given := call["function"]["arguments"], str)
                else json.dumps(given, ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls") or []
    ]
    return message | {"tool_calls": calls} if calls else message


def _overlap(text: str, stop: str) -> int:
    """Returns how many of the text's last characters may begin a stop string."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
