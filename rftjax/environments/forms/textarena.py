"""TextArena's form: `reset(num_players=, seed=)`, `get_observation()` of the player to move, `step(text)`.

`close()` returns the rewards of the players. The model is player 0; others need an `opponent`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rftjax.environments.forms.form import number_of, said, seed_of, user
from rftjax.errors import UserError
from rftjax.types import Message, Task, Turn
from rftjax.workers.plain import plain

GAME = -1  # who speaks where no player does


def matches(found: Any) -> bool:
    """Says whether an object or class is such a game."""
    names = ("reset", "get_observation", "step", "close")
    return all(callable(getattr(found, name, None)) for name in names)


def make(name: str, field: str) -> Any:
    """Returns a game by its id, without the wrapper that repeats all that was said in every observation."""
    try:
        package = importlib.import_module("textarena")
    except ImportError as error:
        raise UserError(
            f"{field}='textarena:{name}': needs the package textarena: pip install textarena ({error})"
        ) from None
    try:
        known = getattr(package.envs.registration, "ENV_REGISTRY", {})
        return package.make(f"{name}-raw" if f"{name}-raw" in known else name)
    except Exception as error:
        raise UserError(
            f"{field}='textarena:{name}': must be an id that textarena.make takes, but {error}; correct it"
        ) from None


class Episode:
    """One game; `opponent` answers the text that another player sees."""

    def __init__(
        self, game: Any, task: Task, seed: int, players: int, opponent: Callable[[str], str] | None
    ):
        self._game, self._task, self._seed = game, task, seed
        self._players, self._opponent = players, opponent
        self._seen: dict[int, str] = {}  # the last text of each player

    def reset(self) -> list[Message]:
        """Begins the game and lets others move until it is the model's turn."""
        self._game.reset(num_players=self._players, seed=seed_of(self._task, self._seed))
        done, shown = self._until_own_turn(False)
        if done:
            raise UserError("the game was over before the model's first move")
        return user(shown)

    def step(self, message: Message) -> Turn:
        """Makes the model's move; the rewards come with the end of the game."""
        done, info = self._game.step(said(message))
        done, shown = self._until_own_turn(bool(done))
        if not done:
            return Turn(user(shown or "(nothing to see)"), info=plain(info or {}))
        closed = self._game.close()
        rewards, about = closed if isinstance(closed, tuple) else (closed, {})
        return Turn(user(shown), True, number_of((rewards or {}).get(0)), plain(about or {}))

    def _until_own_turn(self, done: bool) -> tuple[bool, str]:
        while not done:
            player, observation = self._game.get_observation()
            text = self._text(player, observation)
            if player == 0:
                return False, text
            if self._opponent is None:
                raise UserError(
                    f"the game asks player {player}, and only player 0 is the model; name who answers: "
                    "environment = adapted(game, players=2, opponent=function)"
                )
            done, _ = self._game.step(self._opponent(text))
        return True, ""

    def _text(self, player: int, observation: Any) -> str:
        """Returns what is new to a player; what the player said itself is left out of a list of messages."""
        if isinstance(observation, str):
            before = self._seen.get(player, "")
            self._seen[player] = observation
            return observation.removeprefix(before).strip()
        lines = []
        for sender, text, *_ in observation or ():
            if sender != player:
                lines.append(text if sender == GAME else f"[Player {sender}] {text}")
        return "\n".join(lines).strip()
