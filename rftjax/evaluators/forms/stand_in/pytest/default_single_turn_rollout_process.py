"""Names that stand for ways of making rollouts: rftjax makes them itself, so that they hold their arguments only."""

from __future__ import annotations

from typing import Any


class RolloutProcessor:
    """Keeps what it is made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class SingleTurnRolloutProcessor(RolloutProcessor):
    """One answer a row."""


class NoOpRolloutProcessor(RolloutProcessor):
    """Rows that have their conversations already."""


class RemoteRolloutProcessor(RolloutProcessor):
    """Conversations that an agent elsewhere has."""
