"""Requests in OpenAI's formats: what is understood, and a reason for everything else."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Literal

import pydantic
from pydantic import Field

from rftjax.errors import UserError
from rftjax.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_CHOICES, MAX_STOPS = 128, 16
# What a request may say although nothing follows from it.
_IDLE = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key")
_IDLE += ("safety_identifier",)
# Values of what this server does not do that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
    "functions": (None, []),
    "function_call": (None, "auto", "none"),
    "modalities": (None, ["text"]),
    "top_logprobs": (None, 0),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}


class BadRequest(UserError):
    """A request that cannot be answered: the HTTP status, the field, and OpenAI's code where there is one."""

    def __init__(self, text: str, *, status: int = 400, param: str = "", code: str = "") -> None:
        super().__init__(text)
        self.status, self.param, self.code = status, param, code


class _StreamOptions(pydantic.BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: nothing is padded here


class Request(pydantic.BaseModel):
    """What chat completions and completions have in common; unset numbers are the server's to choose."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    return_token_ids: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, each once."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(text for text in given if text))

    @property
    def limit(self) -> int:
        """The most tokens that an answer may have, 0 where the request does not say."""
        return self.max_tokens or 0

    @property
    def asks_for_logprobs(self) -> bool:
        """Whether answers come with log-probabilities."""
        return False


class ChatRequest(Request):
    """A request of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int:
        """The most tokens that an answer may have, 0 where the request does not say."""
        return self.max_completion_tokens or self.max_tokens or 0

    @property
    def asks_for_logprobs(self) -> bool:
        """Whether answers come with log-probabilities."""
        return bool(self.logprobs)

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown."""
        return [] if self.tool_choice == "none" else self.tools or []


class CompletionRequest(Request):
    """A request of /v1/completions; a prompt is a text or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=0)

    @property
    def asks_for_logprobs(self) -> bool:
        """Whether answers come with log-probabilities."""
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(one) for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


def parse(body: bytes, kind: type[Request]) -> Any:
    """Returns a request of a kind; raises BadRequest, which names the field, for everything that is none."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON ({type(error).__name__}: {error})") from None
    if not isinstance(given, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(given).__name__}")
    given = {name: value for name, value in given.items() if name not in _IDLE}
    for name, neutral in _NEUTRAL.items():
        if name in given:
            _check_neutral(name, given[name], neutral)
            if name not in kind.model_fields:
                del given[name]
    try:
        found = kind.model_validate(given)
    except pydantic.ValidationError as error:
        raise _explained(error, kind) from None
    if len(found.stops) > MAX_STOPS:
        raise BadRequest(f"stop: {len(found.stops)} texts, at most {MAX_STOPS}", param="stop")
    if isinstance(found, ChatRequest):
        found.messages = [_message(index, one) for index, one in enumerate(found.messages)]
        for index, tool in enumerate(found.tools or []):
            _check_tool(index, tool)
    return found


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    # 0 == False, and True == 1: of those only the type that is meant counts.
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
        return
    why = {
        "response_format": "constrained decoding is not supported; describe the format in a message, and check it",
        "tool_choice": "a call cannot be forced; leave it out, or give 'auto' or 'none'",
        "top_logprobs": "only the log-probabilities of sampled tokens are kept; give 0 with logprobs=true",
    }.get(name, "is not supported here; leave it out")
    raise BadRequest(f"{name}={_short(value)}: {why}", param=name, code="unsupported_value")


def _explained(error: pydantic.ValidationError, kind: type[Request]) -> BadRequest:
    texts, param = [], ""
    for found in error.errors(include_url=False)[:4]:
        place = ".".join(map(str, found["loc"]))
        param = param or str(found["loc"][0])
        if found["type"] == "extra_forbidden":
            texts.append(
                f"{place}: is not supported here; leave it out"
                f" (there is {', '.join(sorted(kind.model_fields))})"
            )
        elif found["type"] == "missing":
            texts.append(f"{place}: must be given")
        else:
            texts.append(f"{place}={_short(found['input'])}: {found['msg']}")
    if kind is CompletionRequest and param == "logprobs":
        texts = ["logprobs: must be 0, the log-probabilities of sampled tokens; no others are kept"]
    return BadRequest("; ".join(texts), param=param)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _message(index: int, given: dict[str, Any]) -> Message:
    """Returns a message as a chat template takes it: text content, arguments of calls as objects."""
    place = f"messages[{index}]"
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise BadRequest(
            f"{place}.role={_short(role)}: must be one of {', '.join(ROLES)}", param="messages"
        )
    if isinstance(content, list):
        content = "".join(_part(f"{place}.content", part) for part in content)
    elif content is None and role == "assistant":
        content = ""
    elif not isinstance(content, str):
        raise BadRequest(
            f"{place}.content={_short(content)}: must be a text, or a list of parts of type text",
            param="messages",
        )
    message: Message = {"role": "system" if role == "developer" else role, "content": content}
    message |= {
        name: given[name]
        for name in ("name", "tool_call_id", "reasoning_content")
        if isinstance(given.get(name), str)
    }
    calls = given.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise BadRequest(f"{place}.tool_calls: must be a list", param="messages")
        message["tool_calls"] = [
            _call(f"{place}.tool_calls[{at}]", c) for at, c in enumerate(calls)
        ]
    return message


def _part(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
    if kind not in ("text", "refusal", "input_text", "output_text") or not isinstance(text, str):
        raise BadRequest(
            f"{place}: holds a part of type {kind!r}; the model reads text alone", param="messages"
        )
    return text


def _call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise BadRequest(
            f'{place}: must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}',
            param="messages",
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # else the template shows the text
            arguments = json.loads(arguments or "{}", strict=False)
    return {
        **({"id": call["id"]} if isinstance(call.get("id"), str) else {}),
        "type": "function",
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }


def _check_tool(index: int, tool: dict[str, Any]) -> None:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise BadRequest(
            f"tools[{index}]: must be of type function, with a field function", param="tools"
        )
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRequest(f"tools[{index}].function.name: must be a text", param="tools")
