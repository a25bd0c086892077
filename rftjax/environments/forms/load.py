"""Finds out what an environment is: an id of a package, an object of another library, or one of rftjax's own forms."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from rftjax.environments.forms import gym, nemo_gym, openenv, textarena
from rftjax.environments.forms.form import Action, Observe
from rftjax.errors import UserError
from rftjax.types import Task
from rftjax.workers.user_code import load_object

# The beginning of a name that is an id or address, and what makes something of the rest.
BY_NAME: dict[str, Callable[[str, str], Any]] = {
    "gymnasium:": gym.make,
    "textarena:": textarena.make,
    "openenv:": openenv.make,
    "nemo_gym:": nemo_gym.Server,
}


def target(name: str, field: str) -> Any:
    """Returns what makes episodes, or answers, for what a field names; objects of other libraries are adapted."""
    for beginning, make in BY_NAME.items():
        if name.startswith(beginning):
            return adapted(make(name.removeprefix(beginning), field))
    found = load_object(name, field=field)
    found = adapted(found) if _is_foreign(found) else found
    if not callable(found):
        raise UserError(
            f"{field}={name!r}: is of type {type(found).__name__}, which is no environment; name a function "
            "(task, messages), a class Environment(task, seed), or another form of docs/environments.md"
        )
    return found


def adapted(
    source: Any,
    *,
    action: Action | None = None,
    observation: Observe | None = None,
    players: int = 1,
    opponent: Callable[[str], str] | None = None,
) -> Any:
    """Makes an environment of an object or class of Gymnasium, TextArena or OpenEnv, or a function (task, seed) of one.

    `action` makes an action of what the model says, and tells it of a ValueError; `observation` makes a text of what it
    sees. A game of several `players` needs an `opponent`, which answers a text with a text.
    """
    if isinstance(source, nemo_gym.Server):
        return source
    return Adapted(source, action, observation, players, opponent)


class Adapted:
    """A factory of episodes from an object, a class or a function of (task, seed)."""

    has_state = False

    def __init__(
        self,
        source: Any,
        action: Action | None,
        observation: Observe | None,
        players: int,
        opponent: Callable[[str], str] | None,
    ):
        self._source, self._rules = source, (action, observation)
        self._players, self._opponent = players, opponent
        self.asynchronous = openenv.matches(source) or inspect.iscoroutinefunction(source)
        if inspect.isclass(source):
            try:
                inspect.signature(source).bind()
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"environment: the class {source.__name__} is made without arguments, but {error}; name an object "
                    "of it, or a function (task, seed) that returns one"
                ) from None

    def __call__(self, task: Task, seed: int) -> Any:
        """Returns the environment of one episode."""
        made = self._source
        if inspect.isclass(made):
            made = made()
        elif not _is_foreign(made):
            made = made(task, seed)
        if inspect.isawaitable(made):
            return self._later(made, task, seed)
        return episode(made, task, seed, self._rules, self._players, self._opponent)

    async def _later(self, made: Awaitable[Any], task: Task, seed: int) -> Any:
        return episode(await made, task, seed, self._rules, self._players, self._opponent)


def episode(
    made: Any,
    task: Task,
    seed: int,
    rules: tuple[Action | None, Observe | None] = (None, None),
    players: int = 1,
    opponent: Callable[[str], str] | None = None,
) -> Any:
    """Returns the episode of another library's object, anything else as it is."""
    if textarena.matches(made):
        return textarena.Episode(made, task, seed, players, opponent)
    if openenv.matches(made):
        return openenv.Episode(made, task, seed, *rules)
    if gym.matches(made):
        return gym.Episode(made, task, seed, *rules)
    return made


def _is_foreign(found: Any) -> bool:
    return any(form.matches(found) for form in (textarena, openenv, gym))
