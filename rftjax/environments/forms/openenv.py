"""OpenEnv's form: a client with `reset(...)` and `step(action)`, whose results have observation, reward and done.

The client may be asynchronous. What the model says becomes the text of an action that has one required text, else it is
read as JSON; of an observation the model sees all but done, reward and metadata.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import typing
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

_REFUSED = "VALIDATION_ERROR"  # the server's code for an action of another form
_NOT_SHOWN = ("done", "reward", "metadata")


def matches(found: Any) -> bool:
    """Says whether an object or class is a client of the package, or of one made with it."""
    kind = found if inspect.isclass(found) else type(found)
    return any(
        base.__module__.partition(".")[0] in ("openenv", "openenv_core") for base in kind.__mro__
    ) and callable(getattr(found, "step", None))


def make(url: str, field: str) -> Any:
    """Returns a maker of the package's client of actions and observations without types."""
    try:
        generic = importlib.import_module("openenv.core.generic_client").GenericEnvClient
    except ImportError as error:
        raise UserError(
            f"{field}='openenv:{url}': needs the package openenv-core: pip install openenv-core ({error})"
        ) from None
    return generic(base_url=url)


class Episode:
    """One episode of a client; a method's result may have to be awaited."""

    def __init__(
        self, client: Any, task: Task, seed: int, action: Action | None, observe: Observe | None
    ):
        self._client, self._task, self._seed = client, task, seed
        self._action, self._observe = action, observe

    async def reset(self) -> list[Message]:
        """Begins with the seed, where the client takes one."""
        named = parameters(self._client.reset)
        takes = "seed" in named or "kwargs" in named
        own = {"seed": seed_of(self._task, self._seed)} if takes else {}
        result = await _awaited(self._client.reset(**own))
        return user(self._shown(result.observation))

    async def step(self, message: Message) -> Turn:
        """Takes the action; a text that is none is told and changes nothing."""
        try:
            action = self._read(said(message))
        except ValueError as error:
            return Turn(user(f"Error: {error}"))
        try:
            result = await _awaited(self._client.step(action))
        except RuntimeError as error:
            if _REFUSED not in str(error):
                raise
            return Turn(user(f"Error: {error}"))
        done = bool(result.done)
        shown = user(self._shown(result.observation)) or ([] if done else user("(nothing to see)"))
        return Turn(shown, done, number_of(result.reward))

    async def close(self) -> None:
        await _awaited(self._client.close())

    def _shown(self, observation: Any) -> str:
        if self._observe is not None:
            return self._observe(observation)
        if callable(getattr(observation, "model_dump", None)):
            observation = observation.model_dump()
        elif dataclasses.is_dataclass(observation) and not isinstance(observation, type):
            observation = dataclasses.asdict(observation)
        if isinstance(observation, dict):
            observation = {k: v for k, v in observation.items() if k not in _NOT_SHOWN}
        return text_of(observation)

    def _read(self, text: str) -> Any:
        if self._action is not None:
            return self._action(text)
        # The synchronous wrapper names no types; the client that it wraps does.
        kind = _action_type(type(getattr(self._client, "async_client", self._client)))
        only = _only_text(kind)
        if only:
            return kind(**{only: text})
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("it is no object")
            return fields if kind is None or kind is dict else kind(**fields)
        except (ValueError, TypeError) as error:
            names = ", ".join(_fields(kind)) or "the action's fields"
            raise NotAnAction(f"answer with a JSON object of {names} ({error})") from None


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _action_type(client: type) -> Any:
    """Returns the type of actions that a client's class names, None where it names none."""
    for base in client.__mro__:
        for named in getattr(base, "__orig_bases__", ()):
            first = next(iter(typing.get_args(named)), None)
            if inspect.isclass(first):
                return first
    return None


def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Returns the fields of an action with their types, and whether they are required."""
    if hasattr(kind, "model_fields"):
        return {n: (one.annotation, one.is_required()) for n, one in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        missing = dataclasses.MISSING
        return {
            one.name: (hints[one.name], one.default is missing and one.default_factory is missing)
            for one in dataclasses.fields(kind)
        }
    return {}


def _only_text(kind: Any) -> str:
    """Returns the name of the one required field where that is a text, else ""."""
    required = [(name, hint) for name, (hint, needed) in _fields(kind).items() if needed]
    return required[0][0] if len(required) == 1 and required[0][1] is str else ""
