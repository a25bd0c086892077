"""Names that stand for ways of making rollouts: rftjax makes them itself, so that they hold their arguments only."""

from __future__ import annotations

from typing import Any


class _Kept:
    """Keeps what it is made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class RolloutProcessorConfig(_Kept):
    """Settings of rollouts."""


class ExceptionHandlerConfig(_Kept):
    """Which failures of rollouts are tried again."""


class RolloutProcessor(_Kept):
    """What makes rollouts."""


class SingleTurnRolloutProcessor(RolloutProcessor):
    """One answer a row."""


class NoOpRolloutProcessor(RolloutProcessor):
    """Rows that have their conversations already."""


class RemoteRolloutProcessor(RolloutProcessor):
    """Conversations that an agent elsewhere has."""


class AgentRolloutProcessor(RolloutProcessor):
    """Conversations with tools of MCP servers."""


class MCPGymRolloutProcessor(RolloutProcessor):
    """Conversations with an environment that is an MCP server."""
