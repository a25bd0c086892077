"""A pool of processes that run user code, so that no fault of it reaches training.

Every call has a time limit that counts from when it begins to run. A call that overruns, a process that dies
(`os._exit`, a crash, no memory) and a result that cannot be sent end that call with a WorkerError; the process is
killed with everything it started, and replaced. The processes end when this one ends, in whatever way.

A coroutine function runs many calls at once in each process. Where one of them takes the process down, the others are
run once more, each alone, so that only the call at fault is lost.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import io
import itertools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from rftjax import worker_main as wire
from rftjax.errors import UserError

_log = logging.getLogger(__name__)
_BOOT = "from rftjax.worker_main import main; main()"
_ALLOWED_CLASSES = {
    ("rftjax.types", name) for name in ("Score", "Turn", "Task", "Sequence", "Trajectory")
} | {("builtins", name) for name in ("set", "frozenset", "complex", "bytearray")}


class WorkerError(RuntimeError):
    """A call that user code did not answer; `details` is the traceback where there is one."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(reason)
        self.details = details


@dataclasses.dataclass(eq=False)
class _Call:
    number: int
    body: bytes
    future: concurrent.futures.Future[Any]
    session: str
    alone: bool = False
    timer: asyncio.TimerHandle | None = None


@dataclasses.dataclass(eq=False)
class _Process:
    """One worker process as the pool sees it; `ended` says why it takes no more calls."""

    popen: subprocess.Popen[bytes]
    life_fd: int
    reader: asyncio.StreamReader
    source: asyncio.ReadTransport
    writer: asyncio.WriteTransport
    capacity: int = 1
    running: dict[int, _Call] = dataclasses.field(default_factory=dict)
    queue: collections.deque[_Call] = dataclasses.field(default_factory=collections.deque)
    sessions: set[str] = dataclasses.field(default_factory=set)
    ended: str = ""

    def has_room_for(self, call: _Call) -> bool:
        if self.ended or len(self.running) >= self.capacity:
            return False
        return not self.running or not (call.alone or any(c.alone for c in self.running.values()))


class Workers:
    """`count` processes that call `target`, the name of user code, with a limit of `timeout_s` seconds a call.

    `wrapper` ("module:name") is called in the process with the resolved target and returns what is called instead; its
    attribute `about` is passed on. Construction waits until the target is imported everywhere and raises ValueError
    where it does not import; messages name the config fields `field` and `limit_field`. Results are plain values,
    Score, Turn and the like: reading one never imports user code here.
    """

    def __init__(
        self,
        target: str,
        count: int,
        timeout_s: float,
        *,
        wrapper: str = "",
        field: str = "",
        limit_field: str = "",
        concurrency: int = 64,
        start_timeout_s: float = 120.0,
    ):
        if count < 1:
            raise UserError(f"{field or target}: {count} worker processes; at least 1 is needed")
        if not timeout_s > 0:
            raise UserError(f"{field or target}: a time limit of {timeout_s} s; it must be above 0")
        self.timeout_s = timeout_s
        self.about = ""
        self._name = f"{field}={target!r}" if field else repr(target)
        self._settings = {
            "target": target,
            "wrapper": wrapper,
            "field": field,
            "timeout_s": timeout_s,
        }
        self._concurrency, self._start_timeout_s = concurrency, start_timeout_s
        self._limit = f"the time limit of {timeout_s:g} s" + (limit_field and f" ({limit_field})")
        self._folder = os.getcwd()
        self._numbers = itertools.count()
        self._slots: list[_Process | None] = [None] * count
        self._starting: set[int] = set()
        self._alive: set[_Process] = set()
        self._waiting: collections.deque[_Call] = collections.deque()
        self._homes: dict[str, _Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="workers", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start_all(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def submit(self, *args: Any, session: str = "") -> concurrent.futures.Future[Any]:
        """Queues a call and returns its future, which raises WorkerError where user code fails.

        Calls with the same `session` run in one process, until `end_session`; where that process ends they fail.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if self._closed:
            raise RuntimeError(f"{self._name}: the workers are closed")
        try:
            body = pickle.dumps(args, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            future.set_exception(WorkerError(f"the arguments cannot be pickled: {error}"))
            return future
        call = _Call(next(self._numbers), body, future, session)
        self._loop.call_soon_threadsafe(self._enqueue, call)
        return future

    def end_session(self, session: str) -> None:
        """Forgets a session; a call of it that is still queued runs before that."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._forget, session)

    def close(self) -> None:
        """Ends all processes and fails what is still queued; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Everything below runs on the pool's own thread, one thing at a time.

    async def _start_all(self) -> None:
        results = await asyncio.gather(
            *(self._start(slot) for slot in range(len(self._slots))), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _start(self, slot: int) -> None:
        """Brings up one process; raises ValueError where the target does not import in it."""
        self._starting.add(slot)
        try:
            process = await self._spawn()
            try:
                kind, _, body = await asyncio.wait_for(_read(process), self._start_timeout_s)
                about = _PlainUnpickler(io.BytesIO(body)).load()
            except TimeoutError:
                problem = f"was not imported within {self._start_timeout_s:g} s"
            except (asyncio.IncompleteReadError, ConnectionError):
                problem = "ended its process while it was imported"
            else:
                problem = about if kind == wire.FAILED else ""
            if problem:
                await self._end(process, problem)
                raise UserError(problem if self._name in problem else f"{self._name}: {problem}")
        finally:
            self._starting.discard(slot)
        process.capacity = self._concurrency if about["async"] else 1
        self.about = about["about"]
        self._slots[slot] = process
        self._background(self._listen(slot, process))
        self._pump()

    async def _spawn(self) -> _Process:
        life_read, life_write = os.pipe()
        settings = self._settings | {"path": sys.path, "life_fd": life_read}
        try:
            popen = subprocess.Popen(
                [sys.executable, "-c", _import_path() + _BOOT, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(life_read,),
                start_new_session=True,
                cwd=self._folder,
                # User code that imports JAX must not take the accelerator's memory.
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        except BaseException:
            os.close(life_write)
            raise
        finally:
            os.close(life_read)
        reader = asyncio.StreamReader()
        source, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), popen.stdout
        )
        writer, _ = await self._loop.connect_write_pipe(asyncio.BaseProtocol, popen.stdin)
        process = _Process(popen, life_write, reader, source, writer)
        self._alive.add(process)
        return process

    async def _listen(self, slot: int, process: _Process) -> None:
        """Takes one process's answers until it ends, then settles its calls and replaces it."""
        try:
            while True:
                kind, number, body = await _read(process)
                if kind == wire.BLOCKED:
                    self._stop(process, process.running.get(number))
                elif (call := process.running.pop(number, None)) is not None:
                    self._answer(call, kind, body)
                    self._pump()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        own_end = not process.ended
        status = await self._end(process, "")
        if own_end:
            process.ended = f"the worker process died ({_explain(status)})"
        self._settle(process, own_end)
        self._slots[slot] = None
        if not self._closed:
            await self._restart(slot)

    def _answer(self, call: _Call, kind: bytes, body: bytes) -> None:
        try:
            value = _PlainUnpickler(io.BytesIO(body)).load()
        except Exception as error:
            self._fail(call, WorkerError(f"the result cannot be read: {error}"))
            return
        if kind == wire.VALUE:
            if call.timer:
                call.timer.cancel()
            call.future.set_result(value)
        elif kind == wire.OVERRUN:
            self._fail(call, self._overrun_error())
        else:
            self._fail(call, WorkerError(*value))

    def _settle(self, process: _Process, own_end: bool) -> None:
        """Fails, or queues once more, the calls of a process that has ended."""
        found = own_end and len(process.running) == 1
        for call in process.running.values():
            if call.timer:
                call.timer.cancel()
            guilty = found or call.alone or process.capacity == 1
            if guilty or call.session or self._closed:
                self._fail(call, WorkerError(process.ended))
            else:
                call.alone = True
                self._waiting.appendleft(call)
        for call in process.queue:
            self._fail(call, WorkerError(process.ended))
        process.running.clear()
        process.queue.clear()

    async def _restart(self, slot: int) -> None:
        try:
            await self._start(slot)
        except Exception as error:  # the next call tries again
            if self._closed:
                return
            _log.error("a worker process did not start again: %s", error)
            if not self._starting and not any(self._slots):
                while self._waiting:
                    self._fail(self._waiting.popleft(), WorkerError(str(error)))

    def _enqueue(self, call: _Call) -> None:
        if self._closed:
            self._fail(call, WorkerError("the workers were closed"))
            return
        home = self._homes.get(call.session) if call.session else None
        if home is None:
            self._waiting.append(call)
        elif home.ended:
            self._fail(call, WorkerError(home.ended))
        else:
            home.queue.append(call)
        for slot, process in enumerate(self._slots):
            if process is None and slot not in self._starting:
                self._starting.add(slot)
                self._background(self._restart(slot))
        self._pump()

    def _pump(self) -> None:
        """Sends every call for which there is room now."""
        ready = [process for process in self._slots if process is not None and not process.ended]
        while self._waiting and ready:
            call = self._waiting[0]
            if call.session:
                home = self._homes.get(call.session) or min(
                    ready, key=lambda process: len(process.sessions)
                )
                home.sessions.add(call.session)
                self._homes[call.session] = home
                home.queue.append(self._waiting.popleft())
                continue
            free = [process for process in ready if process.has_room_for(call)]
            if not free:
                break
            self._send(min(free, key=lambda process: len(process.running)), self._waiting.popleft())
        for process in ready:
            while process.queue and process.has_room_for(process.queue[0]):
                self._send(process, process.queue.popleft())

    def _send(self, process: _Process, call: _Call) -> None:
        if not call.future.running() and not call.future.set_running_or_notify_cancel():
            return
        process.running[call.number] = call
        process.writer.write(wire.HEADER.pack(wire.CALL, call.number, len(call.body)) + call.body)
        # A process with many calls at once sees to their limits itself: this is for when it hangs as a whole.
        many = process.capacity > 1
        limit_s = 2 * self.timeout_s + 2.0 if many else self.timeout_s
        blamed = None if many and not call.alone else call
        call.timer = self._loop.call_later(limit_s, self._stop, process, blamed)

    def _stop(self, process: _Process, blamed: _Call | None) -> None:
        """Kills a process because `blamed`, or an unknown one of its calls, overran."""
        if process.ended:
            return
        process.ended = (
            f"the worker process was stopped because another call in it overran {self._limit}"
        )
        if blamed is None and len(process.running) == 1:
            (blamed,) = process.running.values()
        if blamed is not None:
            process.running.pop(blamed.number, None)
            self._fail(blamed, self._overrun_error())
        self._kill(process)

    def _overrun_error(self) -> WorkerError:
        return WorkerError(f"overran {self._limit}")

    def _fail(self, call: _Call, error: WorkerError) -> None:
        if call.timer:
            call.timer.cancel()
        if not call.future.done():
            call.future.set_exception(error)

    def _forget(self, session: str) -> None:
        process = self._homes.pop(session, None)
        if process is not None:
            process.sessions.discard(session)

    def _kill(self, process: _Process) -> None:
        """Lets go of the life pipe, at which the guardian kills all; the end of the answers follows."""
        if process.life_fd >= 0:
            os.close(process.life_fd)
            process.life_fd = -1
            self._loop.call_later(3.0, _give_up, process)

    async def _end(self, process: _Process, reason: str) -> int:
        """Waits until process and guardian are gone, killing them; returns the exit status."""
        process.ended = process.ended or reason
        self._kill(process)
        if not process.writer.is_closing():
            process.writer.abort()
        while (status := process.popen.poll()) is None:
            await asyncio.sleep(0.005)
        process.source.close()
        self._alive.discard(process)
        return status

    async def _shut_down(self) -> None:
        processes = [process for process in self._slots if process is not None]
        for process in processes:
            process.ended = process.ended or "the workers were closed"
            process.writer.close()  # an idle worker ends by itself at the end of its input
        for _ in range(50):
            if all(process.popen.poll() is not None for process in processes):
                break
            await asyncio.sleep(0.01)
        while self._tasks or self._alive:
            for process in self._alive:  # one that is just being started is among them
                self._kill(process)
            await asyncio.sleep(0.005)
        while self._waiting:
            self._fail(self._waiting.popleft(), WorkerError("the workers were closed"))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Callable[..., Any]:
        if (module_name, global_name) not in _ALLOWED_CLASSES:
            raise pickle.UnpicklingError(
                f"it holds a {module_name}.{global_name}; return plain Python values"
            )
        return super().find_class(module_name, global_name)


async def _read(process: _Process) -> tuple[bytes, int, bytes]:
    head = await process.reader.readexactly(wire.HEADER.size)
    kind, number, length = wire.HEADER.unpack(head)
    return kind, number, await process.reader.readexactly(length)


def _give_up(process: _Process) -> None:
    """Ends the wait for a pipe that a stray descendant keeps open, and a guardian that does not go."""
    if process.popen.poll() is None:
        process.popen.kill()
    process.reader.feed_eof()


def _import_path() -> str:
    # Only so far as to find this package: user code's own search path comes with the settings.
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return f"import sys; sys.path.insert(0, {root!r}); "


def _explain(status: int) -> str:
    if status > 128:
        try:
            name = signal.Signals(status - 128).name
        except ValueError:
            return f"exit status {status}"
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"exit status {status}"
