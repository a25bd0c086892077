"""One request's way through the engine: its choices begin together, and their events arrive in one queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from rftjax.sampler.engine import SampledTurn
from rftjax.serving.requests import ChatRequest, Request
from rftjax.serving.turns import Recording, Single, Turn


class Exchange:
    """The choices of a request. Raises BadRequest, and leaves no row taken, where one of them cannot begin."""

    def __init__(self, desk: Single | Recording, asked: Request) -> None:
        self.desk, self.asked, self.turns = desk, asked, list[Turn]()
        self.began_s, self.first_s = time.monotonic(), 0.0
        self._left: set[int] = set()  # choices under way
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        try:
            for prompt in desk.prompts(asked):
                for index in range(asked.n or 1):
                    self._begin(prompt, index)
        except BaseException:
            self.give_up()
            raise

    def _begin(self, prompt: Any, index: int) -> None:
        at, tell = len(self.turns), self._teller()

        def heard(tokens: Any, logprobs: Any) -> None:
            self.first_s = self.first_s or time.monotonic()
            if self.asked.stream:  # else nobody sees it before the answer is whole
                tell(at, (tokens, logprobs))

        turn = self.desk.begin(self.asked, prompt, index, heard)
        self.turns.append(turn)
        self._left.add(at)
        turn.call.future.add_done_callback(lambda future: tell(at, future))

    def _teller(self) -> Callable[[int, Any], None]:
        loop, events = asyncio.get_running_loop(), self._events

        def tell(at: int, event: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (at, event))

        return tell

    async def events(self) -> AsyncIterator[tuple[int, str, int, bool]]:
        """Yields what is new of the choices: which one, its new text, the number of its first new token, and whether
        it is whole."""
        while self._left:
            at, event = await self._events.get()
            if at not in self._left:
                continue
            answer = self.turns[at].answer
            start = len(answer.tokens)
            if isinstance(event, tuple):
                yield at, answer.add(*event), start, False
            else:
                sampled: SampledTurn = event.result()
                text = answer.finish(sampled)
                self._left.discard(at)
                self.desk.finish(self.turns[at], sampled)
                yield at, text, start, True

    def give_up(self) -> None:
        """Frees the rows of choices that are not whole."""
        for at in self._left:
            self.desk.give_up(self.turns[at])
        self._left.clear()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each once."""
        return sum(len(turn.prompt) for turn in self.turns[:: self.asked.n or 1])

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answers, by now."""
        return sum(len(turn.answer.tokens) for turn in self.turns)

    def usage(self) -> dict[str, int]:
        """Returns the field `usage` of an answer."""
        counts = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": counts[0],
            "completion_tokens": counts[1],
            "total_tokens": sum(counts),
        }


class Shape:
    """Writes the objects of one answer: whole, or chunk by chunk."""

    def __init__(self, exchange: Exchange, name: str, number: str, created: int) -> None:
        self.exchange, self.asked = exchange, exchange.asked
        self.chat = isinstance(exchange.asked, ChatRequest)
        kind = "chat.completion" if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        self._head = {"id": f"{prefix}-{number}", "created": created, "model": name}
        self._kind = kind

    def whole(self) -> dict[str, Any]:
        """Returns the answer of a request that does not stream."""
        choices = [self._choice(at, turn) for at, turn in enumerate(self.exchange.turns)]
        found = {**self._head, "object": self._kind, "choices": choices}
        if self.chat and self.asked.return_token_ids:
            found["prompt_token_ids"] = self.exchange.turns[0].prompt
        return found | {"usage": self.exchange.usage()}

    def _choice(self, at: int, turn: Turn) -> dict[str, Any]:
        answer = turn.answer
        choice: dict[str, Any] = {"index": at, "finish_reason": answer.finish_reason}
        if self.chat:
            choice["message"] = answer.message | {"refusal": None}
        else:
            choice["text"] = answer.text
        choice["logprobs"] = self._logprobs(turn, 0)
        if self.asked.return_token_ids:
            choice["token_ids"] = answer.tokens
            if not self.chat:
                choice["prompt_token_ids"] = turn.prompt
        return choice

    def _logprobs(self, turn: Turn, start: int) -> dict[str, Any] | None:
        if not self.asked.asks_for_logprobs:
            return None
        answer = turn.answer
        return answer.chat_logprobs(start) if self.chat else answer.text_logprobs(start)

    def first(self) -> list[dict[str, Any]]:
        """Returns the chunks before any token: of a chat, each choice's role."""
        if not self.chat:
            return []
        chunks = []
        for at, turn in enumerate(self.exchange.turns):
            delta = {"role": "assistant", "content": ""}
            chunk = self._chunk(
                {"index": at, "delta": delta, "finish_reason": None, "logprobs": None}
            )
            if self.asked.return_token_ids:
                chunk["prompt_token_ids"] = turn.prompt
            chunks.append(chunk)
        return chunks

    def piece(self, at: int, text: str, start: int, whole: bool) -> list[dict[str, Any]]:
        """Returns the chunks of an event of `Exchange.events`."""
        turn = self.exchange.turns[at]
        answer = turn.answer
        choice: dict[str, Any] = {"index": at, "finish_reason": None}
        choice["logprobs"] = self._logprobs(turn, start)
        if self.asked.return_token_ids:
            choice["token_ids"] = answer.tokens[start:]
        if self.chat:
            delta: dict[str, Any] = {"content": text} if text else {}
            if whole and (calls := answer.message.get("tool_calls")):
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
            choice["delta"] = delta
        else:
            choice["text"] = text
        if whole:
            choice["finish_reason"] = answer.finish_reason
        return [self._chunk(choice)]

    def last(self) -> list[dict[str, Any]]:
        """Returns the chunk of the usage, where it was asked for."""
        options = self.asked.stream_options
        if options is None or not options.include_usage:
            return []
        return [self._chunk(None) | {"usage": self.exchange.usage()}]

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self._kind
        return {**self._head, "object": kind, "choices": [] if choice is None else [choice]}
