"""The inside of a worker process: a guardian and, as its child, the process that runs user code.

The guardian runs no user code. It waits until the worker ends or the main process lets go of the life pipe (by closing
it, or by dying in any way), then kills what is left of the worker and of everything the worker started. Standard
library only, and never JAX: a worker is up in well under a second and holds no accelerator.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import io
import json
import os
import pickle
import resource
import select
import signal
import struct
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from rftjax.resolve import resolve, traceback_text

# A frame is kind (one byte), call number, length of the body in bytes, and the body, a pickle.
HEADER = struct.Struct("<cqQ")
READY, FAILED, VALUE, ERROR, OVERRUN, BLOCKED, CALL = b"R", b"F", b"V", b"E", b"T", b"B", b"C"
MAX_RESULT_BYTES = 64 * 2**20
MAX_PRINTED_BYTES = 20_000

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """Runs guardian and worker; argv[1] is the JSON object that `rftjax.workers` writes."""
    settings = json.loads(sys.argv[1])
    sys.argv = [""]
    sys.path[:] = settings["path"]
    _linux_prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphaned grandchildren come to the guardian
    guardian = os.getpid()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        _guard(pid, settings["life_fd"], wake_read)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    _linux_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(1)
    for fd in (wake_read, wake_write, settings["life_fd"]):
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writing a core file would count as hanging
    # When memory runs out the worker goes first, not the training.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("800")
    _work(settings)


def _guard(worker: int, life_fd: int, wake_fd: int) -> NoReturn:
    """Outlives the worker by a moment and ends with its status, 128 + the signal where one killed it."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):  # else the main process would not see the end of the worker's pipe
        os.dup2(null, fd)
    status = 0
    alive = True
    while alive:
        readable, _, _ = select.select([life_fd, wake_fd], [], [])
        if wake_fd in readable:
            os.read(wake_fd, 4096)
        for pid, ended in _reap():
            if pid == worker:
                alive, status = False, ended
        if life_fd in readable:
            break
    _kill_descendants(worker)
    give_up = time.monotonic() + 2.0
    while time.monotonic() < give_up:
        try:
            for pid, ended in _reap(raise_if_none=True):
                status = ended if pid == worker else status
        except ChildProcessError:
            break
        _kill_descendants(worker)  # orphans arrive here one generation at a time
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _reap(raise_if_none: bool = False) -> list[tuple[int, int]]:
    ended = []
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return ended
            ended.append((pid, status))
    except ChildProcessError:
        if raise_if_none and not ended:
            raise
        return ended


def _kill_descendants(worker: int) -> None:
    """Kills the worker's process group and, on Linux, what left the group but came back as an orphan."""
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    own = os.getpid()
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                if parent == own:
                    os.kill(int(entry), signal.SIGKILL)


def _linux_prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class _Printed(io.RawIOBase):
    """Stands under sys.stdout and sys.stderr: passes the first bytes on, drops the rest."""

    def __init__(self, fd: int):
        self._fd = fd
        self._left = MAX_PRINTED_BYTES

    def write(self, data: Any) -> int:
        data = bytes(data)
        if self._left > 0:
            shown = data[: self._left]
            self._left -= len(shown)
            if self._left == 0:
                shown += b"\n[a worker process printed more than is shown; the rest is dropped]\n"
            with contextlib.suppress(OSError):
                os.write(self._fd, shown)
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


class _Channel:
    """Frames to and from the main process, on descriptors that user code does not know."""

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), "rb")
        self._out_fd = os.dup(1)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        raw: Any = _Printed(os.dup(2))
        printed = io.TextIOWrapper(raw, "utf-8", "replace", line_buffering=True, write_through=True)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        sys.stdout = sys.stderr = printed

    def read(self) -> tuple[int, bytes] | None:
        head = self._in.read(HEADER.size)
        if len(head) < HEADER.size:
            return None
        _, number, length = HEADER.unpack(head)
        body = self._in.read(length)
        return (number, body) if len(body) == length else None

    def write(self, kind: bytes, number: int, value: Any) -> None:
        if os.getpid() != self._pid:  # user code forked and its child came back here
            os._exit(0)
        try:
            body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except BaseException as error:
            if kind != VALUE:
                raise
            kind, body = ERROR, pickle.dumps(_unsendable(value, f"cannot be pickled: {error}"))
        if len(body) > MAX_RESULT_BYTES:
            why = f"takes {len(body)} bytes, more than the {MAX_RESULT_BYTES} allowed"
            kind, body = ERROR, pickle.dumps(_unsendable(value, why))
        frame = memoryview(HEADER.pack(kind, number, len(body)) + body)
        with self._lock:
            while frame:
                frame = frame[os.write(self._out_fd, frame) :]


def _unsendable(value: Any, why: str) -> tuple[str, str]:
    return f"the result, of type {type(value).__name__}, {why[:300]}", ""


def _describe(error: BaseException) -> tuple[str, str]:
    """Returns one line (type, message, place in the user's code) and the traceback."""
    text = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    own, library = os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.__file__)
    users = [
        frame
        for frame in frames
        if os.path.dirname(frame.filename) != own and not frame.filename.startswith((library, "<"))
    ]
    where = f" ({os.path.basename(users[-1].filename)}:{users[-1].lineno})" if users else ""
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line + where, traceback_text(error)[-4000:]


def _work(settings: dict[str, Any]) -> NoReturn:
    channel = _Channel()
    try:
        target = resolve(settings["target"], field=settings["field"])
        if settings["wrapper"]:
            module, name = settings["wrapper"].split(":")
            handler = getattr(importlib.import_module(module), name)(target)
        else:
            handler = target
        concurrent = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            handler.__call__
        )
    except BaseException as error:
        text = str(error) if isinstance(error, ValueError) else traceback_text(error)
        channel.write(FAILED, 0, text)
        sys.exit(1)
    about = {"async": concurrent, "about": str(getattr(handler, "about", "")), "pid": os.getpid()}
    channel.write(READY, 0, about)
    if concurrent:
        asyncio.run(_serve_many(channel, handler, settings["timeout_s"]))
    else:
        _serve_one_by_one(channel, handler)
    sys.exit(0)


def _serve_one_by_one(channel: _Channel, handler: Any) -> None:
    loop = None
    while (frame := channel.read()) is not None:
        number, body = frame
        try:
            value = handler(*pickle.loads(body))
            if inspect.isawaitable(value):  # a plain function that returns a coroutine
                loop = loop or asyncio.new_event_loop()
                value = loop.run_until_complete(_awaited(value))
        except BaseException as error:
            channel.write(ERROR, number, _describe(error))
        else:
            channel.write(VALUE, number, value)


async def _awaited(value: Any) -> Any:
    return await value


async def _serve_many(channel: _Channel, handler: Any, timeout_s: float) -> None:
    """Runs every call as a task; overruns are cancelled here, a blocked loop is reported by a thread."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly
    works: dict[asyncio.Task[Any], int] = {}

    async def run(number: int, body: bytes) -> None:
        work = asyncio.ensure_future(_call(handler, body))
        works[work] = number
        try:
            done, _ = await asyncio.wait({work}, timeout=timeout_s)
            if not done:
                work.cancel()
                await asyncio.wait({work}, timeout=0.5)  # one that refuses to stop is left behind
                channel.write(OVERRUN, number, None)
            elif work.cancelled():
                channel.write(ERROR, number, ("CancelledError", ""))
            elif (error := work.exception()) is not None:
                channel.write(ERROR, number, _describe(error))
            else:
                channel.write(VALUE, number, work.result())
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

    def watch() -> None:
        while True:
            beat = threading.Event()
            sent = time.monotonic()
            loop.call_soon_threadsafe(beat.set)
            if not beat.wait(timeout_s + 0.1):
                current = asyncio.current_task(loop)
                channel.write(BLOCKED, works.get(current, -1) if current else -1, None)
                return
            time.sleep(max(0.0, min(0.2, timeout_s / 4) - (time.monotonic() - sent)))

    for thread in (listen, watch):
        threading.Thread(target=thread, daemon=True).start()
    await ended.wait()


async def _call(handler: Any, body: bytes) -> Any:
    try:
        return await handler(*pickle.loads(body))
    except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the whole worker
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
