"""From a request to turns of the engine and back: a request for itself, or one of a rollout whose turns are kept.

A rollout's turns become token sequences. A request whose messages go on from a sequence's last turn is appended to it,
in the same cached row; any other begins a further sequence. What was sampled is never encoded again: an assistant's
message that comes back stands for the ids that were sampled, wherever it stands in the history.
"""

from __future__ import annotations

import array
import dataclasses
import zlib
from typing import Any

from rftjax import types
from rftjax.sampler.engine import Key, SampledTurn, noise_key
from rftjax.serving.answers import Answer, said
from rftjax.serving.requests import BadRequest, ChatRequest, CompletionRequest, Request
from rftjax.serving.service import Call, Listener, Service
from rftjax.text import chat
from rftjax.types import THINKS, Message, SamplingParams, Task

SERVED = 2**31 - 1  # the noise stream of requests that belong to no rollout
MARK = 16  # tokens at a prompt's end that hold what begins thinking, and white space behind it
SEQUENCES = 2**15  # numbers of sequences within a noise key


@dataclasses.dataclass(frozen=True)
class Model:
    """What is served: the name, the tokenizer, and how the engine's turns end."""

    name: str
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]
    max_length: int


@dataclasses.dataclass(eq=False)
class Turn:
    """A choice of a request: what the engine samples, and the answer that it becomes."""

    prompt: list[int]  # all ids before the answer
    call: Call
    answer: Answer
    place: Any = None  # of a rollout: the thread that it belongs to


class Single:
    """Answers requests that have nothing to do with each other; each has a row until it is answered."""

    def __init__(self, service: Service, model: Model, params: SamplingParams) -> None:
        self.service, self.model, self.params = service, model, params
        self._drawn = 0

    def begin(self, asked: Request, prompt: list[int], index: int, listener: Listener) -> Turn:
        """Starts choice `index` of a request whose prompt has these ids."""
        seed = asked.seed
        if seed is None:
            self._drawn += 1
            seed = self._drawn
        draw = (seed ^ (seed >> 31) ^ (seed >> 62)) & (2**31 - 1)
        # Seeds that are given and those that are not have noise of their own.
        noise = noise_key(SERVED - (asked.seed is None), draw, index)
        budget = budget_of(asked, len(prompt), self.model, self.model.max_length)
        call = self.service.open(
            prompt,
            budget,
            noise,
            params_of(asked, self.params),
            find_stop=stops_of(asked, self.model),
            listener=listener,
        )
        return Turn(prompt, call, answer_to(asked, self.model, prompt))

    def prompts(self, asked: Request) -> list[list[int]]:
        """Returns the ids of each prompt of a request."""
        if isinstance(asked, ChatRequest):
            return [render(self.model, asked.messages, asked.shown_tools)[0]]
        assert isinstance(asked, CompletionRequest)
        return [plain(self.model, prompt) for prompt in asked.prompts]

    def finish(self, turn: Turn, sampled: SampledTurn) -> None:
        """Frees the row of an answered choice; it is there for a request that goes on from the answer."""
        self.service.close(turn.call.key, keep=True)

    def give_up(self, turn: Turn) -> None:
        """Frees the row of a choice that nobody waits for any more."""
        self.service.close(turn.call.key)


@dataclasses.dataclass(eq=False)
class _Sampled:
    """A turn of a rollout that was answered, as far as later requests go on from it."""

    before: list[Message]
    message: Message  # with the text as it was sampled
    tokens: list[int]
    last_token: int


@dataclasses.dataclass(eq=False)
class _Thread:
    """One token sequence of a rollout, with the conversation that it is of."""

    sequence: types.Sequence
    messages: list[Message]
    tools: list[Any]
    text: str  # that the last turn goes on from, as the template rendered it
    sequence_number: int
    key: Key | None = None  # of the engine's conversation, while that is open
    last_token: int = -1
    sampled: list[int] = dataclasses.field(default_factory=list)  # where in `messages`
    busy: bool = False
    begun: int = 0  # the number of its last request


class Recording:
    """The calls of one rollout, which become its trajectory; all of it runs on one thread.

    `noise` is the rollout's stream, draw and sample: an answer depends on these, on what is before it and on how often
    that was asked, not on the order in which parallel calls arrive.
    """

    def __init__(
        self,
        service: Service,
        model: Model,
        params: SamplingParams,
        noise: tuple[int, int, int],
        *,
        policy_version: int = 0,
        also: float = 1.0,
    ) -> None:
        self.service, self.model, self.params, self.noise = service, model, params, noise
        self.policy_version, self._also = policy_version, also
        self.threads: list[_Thread] = []
        self.turns = 0  # answered or under way
        self.refused = ""  # turns or length: the limit that a request ran into
        self.over = self._cut = False
        self._answers: dict[tuple[str, str], list[_Sampled]] = {}
        self._numbers: dict[int, int] = {}

    def check(self, asked: Request) -> None:
        """Raises BadRequest where a request asks for another distribution than the spec's, or for too many turns."""
        if self.over:
            raise BadRequest("this rollout is over", status=410, code="rollout_over")
        if self._cut:
            raise BadRequest(
                f"rollout.truncated_turns={self.params.truncated_turns!r}: a token limit cut an answer, which ends the"
                " rollout",
                code="rollout_over",
            )
        wanted, own = asked.temperature, self.params.temperature
        if wanted is not None and wanted not in (own, self._also):
            raise BadRequest(
                f"temperature={wanted}: the run samples at sampler.temperature={own}, and trains on that distribution;"
                " leave it out",
                param="temperature",
            )
        filters = (
            ("top_p", asked.top_p, self.params.top_p, (1.0,)),
            ("top_k", asked.top_k, self.params.top_k, (0, -1)),
        )
        for name, given, set_, off in filters:
            if given is not None and given != set_ and not (given in off and set_ in off):
                raise BadRequest(
                    f"{name}={given}: the run samples with sampler.{name}={set_}, and trains on that distribution;"
                    " leave it out",
                    param=name,
                )
        if asked.seed is not None:
            raise BadRequest(
                "seed: the run draws the noise of its rollouts; leave it out", param="seed"
            )
        count = (asked.n or 1) * (len(asked.prompts) if isinstance(asked, CompletionRequest) else 1)
        if self.turns + count > self.params.max_turns:
            self.refused = self.refused or "turns"
            raise BadRequest(
                f"rollout.max_turns={self.params.max_turns}: the rollout has {self.turns} answers, those under way"
                f" counted, and {count} more asked for; raise it where an agent needs more",
                code="too_many_turns",
            )

    def prompts(self, asked: Request) -> list[Any]:
        """Returns what each prompt of a request goes on from."""
        self.check(asked)
        if isinstance(asked, ChatRequest):
            return [self._place(asked.messages, asked.shown_tools, alone=(asked.n or 1) > 1)]
        assert isinstance(asked, CompletionRequest)
        alone = (asked.n or 1) > 1
        return [self._place_plain(prompt, alone=alone) for prompt in asked.prompts]

    def begin(self, asked: Request, place: Any, index: int, listener: Listener) -> Turn:
        """Starts choice `index` of a request at a place that `prompts` returned."""
        thread, tokens, messages, text = place
        if index:  # a further choice has a sequence of its own
            thread, tokens = self._new(list(thread.sequence.tokens), thread.tools), []
        before = [*thread.sequence.tokens, *tokens]
        try:
            budget = budget_of(asked, len(before), self.model, self.params.max_new_tokens)
        except BadRequest:
            self.refused = self.refused or "length"
            if not thread.sampled and thread in self.threads:
                self.threads.remove(thread)
            raise
        self.turns += 1
        thread.begun = self.turns
        noise = noise_key(*self.noise, sequence=thread.sequence_number)
        settings = {"find_stop": stops_of(asked, self.model), "listener": listener}
        if thread.key is not None:
            call = self.service.extend(thread.key, tokens, budget, **settings)
        else:
            call = self.service.open(before, budget, noise, self.params, **settings)
        thread.busy, thread.key = True, call.key
        turn = Turn(before, call, answer_to(asked, self.model, before))
        turn.place = (thread, tokens, messages, text)
        return turn

    def finish(self, turn: Turn, sampled: SampledTurn) -> None:
        """Keeps an answered choice: its ids, its log-probabilities and the message that stands for it."""
        thread, tokens, messages, text = turn.place
        if self.over:
            return
        if not sampled.stopped and self.params.truncated_turns != "environment":
            self._cut, self.refused = True, "length"
        thread.sequence.extend(tokens)
        thread.sequence.extend(sampled.tokens, sampled.logprobs, self.policy_version)
        thread.sequence.experts = sampled.experts
        message: Message = {"role": "assistant", "content": turn.answer.text}
        marks = {THINKS: types.begins_thinking(text), "truncated": not sampled.stopped}
        kept = message | {mark: True for mark, true in marks.items() if true}
        last = _Sampled(list(messages), message, list(sampled.tokens), sampled.stop_token)
        self._answers.setdefault(said(turn.answer.message), []).append(last)
        thread.sampled.append(len(messages))
        thread.messages, thread.text = [*messages, kept], text
        thread.last_token, thread.busy = sampled.stop_token, False

    def give_up(self, turn: Turn) -> None:
        """Forgets a choice that nobody waits for any more: asked again, it is sampled as it would have been."""
        thread, *_ = turn.place
        self.service.close(turn.call.key)
        thread.busy, thread.key = False, None
        self.turns -= 1
        if not thread.sampled and thread in self.threads:
            self.threads.remove(thread)
            self._numbers[thread.sequence_number] -= 1

    def close(self) -> None:
        """Frees the rows; later requests are told that the rollout is over."""
        self.over = True
        for thread in self.threads:
            if thread.key is not None:
                self.service.close(thread.key)
                thread.key = None

    @property
    def answered(self) -> list[_Thread]:
        """The threads with an answer, the one that was asked last at the end."""
        return sorted((one for one in self.threads if one.sampled), key=lambda one: one.begun)

    def _place(self, messages: list[Message], tools: list[Any], *, alone: bool) -> Any:
        """Returns where a conversation goes on: thread, new ids, all messages and the text before the answer."""
        found = self._matched(messages)
        messages = [
            found[at].message if at in found else message for at, message in enumerate(messages)
        ]
        tip = None if alone else self._tip(messages, tools)
        if tip is not None:
            history, new = tip.messages, messages[len(tip.messages) :]
            try:
                tokens, text = chat.follow(
                    self.model.tokenizer,
                    tip.text,
                    _plain(history),
                    new,
                    last_token=tip.last_token,
                    tools=tools or None,
                    most=self.model.max_length,
                )
                return tip, tokens, [*history, *new], text
            except chat.Rewriting:
                pass
            except chat.TextError as error:
                raise self._refused(error) from None
        try:
            tokens, text = self._replayed(messages, found, tools)
        except chat.TextError as error:
            raise self._refused(error) from None
        return self._new(tokens, tools), [], messages, text

    def _refused(self, error: chat.TextError) -> BadRequest:
        if isinstance(error, chat.TooLong):
            self.refused = self.refused or "length"
        return text_refused(error)

    def _place_plain(self, prompt: str | list[int], *, alone: bool) -> Any:
        """Returns where a plain prompt goes on: in the sequence that it begins with, else in one of its own."""
        for thread in [] if alone else self.threads:
            whole = thread.sequence.tokens
            answer = thread.messages[-1] if thread.sampled else None
            if answer is None or thread.busy or len(thread.messages) != 2:
                continue
            if isinstance(prompt, str):
                start = f"{thread.text}{answer['content']}"
                rest = prompt.removeprefix(start) if prompt.startswith(start) else ""
                tokens = chat.encode(self.model.tokenizer, rest) if rest else []
            else:
                tokens = prompt[len(whole) :] if prompt[: len(whole)] == whole else []
            if tokens:
                return thread, tokens, [_asked(self.model, prompt)], _shown(self.model, prompt)
        tokens = plain(self.model, prompt)
        thread = self._new(tokens, [])
        return thread, [], [_asked(self.model, prompt)], _shown(self.model, prompt)

    def _new(self, tokens: list[int], tools: list[Any]) -> _Thread:
        # By its beginning and how many there were of it, so that parallel calls draw the same noise in any order.
        number = zlib.crc32(array.array("i", tokens).tobytes()) % SEQUENCES
        while self._numbers.get(number, 0):
            number = (number + 1) % SEQUENCES
        self._numbers[number] = 1
        thread = _Thread(types.Sequence(), [], tools, "", number)
        thread.sequence.extend(tokens)
        self.threads.append(thread)
        return thread

    def _matched(self, messages: list[Message]) -> dict[int, _Sampled]:
        """Returns the sampled turns that a history holds, by their place."""
        found: dict[int, _Sampled] = {}
        history: list[Message] = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                same = self._answers.get(said(message), [])
                if same:
                    exact = [one for one in same if _plain(one.before) == _plain(history)]
                    found[at] = (exact or same)[-1]
            history.append(found[at].message if at in found else message)
        return found

    def _tip(self, messages: list[Message], tools: list[Any]) -> _Thread | None:
        """Returns a thread whose whole conversation these messages go on from."""
        for thread in self.threads:
            count = len(thread.messages)
            if (
                thread.sampled
                and not thread.busy
                and thread.tools == tools
                and count < len(messages)
                and messages[:count] == _plain(thread.messages)
            ):
                return thread
        return None

    def _replayed(
        self, messages: list[Message], found: dict[int, _Sampled], tools: list[Any]
    ) -> tuple[list[int], str]:
        """Returns the ids of a conversation, sampled turns as they were sampled, and its text."""
        tokenizer, places = self.model.tokenizer, sorted(found)
        if places:
            try:
                ids, text = render(self.model, messages[: places[0]], tools, checked=False)
                for at, end in zip(places, [*places[1:], len(messages)], strict=True):
                    ids = ids + found[at].tokens
                    more, text = chat.follow(
                        tokenizer,
                        text,
                        messages[: at + 1],
                        messages[at + 1 : end],
                        last_token=found[at].last_token,
                        tools=tools or None,
                        most=self.model.max_length,
                    )
                    ids = ids + more
                return ids, text
            except chat.Rewriting:
                pass
        return render(self.model, messages, tools, checked=False)


def render(
    model: Model, messages: list[Message], tools: list[Any], *, checked: bool = True
) -> tuple[list[int], str]:
    """Returns the ids and the text of a conversation up to the answer; raises BadRequest, or TextError where it is not
    `checked`."""
    try:
        text = chat.prompt_text(model.tokenizer, Task("", messages), tools=tools)
        return chat.encode(model.tokenizer, text, model.max_length), text
    except chat.TextError as error:
        if not checked:
            raise
        raise text_refused(error) from None


def plain(model: Model, prompt: str | list[int]) -> list[int]:
    """Returns the ids of a plain prompt; raises BadRequest where it has none, or some that the model does not know."""
    if isinstance(prompt, str):
        try:
            ids = chat.encode(model.tokenizer, prompt, model.max_length, special=True)
        except chat.TextError as error:
            raise text_refused(error) from None
    else:
        ids = prompt
        vocabulary = len(model.tokenizer)
        wrong = [one for one in ids if not 0 <= one < vocabulary]
        if wrong:
            raise BadRequest(
                f"prompt: token id {wrong[0]} is none of the {vocabulary} of the tokenizer",
                param="prompt",
            )
    if not ids:
        raise BadRequest("prompt: has no tokens", param="prompt")
    return ids


def text_refused(error: chat.TextError) -> BadRequest:
    """Returns what a client is told of a text that the model cannot be shown."""
    code = "context_length_exceeded" if isinstance(error, chat.TooLong) else ""
    return BadRequest(str(error), param="messages", code=code)


def budget_of(asked: Request, count: int, model: Model, most: int) -> int:
    """Returns how many tokens an answer may have behind `count`; raises BadRequest where there is no room."""
    room = model.max_length - count
    if room < 1:
        raise BadRequest(
            f"rollout.max_length={model.max_length}: the prompt has {count} tokens and leaves no room for an answer;"
            " shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    return min(asked.limit or most, most, room)


def params_of(asked: Request, own: SamplingParams) -> SamplingParams:
    """Returns the sampling settings of a request, the server's where it does not say."""
    chosen = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(asked, name)) is not None
    }
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    return dataclasses.replace(own, **chosen)


def stops_of(asked: Request, model: Model) -> chat.StopStrings | None:
    """Returns what finds a request's own stop strings."""
    return chat.StopStrings(model.tokenizer, asked.stops) if asked.stops else None


def answer_to(asked: Request, model: Model, prompt: list[int]) -> Answer:
    """Returns what takes the tokens of an answer to these ids."""
    return Answer(
        model.tokenizer,
        stop_tokens=model.stop_tokens,
        stop_strings=(*model.stop_strings, *asked.stops),
        tools=[tool["function"]["name"] for tool in asked.shown_tools]
        if isinstance(asked, ChatRequest)
        else (),
        offset=len(prompt),
        begun=types.begins_thinking(chat.show(model.tokenizer, prompt[-MARK:])),
    )


def _plain(messages: list[Message]) -> list[Message]:
    """Returns messages without the marks of turns, which no template is shown."""
    return [
        {name: value for name, value in message.items() if name not in ("truncated", THINKS)}
        for message in messages
    ]


def _shown(model: Model, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else chat.show(model.tokenizer, prompt)


def _asked(model: Model, prompt: str | list[int]) -> Message:
    return {"role": "user", "content": _shown(model, prompt)}
