"""Environments answer the model between its turns: a function, a stateful class, tools, or an MCP server's."""

from rftjax.environments.episodes import Environments
from rftjax.environments.forms.load import adapted
from rftjax.environments.handler import as_messages, as_turn
from rftjax.environments.mcp_servers import mcp
from rftjax.environments.toolbox import ToolEpisode, Tools, tools

__all__ = [
    "Environments",
    "ToolEpisode",
    "Tools",
    "adapted",
    "as_messages",
    "as_turn",
    "mcp",
    "tools",
]
