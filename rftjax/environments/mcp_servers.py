"""MCP servers as tools: the Model Context Protocol over stdio or streamable HTTP, one session an episode.

The package `mcp` is imported when a server is first talked to, so that files that name one import without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from rftjax.environments.toolbox import Tools, inlined
from rftjax.errors import UserError

LIST_S = 60.0  # for a server to start and list its tools
IDLE_S = 2.0  # a connection idle for longer is not used again: many servers close theirs after 5 s
_CLOSE_S = 8.0  # the package gives a process 2 s to exit, 2 s to end and 2 s to be killed


def mcp(
    command: Sequence[str] = (),
    url: str = "",
    *,
    env: Mapping[str, str] = {},
    cwd: str = "",
    headers: Mapping[str, str] = {},
    include: Sequence[str] = (),
    prefix: str = "",
) -> Tools:
    """Makes an environment from the tools of an MCP server; `tools(function, mcp(...))` joins several in one.

    `command` starts a server that speaks over its standard input and output, with `env` beside the worker's variables;
    `url` is one that listens, spoken to with `headers`. Every episode has a session, and with `command` a process, of
    its own. `include` names the tools that the model sees (empty: all), `prefix` is put before their names.
    """
    if isinstance(command, str) or bool(command) == bool(url):
        raise UserError(
            f"mcp(command={command!r}, url={url!r}): must have either a list of arguments or a URL; "
            "write mcp(command=['python', 'server.py']) or mcp(url='http://127.0.0.1:8000/mcp')"
        )
    return Tools((), (Server(tuple(command), url, env, cwd, headers, include, prefix),))


class Server:
    """One server as `mcp` describes it; `tools` maps the names that the model calls to the server's own."""

    def __init__(
        self,
        command: tuple[str, ...],
        url: str,
        env: Mapping[str, str],
        cwd: str,
        headers: Mapping[str, str],
        include: Sequence[str],
        prefix: str,
    ):
        self._command, self._url = command, url
        self._env, self._cwd, self._headers = dict(env), cwd, dict(headers)
        self._include, self._prefix = tuple(include), prefix
        self.name = f"mcp({f'command={list(command)}' if command else f'url={url!r}'})"

    @functools.cached_property
    def schemas(self) -> list[dict[str, Any]]:
        """What the tools are, for chat templates; starts the server once and raises UserError where that fails."""
        try:
            listed = asyncio.run(asyncio.wait_for(self._list(), LIST_S))
        except TimeoutError:
            raise UserError(
                f"{self.name}: must list its tools within {LIST_S:g} s and did not; run it by hand to see why"
            ) from None
        except UserError:
            raise
        except BaseException as error:
            raise UserError(
                f"{self.name}: must start and list its tools, but {reason(error)}; run it by hand to see why"
            ) from None
        known = [tool.name for tool in listed]
        if missing := [name for name in self._include if name not in known]:
            raise UserError(
                f"{self.name}: include={list(self._include)} names {', '.join(missing)}, which the server has not; "
                f"it has {', '.join(known) or 'no tools'}"
            )
        chosen = [tool for tool in listed if not self._include or tool.name in self._include]
        if not chosen:
            raise UserError(f"{self.name}: must have tools and lists none; correct the server")
        return [self._schema(tool) for tool in chosen]

    @functools.cached_property
    def tools(self) -> dict[str, str]:
        """The server's names of the tools by the names that the model calls."""
        names = [schema["function"]["name"] for schema in self.schemas]
        return {name: name.removeprefix(self._prefix) for name in names}

    def _schema(self, tool: Any) -> dict[str, Any]:
        parameters = inlined(tool.input_schema)
        parameters = {"type": "object", "properties": {}, "required": []} | parameters
        described = {"name": self._prefix + tool.name, "description": tool.description or ""}
        return {"type": "function", "function": described | {"parameters": parameters}}

    async def _list(self) -> list[Any]:
        async with self.connect() as client:
            found, cursor = [], None
            while True:
                page = await client.list_tools(cursor=cursor)
                found += page.tools
                cursor = page.next_cursor
                if not cursor:
                    return found

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        """Opens a session and yields the package's client."""
        try:
            import mcp as package
            from mcp.client.streamable_http import streamable_http_client
        except ImportError as error:
            raise UserError(
                f"{self.name}: needs the package mcp, and {error}; install rftjax with its extra: "
                "pip install 'rftjax[mcp]'"
            ) from None
        if self._command:
            # The worker's variables are those that user code may have; the package passes on fewer by itself.
            source: Any = package.StdioServerParameters(
                command=self._command[0],
                args=list(self._command[1:]),
                env=dict(os.environ) | self._env,
                cwd=self._cwd or None,
            )
            async with package.Client(source) as client:
                yield client
            return
        from httpx2 import AsyncClient, Limits, Timeout

        # No limit of its own on reads: a tool may take as long as environments.* allow.
        timeout, limits = Timeout(LIST_S, read=None), Limits(keepalive_expiry=IDLE_S)
        async with AsyncClient(headers=self._headers, timeout=timeout, limits=limits) as http:
            source = streamable_http_client(self._url, http_client=http)
            async with package.Client(source) as client:
                yield client

    async def open(self) -> Session:
        """Opens the session of an episode."""
        session = Session(self)
        await session.open()
        return session


class Session:
    """One open session. A task of its own holds the connection, which must be left by the task that entered it."""

    def __init__(self, server: Server):
        self._server = server
        self._ending = asyncio.Event()
        self._opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._holder = asyncio.ensure_future(self._hold())

    async def _hold(self) -> None:
        try:
            async with self._server.connect() as client:
                self._opened.set_result(client)
                await self._ending.wait()
        except BaseException as error:
            if not self._opened.done():
                self._opened.set_exception(UserError(f"{self._server.name}: {reason(error)}"))

    async def open(self) -> None:
        """Waits for the connection."""
        try:
            await asyncio.shield(self._opened)
        except BaseException:
            await self.close()
            raise

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Returns what a tool answers as text; an error of the tool is text too, a lost server raises UserError."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        client = self._opened.result()
        try:
            result = await client.call_tool(self._server.tools[name], arguments)
        except MCPError as error:
            if error.code == CONNECTION_CLOSED or self._holder.done():
                raise UserError(f"{self._server.name}: the server is gone: {error}") from None
            return f"Error: {error}"[:1000]
        except RuntimeError as error:  # the result is not of the form that the server promised
            return f"Error: {error}"[:1000]
        return f"Error: {text_of(result)}" if result.is_error else text_of(result)

    async def close(self) -> None:
        """Ends the session and the server's process."""
        self._ending.set()
        if not self._opened.done():
            self._holder.cancel()
        await asyncio.wait({self._holder}, timeout=_CLOSE_S)
        if self._opened.done() and not self._opened.cancelled():
            self._opened.exception()  # seen: nobody waits for it any more


def text_of(result: Any) -> str:
    """Returns the text of a tool's result: its text blocks, else its structured content as JSON."""
    parts = [_block_text(block) for block in result.content]
    if not any(parts) and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(part for part in parts if part)


def _block_text(block: Any) -> str:
    """Returns a block as text; what is no text is named with its type and address."""
    if block.type == "text":
        return block.text
    if block.type == "resource":
        text = getattr(block.resource, "text", None)
        return text if text is not None else f"[{block.resource.uri}]"
    if block.type == "resource_link":
        return f"[{block.name}: {block.uri}]"
    return f"[{block.type}: {getattr(block, 'mime_type', '')}]"


def reason(error: BaseException) -> str:
    """Returns one line on what went wrong, of a group of exceptions the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
