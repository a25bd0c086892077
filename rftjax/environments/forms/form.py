"""What the forms share: how observations become text, and errors of an answer that is no action."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

from rftjax.types import THINKS, Message, Task, answer_of
from rftjax.workers.plain import plain

Action = Callable[[str], Any]
Observe = Callable[[Any], str]


class NotAnAction(ValueError):
    """Says why the model's text is no action; it is told to the model."""


def text_of(observation: Any) -> str:
    """Returns an observation as text: a text as it is, a record with one text as that text, the rest as JSON."""
    if observation is None:
        return ""
    if isinstance(observation, str):
        return observation
    if callable(getattr(observation, "model_dump", None)):
        observation = observation.model_dump()
    elif dataclasses.is_dataclass(observation) and not isinstance(observation, type):
        observation = dataclasses.asdict(observation)
    if isinstance(observation, dict) and len(observation) == 1:
        (only,) = observation.values()
        if isinstance(only, str):
            return only
    return json.dumps(plain(observation), ensure_ascii=False)


def number_of(reward: Any) -> float:
    """Returns a reward as a number, 0 for None."""
    return 0.0 if reward is None else float(reward)


def said(message: Message) -> str:
    """Returns what the model's message says after its thinking, without white space around it."""
    return answer_of(str(message.get("content") or ""), begun=bool(message.get(THINKS))).strip()


def user(text: str) -> list[Message]:
    """Returns the message that shows a text to the model, none for an empty text."""
    return [{"role": "user", "content": text}] if text else []


def seed_of(task: Task, seed: int) -> int:
    """Returns the seed of an episode: the row's field `seed` where it is a whole number, else that of its group."""
    own = task.data.get("seed")
    return own if isinstance(own, int) and not isinstance(own, bool) else seed


def parameters(function: Any) -> list[str]:
    """Returns the names of a function's parameters, none where they cannot be known."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []
