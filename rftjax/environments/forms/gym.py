"""Gymnasium's form: `reset(seed=)`, and `step(action)` with observation, reward, terminated, truncated, info.

What the model sees is a text observation, what `render()` returns as text (coloured parts in brackets), or the
observation as JSON. What it says is the action where the space is one of texts or unknown; where actions are numbered,
its last whole number; else it is read as JSON.
"""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

from rftjax.environments.forms.form import (
    Action,
    NotAnAction,
    Observe,
    number_of,
    parameters,
    said,
    seed_of,
    text_of,
    user,
)
from rftjax.errors import UserError
from rftjax.types import Message, Task, Turn
from rftjax.workers.plain import plain

_NUMBER = re.compile(r"-?\d+")
_COLOURED = re.compile(r"\x1b\[[\d;]*m(.*?)\x1b\[0?m", re.DOTALL)


def matches(found: Any) -> bool:
    """Says whether an object or class is such an environment: its `reset` takes a seed, and it steps."""
    return "seed" in parameters(getattr(found, "reset", None)) and callable(
        getattr(found, "step", None)
    )


def make(name: str, field: str) -> Any:
    """Returns an environment by its id, which renders texts where it can."""
    try:
        package = importlib.import_module("gymnasium")
    except ImportError as error:
        raise UserError(
            f"{field}='gymnasium:{name}': needs the package gymnasium: pip install gymnasium ({error})"
        ) from None
    try:
        made = package.make(name)
        if "ansi" in made.metadata.get("render_modes", ()):
            made.close()
            made = package.make(name, render_mode="ansi")
    except Exception as error:
        raise UserError(
            f"{field}='gymnasium:{name}': must be an id that gymnasium.make takes, but {error}; "
            "write a file that makes the environment where it needs arguments or another package"
        ) from None
    return made


class Episode:
    """One episode; `action` and `observe` are the user's own rules, None for those above."""

    def __init__(
        self, made: Any, task: Task, seed: int, action: Action | None, observe: Observe | None
    ):
        self._made, self._task, self._seed = made, task, seed
        self._action, self._observe = action, observe

    def reset(self) -> list[Message]:
        """Begins with the seed, and the row's field `options` where it has one."""
        options = self._task.data.get("options")
        own = {"options": options} if isinstance(options, dict) else {}
        observation, _ = self._made.reset(seed=seed_of(self._task, self._seed), **own)
        return user(self._shown(observation))

    def step(self, message: Message) -> Turn:
        """Takes the action; a text that is none is told and changes nothing."""
        try:
            action = self._read(said(message))
        except ValueError as error:
            return Turn(user(f"Error: {error}"))
        observation, reward, terminated, truncated, info = self._made.step(action)
        done = bool(terminated) or bool(truncated)
        shown = user(self._shown(observation)) or ([] if done else user("(nothing to see)"))
        return Turn(shown, done, number_of(reward), plain(info))

    def close(self) -> None:
        self._made.close()

    def _shown(self, observation: Any) -> str:
        if self._observe is not None:
            return self._observe(observation)
        if not isinstance(observation, str) and getattr(self._made, "render_mode", "") == "ansi":
            return _COLOURED.sub(r"[\1]", str(self._made.render())).strip()
        return text_of(observation)

    def _read(self, text: str) -> Any:
        if self._action is not None:
            return self._action(text)
        space = getattr(self._made, "action_space", None)
        count, first = getattr(space, "n", None), int(getattr(space, "start", 0))
        if count is not None and not hasattr(space, "characters"):
            numbers = [int(one) for one in _NUMBER.findall(text)]
            if not numbers or not first <= numbers[-1] < first + int(count):
                raise NotAnAction(
                    f"answer with a whole number from {first} to {first + int(count) - 1}"
                )
            return numbers[-1]
        if getattr(space, "dtype", None) is None or hasattr(space, "characters"):
            return text
        import numpy

        try:
            return numpy.asarray(json.loads(text), getattr(space, "dtype", None)).reshape(
                getattr(space, "shape", None)
            )
        except (ValueError, TypeError) as error:
            raise NotAnAction(f"answer with an action of {space} as JSON ({error})") from None
