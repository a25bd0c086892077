"""The decorator `reward_function`: messages may be given as dicts, and the result is an EvaluateResult."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluateResult, Message


def reward_function(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """Wraps a reward of messages, with or without arguments of the decorator."""
    if function is None:
        return reward_function

    def messages_of(arguments: dict[str, Any]) -> dict[str, Any]:
        given = arguments.get("messages")
        if isinstance(given, list):
            arguments["messages"] = [
                Message.model_validate(one) if isinstance(one, dict) else one for one in given
            ]
        return arguments

    parameters = inspect.signature(function)

    def bound(args: Any, kwargs: Any) -> tuple[Any, Any]:
        found = parameters.bind_partial(*args, **kwargs)
        found.arguments.update(messages_of(dict(found.arguments)))
        return found.args, found.kwargs

    @functools.wraps(function)
    async def called_async(*args: Any, **kwargs: Any) -> EvaluateResult:
        args, kwargs = bound(args, kwargs)
        return EvaluateResult.model_validate(await function(*args, **kwargs))

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> EvaluateResult:
        args, kwargs = bound(args, kwargs)
        return EvaluateResult.model_validate(function(*args, **kwargs))

    return called_async if inspect.iscoroutinefunction(function) else called
