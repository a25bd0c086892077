"""Runs in a worker process: receives calls, runs user code, sends answers. Standard library only."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from typing import Any

from rftjax.errors import UserError
from rftjax.workers import wire
from rftjax.workers.user_code import load_function, traceback_text


class Overrun(BaseException):
    """Raised in user code that exceeds its time limit; `except Exception` does not catch it."""


class _Exit(Exception):
    """Wraps an exception that would end the event loop."""


class Channel:
    """Frames to and from the main process, on a descriptor that user code does not use."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def read(self) -> tuple[int, bytes] | None:
        """Waits for a call; returns None when there are no more."""
        head = self._read(wire.HEADER.size)
        if head is None:
            return None
        _, number, length = wire.HEADER.unpack(head)
        body = self._read(length)
        return None if body is None else (number, body)

    def _read(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = os.read(self.fd, min(2**20, count - len(parts)))
            except OSError:
                part = b""
            if not part:
                return None
            parts += part
        return bytes(parts)

    def write(self, kind: bytes, number: int, value: Any) -> None:
        """Sends an answer; a value that cannot be pickled or is too large becomes an error."""
        if os.getpid() != self._pid:  # user code forked and its child came back here
            os._exit(0)
        try:
            body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except BaseException as error:
            if kind != wire.VALUE:
                raise
            why = f"cannot be pickled: {_text_of(error)}"
            kind, body = wire.ERROR, pickle.dumps(_unsendable(value, why))
        if len(body) > wire.MAX_RESULT_BYTES:
            why = f"takes {len(body)} bytes, more than the {wire.MAX_RESULT_BYTES} allowed"
            kind, body = wire.ERROR, pickle.dumps(_unsendable(value, why))
        frame = memoryview(wire.HEADER.pack(kind, number, len(body)) + body)
        with self._lock:
            while frame:
                frame = frame[os.write(self.fd, frame) :]


def load(channel: Channel, settings: dict[str, Any]) -> Any:
    """Imports user code; where that fails, reports why and ends the process."""
    try:
        if settings["wrapper"]:
            module, name = settings["wrapper"].split(":")
            wrap = getattr(importlib.import_module(module), name)
            return wrap(settings["target"], settings["field"])
        return load_function(settings["target"], field=settings["field"])
    except BaseException as error:
        text = str(error) if isinstance(error, ValueError) else traceback_text(error)
        cause = error.__cause__ if isinstance(error.__cause__, BaseException) else error
        channel.write(wire.FAILED, 0, text + _hint(cause))
        sys.exit(1)


def ready(channel: Channel, handler: Any, alone: str) -> None:
    """Reports what was imported; `alone` says why it cannot be forked, "" where it can."""
    about = {"async": _is_concurrent(handler), "about": str(getattr(handler, "about", ""))}
    channel.write(wire.READY, 0, about | {"alone": alone})


def serve(channel: Channel, handler: Any, timeout_s: float) -> None:
    """Answers calls until there are no more."""
    if _is_concurrent(handler):
        asyncio.run(_serve_many(channel, handler, timeout_s))
    else:
        _serve_one_by_one(channel, handler)


def _is_concurrent(handler: Any) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(handler.__call__)


def _serve_one_by_one(channel: Channel, handler: Any) -> None:
    loop = None
    current = -2  # the number of the call that runs

    def interrupt(*_: object) -> None:
        if current == _interrupted():
            raise Overrun

    signal.signal(signal.SIGUSR2, interrupt)
    channel.write(wire.READY, 0, None)
    while (frame := channel.read()) is not None:
        number, body = frame
        kind, value = wire.VALUE, None
        try:
            current = number
            try:
                interrupt()  # the call may be over time already
                value = handler(*pickle.loads(body))
                if inspect.isawaitable(value):  # a plain function that returns a coroutine
                    loop = loop or asyncio.new_event_loop()
                    value = loop.run_until_complete(_awaited(value))
            finally:
                current = -2
        except Overrun:
            kind, value = wire.OVERRUN, None
        except BaseException as error:
            kind, value = wire.ERROR, describe(error)
        channel.write(kind, number, value)


async def _awaited(value: Any) -> Any:
    return await value


async def _serve_many(channel: Channel, handler: Any, timeout_s: float) -> None:
    """Runs every call as a task and cancels those that overrun; a thread reports a blocked event loop."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly
    works: dict[asyncio.Task[Any], int] = {}
    held_s = 0.0  # seconds the loop was blocked, which count against no other call

    async def in_time(work: asyncio.Task[Any]) -> bool:
        began_s, held_before_s = loop.time(), held_s
        while not work.done():
            left_s = timeout_s + held_s - held_before_s - (loop.time() - began_s)
            if left_s <= 0:
                return False
            await asyncio.wait({work}, timeout=left_s)
        return True

    async def run(number: int, body: bytes) -> None:
        work = asyncio.ensure_future(_call(handler, body))
        works[work] = number
        if number == _interrupted():  # it is over time already
            work.cancel()
        try:
            if not await in_time(work):
                work.cancel()
                # A task that ignores the cancellation is abandoned.
                await asyncio.wait({work}, timeout=0.5)
                channel.write(wire.OVERRUN, number, None)
            elif work.cancelled():
                channel.write(wire.ERROR, number, ("CancelledError", ""))
            elif (error := work.exception()) is None:
                channel.write(wire.VALUE, number, work.result())
            elif isinstance(error, Overrun):
                channel.write(wire.OVERRUN, number, None)
            else:
                cause = error.args[0] if isinstance(error, _Exit) else error
                channel.write(wire.ERROR, number, describe(cause))
        finally:
            del works[work]

    def begin(number: int, body: bytes) -> None:
        task = loop.create_task(run(number, body))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def listen() -> None:
        while (frame := channel.read()) is not None:
            loop.call_soon_threadsafe(begin, *frame)
        loop.call_soon_threadsafe(ended.set)

    def beat(sent_s: float, seen: threading.Event) -> None:
        nonlocal held_s
        held_s += max(0.0, time.monotonic() - sent_s - 0.02)
        seen.set()

    def watch() -> None:
        while True:
            seen, sent_s = threading.Event(), time.monotonic()
            loop.call_soon_threadsafe(beat, sent_s, seen)
            if not seen.wait(timeout_s + 0.1):
                current = asyncio.current_task(loop)
                channel.write(wire.BLOCKED, works.get(current, -1) if current else -1, None)
                seen.wait()
            time.sleep(min(0.2, timeout_s / 4))

    def interrupt(*_: object) -> None:
        current, number = asyncio.current_task(loop), _interrupted()
        if current in works and works[current] == number:
            raise Overrun
        for work in works:  # it awaits something
            if works[work] == number:
                loop.call_soon_threadsafe(work.cancel)

    signal.signal(signal.SIGUSR2, interrupt)
    channel.write(wire.READY, 0, None)
    for thread in (listen, watch):
        threading.Thread(target=thread, daemon=True).start()
    await ended.wait()


async def _call(handler: Any, body: bytes) -> Any:
    try:
        return await handler(*pickle.loads(body))
    except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the whole worker
        raise _Exit(error) from error


def describe(error: BaseException) -> tuple[str, str]:
    """Returns one line (type, message, place in the user's code) and the traceback."""
    text = " ".join(_text_of(error)[:2000].split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    package = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
    foreign = (package, os.path.dirname(os.__file__), "<")
    users = [frame for frame in frames if not frame.filename.startswith(foreign)]
    where = f" ({os.path.basename(users[-1].filename)}:{users[-1].lineno})" if users else ""
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, UserError):  # the text says all
        line, where = text, ""
    details = ""
    with contextlib.suppress(Exception):  # an exception that cannot be printed
        details = traceback_text(error)[-4000:]
    return line + where + _hint(error), _encodable(details)


def _text_of(error: BaseException) -> str:
    try:
        return _encodable(str(error))
    except Exception as problem:
        return f"(its message cannot be had: {type(problem).__name__})"


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _unsendable(value: Any, why: str) -> tuple[str, str]:
    return f"the result, of type {type(value).__name__}, {why[:300]}", ""


interrupted: Any = None  # shared memory: the number of the call that the guardian interrupts


def _interrupted() -> int:
    return wire.INTERRUPT.unpack(interrupted)[0] if interrupted is not None else -1


withheld: dict[str, str] = {}  # names of environment variables, and the field that lets them in


def _hint(error: BaseException) -> str:
    """Returns how to pass on a withheld environment variable that the error names, else ""."""
    text = _text_of(error)[:2000]
    missed = [
        name for name in withheld if len(name) > 2 and re.search(rf"\b{re.escape(name)}\b", text)
    ]
    if not missed or isinstance(error, UserError):
        return ""
    name = max(missed, key=len)
    return (
        f"; the variable {name} is withheld from user code: add it by {withheld[name]}=({name!r},)"
    )
