"""Runs an application on a socket, in the foreground or beside a run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn

from rftjax.errors import UserError

STARTED_S = 30.0
KEEP_ALIVE_S = 75  # far above the 5 s of Python's HTTP clients: one that reuses an idle connection must find it open


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket; port 0 is any free one. Raises UserError where there is none to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(
            f"serving.host={host!r}, serving.port={port}: cannot listen there ({error}); give an address of this"
            " machine and a free port (0: any)"
        ) from None
    return found


def address(found: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _server(app: Any) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def serve(app: Any, found: socket.socket) -> None:
    """Serves until a signal ends it."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    with found:
        _server(app).run(sockets=[found])


class Background:
    """Serves in a thread of its own until it is closed."""

    def __init__(self, app: Any, found: socket.socket) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self.url, self._socket = address(found), found
        self._server = _server(app)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        self._started.wait(STARTED_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.call_soon(self._started.set)
            self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Returns what a function returns that runs in the server's thread."""

        async def run() -> Any:
            return function()

        return self._submit(run())

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Any:
        future: concurrent.futures.Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    def close(self) -> None:
        """Ends the server, requests under way included; a second call does nothing."""
        if self._thread.is_alive():
            self._server.should_exit = True
            self._thread.join()
        self._socket.close()
