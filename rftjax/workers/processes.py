"""Templates and workers as the main process sees them; `template` is what runs inside."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.workers import wire
from rftjax.workers.environ import worker_environment

_BOOT = "from rftjax.workers.template import main; main()"
_log = logging.getLogger(__name__)
_OPEN_FILES = 8192
_GIVE_UP_S = 5.0  # for a guardian to end everything and say so

Show = Callable[[bytes], None]


class Process:
    """A worker or template process with its guardian; call all methods on one event loop."""

    def __init__(self, show: Show):
        self._show = show
        self._line = b""
        self.status: int | None = None  # exit status; negative: the signal; None: unknown
        self.tail = ""
        self.ended = asyncio.Event()

    async def connect(self) -> list[int]:
        """Opens the data and life sockets; returns the descriptors for the child."""
        data, their_data = socket.socketpair()
        life, their_life = socket.socketpair()
        self._reader, self._writer = await asyncio.open_connection(sock=data, limit=2**20)
        self._life_reader, self._life_writer = await asyncio.open_connection(sock=life)
        self._watch = asyncio.get_running_loop().create_task(self._listen_to_guardian())
        return [their_data.detach(), their_life.detach()]

    async def read(self) -> tuple[bytes, int, bytes]:
        """Waits for a frame; raises IncompleteReadError or ConnectionError when the process has ended."""
        return await _read(self._reader)

    def send(self, number: int, body: bytes) -> None:
        """Sends a call."""
        with contextlib.suppress(OSError, RuntimeError):  # `read` reports the end of the process
            self._writer.write(wire.HEADER.pack(wire.CALL, number, len(body)) + body)

    def finish(self) -> None:
        """Lets the process answer its pending calls and exit."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()

    def interrupt(self, number: int) -> None:
        """Raises Overrun in user code that runs this call, or will run it."""
        with contextlib.suppress(OSError, RuntimeError):  # it is being killed
            self._life_writer.write(wire.INTERRUPT.pack(number))

    def kill(self) -> None:
        """Tells the guardian to kill the process and all its descendants."""
        with contextlib.suppress(OSError, RuntimeError):
            self._life_writer.write_eof()

    async def end(self, within_s: float = 0.0) -> None:
        """Waits for the exit of the process and its descendants; kills them after `within_s` seconds."""
        try:
            if within_s:
                await asyncio.wait_for(self.ended.wait(), within_s)
        except TimeoutError:
            pass
        self.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), _GIVE_UP_S)
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        for writer in (self._writer, self._life_writer):
            writer.transport.abort()

    async def _listen_to_guardian(self) -> None:
        try:
            while True:
                kind, number, body = await _read(self._life_reader)
                if kind == wire.PRINTED:
                    self._print(body)
                else:
                    self.status, self.tail = number, body.decode("utf-8", "replace")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if self._line:
                self._print(b"\n")
            self.ended.set()
            # A stray descendant may keep the socket open: stop reading after a delay that lets answers arrive.
            asyncio.get_running_loop().call_later(2.0, self._writer.transport.abort)

    def _print(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) > 1000:  # no end in sight
            lines.append(self._line)
            self._line = b""
        for line in lines:
            self._show(line)


class Template(Process):
    """The process that imports user code; workers are forked from it unless `alone` says why not."""

    def __init__(self, show: Show):
        super().__init__(show)
        self.alone = ""
        self._popen: subprocess.Popen[bytes] | None = None

    async def start(
        self, settings: dict[str, Any], folder: str, environment: dict[str, str]
    ) -> None:
        """Starts the interpreter; the first frame that `read` returns is the result of the import."""
        ours, control = socket.socketpair()
        ours.setblocking(False)
        self._control = ours
        theirs = await self.connect()
        data_fd, life_fd = theirs
        fds = (life_fd, data_fd, control.fileno())
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", import_path() + _BOOT, json.dumps(settings | {"fds": fds})],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,
                cwd=folder,
                env=environment,
            )
        finally:
            control.close()
            for fd in theirs:
                os.close(fd)

    async def fork(self, show: Show) -> Process:
        """Returns a new worker, which has already ended if the template is gone."""
        process = Process(show)
        fds = await process.connect()
        try:
            await self._command(wire.FORK, fds)
        except OSError:  # the template is gone: the closed sockets report that
            pass
        finally:
            for fd in fds:
                os.close(fd)
        return process

    async def serve(self) -> None:
        """Makes the process a worker itself."""
        with contextlib.suppress(OSError):
            await self._command(wire.SERVE, [])

    async def _command(self, command: bytes, fds: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self._control, [command], fds)
                return
            except BlockingIOError:
                await asyncio.sleep(0.005)

    def finish(self) -> None:
        super().finish()
        self._control.close()

    async def end(self, within_s: float = 0.0) -> None:
        await super().end(within_s)
        self._control.close()
        if self._popen is None:
            return
        if not self.ended.is_set():
            self._popen.kill()
        while self._popen.poll() is None:
            await asyncio.sleep(0.005)


class Supply:
    """Starts worker processes: forks of a template, or new interpreters where user code cannot be forked."""

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        label: str,
        env: Iterable[str],
        env_field: str,
        start_timeout_s: float,
    ):
        self._environment, withheld = worker_environment(env, env_field)
        self._settings = settings | {
            "path": sys.path,
            "withheld": withheld,
            "env_field": env_field,
        }
        self._name = f"{label}={settings['target']!r}" if label else repr(settings["target"])
        self._label, self._budget = label or "worker", wire.Budget()
        self._folder = os.getcwd()
        self._start_timeout_s = start_timeout_s
        self.about: dict[str, Any] = {}  # what the template reported about user code
        self.spare: list[Process] = []  # idle processes that did their own import
        self._template: Template | None = None
        self._processes: set[Process] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(self, count: int) -> None:
        """Imports user code, `count` times where it cannot be forked; raises UserError where the import fails."""
        self._starts = asyncio.Lock()
        template = await self._import()
        if template.alone:
            _log.info(
                "%s: importing it %s, so each process imports it anew", self._name, template.alone
            )
            for _ in range(count - 1):
                self.background(self._make_spare())

    async def process(self) -> Process:
        """Returns a worker process; raises UserError where the user's code no longer imports."""
        async with self._starts:
            self.spare = [process for process in self.spare if not process.ended.is_set()]
            if not self.spare and self._template is None:
                await self._import()
            if self.spare:
                return self.spare.pop()
            assert self._template is not None
            process = await self._template.fork(self._show)
            self._processes.add(process)
        # Wait until it is ready, so that the start does not count against the time limit of a call.
        try:
            await asyncio.wait_for(process.read(), self._start_timeout_s)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            process.kill()  # calls sent to it fail
        return process

    async def end(self, process: Process, within_s: float = 0.0) -> None:
        """Ends a process and its descendants; it has `within_s` seconds to exit by itself."""
        if within_s:
            process.finish()
        await process.end(within_s)
        self._processes.discard(process)

    async def close(self, busy: set[Process | None]) -> None:
        """Ends all processes; those that are not `busy` may exit by themselves."""
        # The template goes last: its end kills its forks.
        template = self._template
        rest = [process for process in self._processes if process is not template]
        await asyncio.gather(*(self.end(one, 0.0 if one in busy else 0.5) for one in rest))
        if template is not None:
            await self.end(template, within_s=0.5)
        while self._tasks or self._processes:  # some may still be starting
            await asyncio.gather(*map(self.end, list(self._processes)))
            await asyncio.sleep(0.005)

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine that `close` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _import(self) -> Template:
        template = Template(self._show)
        self._processes.add(template)
        await template.start(self._settings, self._folder, self._environment)
        problem, about = "", {}
        try:
            kind, _, body = await asyncio.wait_for(template.read(), self._start_timeout_s)
            about = PlainUnpickler(io.BytesIO(body)).load()
            problem = about if kind == wire.FAILED else ""
        except TimeoutError:
            problem = f"was not imported within {self._start_timeout_s:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            problem = "ended its process while it was imported"
        if problem:
            await self.end(template)
            last = _last_line(template.tail) if "ended its process" in problem else ""
            text = problem if self._name in problem else f"{self._name}: {problem}"
            raise UserError(text + (f"; it last printed: {last}" if last else ""))
        self.about = about
        template.alone = about["alone"]
        if template.alone:
            await template.serve()
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await template.read()
            self.spare.append(template)
        else:
            self._template = template
            self.background(self._watch_template(template))
        return template

    async def _watch_template(self, template: Template) -> None:
        await template.ended.wait()
        if self._template is template:
            self._template = None
        await self.end(template)

    async def _make_spare(self) -> None:
        try:
            await self._import()
        except UserError as error:  # the next call tries again, and tells
            _log.error("a worker process did not start: %s", error)

    def _show(self, line: bytes) -> None:
        """Writes a line that user code printed to stderr."""
        text = self._budget.take(line + b"\n").decode("utf-8", "replace")
        lines = [part for part in text.splitlines() if part.strip()]
        sys.stderr.write("".join(f"[{self._label}] {part}\n" for part in lines))
        sys.stderr.flush()


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, int, bytes]:
    head = await reader.readexactly(wire.HEADER.size)
    kind, number, length = wire.HEADER.unpack(head)
    return kind, number, await reader.readexactly(length)


def explain(status: int | None) -> str:
    """Returns how a process ended, from its exit status."""
    if status is None:
        return "with the process that watches it"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"exit status {status}"


class PlainUnpickler(pickle.Unpickler):
    """Unpickles plain values and this package's records; refuses every other class, so imports no user code."""

    _classes = {
        ("rftjax.types", name) for name in ("Score", "Turn", "Task", "Sequence", "Trajectory")
    } | {("builtins", name) for name in ("set", "frozenset", "complex", "bytearray")}

    def find_class(self, module_name: str, global_name: str) -> Callable[..., Any]:
        if (module_name, global_name) not in self._classes:
            raise pickle.UnpicklingError(
                f"it holds a {module_name}.{global_name}; return plain Python values"
            )
        return super().find_class(module_name, global_name)


def import_path() -> str:
    # Enough to import this package; the settings hold the full sys.path.
    root = Path(__file__).absolute().parents[2]
    return f"import sys; sys.path.insert(0, {str(root)!r}); "


def death(process: Process) -> str:
    """Returns how a process ended, with the last line that it printed."""
    text = f"the worker process died ({explain(process.status)})"
    last = _last_line(process.tail)
    return text + (f"; it last printed: {last}" if last else "")


def _last_line(tail: str) -> str:
    """Returns the last printed line; "" where the interpreter printed a fatal error."""
    lines = [] if "Fatal Python error" in tail else tail.split("\n")
    return next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "")


def allow_open_files() -> None:
    """Raises the soft limit of open files, because each worker takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
