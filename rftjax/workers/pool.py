"""A pool of processes that run user code, so that no fault of it reaches training.

Every call has a time limit, counted from its start. A call fails with a WorkerError where it overruns, its process dies
(`os._exit`, a crash, out of memory) or its result cannot be pickled. A process that overran is killed with all its
descendants. All processes end with the main process, however that ends.

A template process imports user code once, and workers are forked from it (`template` says what happens to code that
cannot be forked). Calls without a session share `count` workers, each of which runs one call at a time. A session has
its own worker, so no session can break another. With a coroutine function each shared worker runs many calls at once;
if such a worker ends, every call that may be at fault is retried in a worker of its own.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import pickle
import threading
from collections.abc import Iterable
from typing import Any

from rftjax.errors import UserError
from rftjax.workers import wire
from rftjax.workers.processes import (
    PlainUnpickler,
    Process,
    Supply,
    Template,
    allow_open_files,
    death,
)

_CLOSED = "the workers were closed"
_GRACE_S = 2.0  # that an interrupted call has to end
_TRIES = 3  # of a bystander in a shared worker; after that it gets a worker of its own


def done(value: Any) -> concurrent.futures.Future[Any]:
    """Returns a future that already has its result."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(value)
    return future


class WorkerError(RuntimeError):
    """A call that failed; `details` is the traceback, or the last output of a dead process.

    `bystander` is true where another call or the machine is at fault.
    """

    def __init__(self, reason: str, details: str = "", *, bystander: bool = False):
        super().__init__(reason)
        self.details, self.bystander = details, bystander


@dataclasses.dataclass(eq=False)
class _Call:
    number: int
    body: bytes
    future: concurrent.futures.Future[Any]
    session: str = ""
    last: bool = False  # of its session
    urgent: bool = False  # it interrupts the running call
    alone: bool = (
        False  # in a session of its own, because it may be at fault for the end of a worker
    )
    tries: int = 0
    timer: asyncio.TimerHandle | None = None

    def fail(self, error: WorkerError) -> None:
        if self.timer:
            self.timer.cancel()
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # done or cancelled
            self.future.set_exception(error)

    def finish(self, value: Any) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # done or cancelled
            self.future.set_result(value)

    def begin(self) -> bool:
        """Marks the call as running; False where it was cancelled or has already failed."""
        if self.future.running():  # it runs once more
            return True
        return not self.future.done() and self.future.set_running_or_notify_cancel()


@dataclasses.dataclass(eq=False)
class _Worker:
    """One worker and its calls; `ended` says why it takes no more."""

    session: str = ""
    capacity: int = 1
    process: Process | None = None
    starting: bool = False
    running: dict[int, _Call] = dataclasses.field(default_factory=dict)
    queue: collections.deque[_Call] = dataclasses.field(default_factory=collections.deque)
    blamed: _Call | None = None  # the call that is being interrupted
    cleared: bool = False  # it was stopped, and the call at fault is known
    ended: str = ""


class Workers:
    """Processes that call `target`, the name of user code: `count` calls at once, `timeout_s` seconds each.

    In the worker, `wrapper` ("module:name") gets `target` and `field`, loads it and returns the function to call; its
    attribute `about` becomes `Workers.about`. The constructor waits for the import and raises ValueError where it
    fails; messages name the config fields `field`, `limit_field` and `env_field`. `env` lists environment variables to
    pass on besides the harmless ones. Results are plain values and this package's records: unpickling one never imports
    user code in the main process.
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
        env: Iterable[str] = (),
        env_field: str = "env",
        concurrency: int = 64,
        start_timeout_s: float = 120.0,
    ):
        if count < 1:
            raise UserError(f"{field or target}: {count} worker processes; at least 1 is needed")
        if not timeout_s > 0:
            raise UserError(f"{field or target}: a time limit of {timeout_s} s; it must be above 0")
        self.timeout_s = timeout_s
        self._supply = Supply(
            {"target": target, "wrapper": wrapper, "field": field, "timeout_s": timeout_s},
            label=field,
            env=env,
            env_field=env_field,
            start_timeout_s=start_timeout_s,
        )
        self._count, self._concurrency = count, concurrency
        self._limit = f"the time limit of {timeout_s:g} s" + (limit_field and f" ({limit_field})")
        self._numbers = itertools.count()
        self._shared: list[_Worker] = []
        self._waiting: collections.deque[_Call] = collections.deque()
        self._sessions: dict[str, _Worker] = {}
        # Sessions with calls to begin.
        self._pending: collections.deque[_Worker] = collections.deque()
        self._busy = 0  # calls of sessions that run
        self.bystanders = 0  # calls stopped by another call's fault so far; most are retried
        self._closed = False
        allow_open_files()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="workers", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._supply.begin(count), self._loop).result()
        except BaseException:
            self.close()
            raise
        self.about = self._supply.about["about"]
        self._asynchronous = self._supply.about["async"]

    def submit(
        self, *args: Any, session: str = "", last: bool = False, urgent: bool = False
    ) -> concurrent.futures.Future[Any]:
        """Queues a call and returns its future, which raises WorkerError where user code fails.

        Calls of one `session` run in order, in one process that no other call uses; they fail when it ends. The `last`
        call replaces the queued ones, runs even if an earlier call overran (as long as the process lives), and ends the
        process; it does nothing if the session never began. An `urgent` call interrupts the running one.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if self._closed:
            future.set_exception(WorkerError(_CLOSED, bystander=True))
            return future
        try:
            body = pickle.dumps(args, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            future.set_exception(WorkerError(f"the arguments cannot be pickled: {error}"))
            return future
        call = _Call(next(self._numbers), body, future, session, last, urgent)
        self._loop.call_soon_threadsafe(self._enqueue, call)
        return future

    def close(self) -> None:
        """Ends all processes and fails all queued calls; a second call does nothing."""
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

    # Everything below runs on the thread of the pool's event loop.

    def _enqueue(self, call: _Call) -> None:
        if self._closed:
            call.fail(WorkerError(_CLOSED, bystander=True))
        elif not call.session:
            self._waiting.append(call)
        else:
            self._enqueue_in_session(call)
        self._pump()

    def _enqueue_in_session(self, call: _Call) -> None:
        worker = self._sessions.get(call.session)
        if worker is None:
            worker = self._sessions[call.session] = _Worker(call.session)
        if call.last:
            self._clear(worker, "the episode was closed before this call")
            if worker.process is None and not worker.starting:
                gone = worker.ended and WorkerError(worker.ended, bystander=True)
                del self._sessions[call.session]
                call.fail(gone) if gone else call.finish(None)
                return
        elif worker.ended:
            call.fail(WorkerError(worker.ended))
            return
        worker.queue.append(call)
        self._pending.append(worker)
        if call.urgent and worker.process is not None:
            for running in worker.running.values():
                self._overrun(worker, running)

    def _let_go(self, worker: _Worker) -> None:
        """Ends the process of a finished session, or keeps it as a spare where starting one means an import."""
        process, worker.process = worker.process, None
        if process is None or self._closed:
            return
        if isinstance(process, Template) and not worker.ended:
            self._supply.spare.append(process)
        else:
            self._supply.background(self._supply.end(process, within_s=1.0))
        worker.ended = worker.ended or "the episode is over"

    def _pump(self) -> None:
        """Starts as many queued calls as may run now."""
        if self._closed:
            return
        while self._waiting:
            free = [worker for worker in self._shared if len(worker.running) < worker.capacity]
            free = [worker for worker in free if not worker.ended]
            if len(self._shared) < self._count and (not free or free[0].running):
                worker = _Worker(capacity=self._concurrency if self._asynchronous else 1)
                self._shared.append(worker)
            elif free:
                worker = min(free, key=lambda worker: len(worker.running))
            else:
                break
            self._run(worker, self._waiting.popleft())
        for _ in range(len(self._pending)):
            worker = self._pending.popleft()
            if not worker.queue or worker.running:
                continue  # the answer of the running call puts it back
            if self._busy >= self._most(worker.queue[0]) and not worker.queue[0].last:
                self._pending.append(worker)
                continue
            self._run(worker, worker.queue.popleft())

    def _most(self, call: _Call) -> int:
        """Limit of session calls running at once, this one included."""
        if not self._asynchronous:
            return self._count
        return self._count * (4 if call.alone else self._concurrency)

    def _run(self, worker: _Worker, call: _Call) -> None:
        """Sends a call to a worker, after starting its process if it has none."""
        if not call.begin():
            if worker.session and worker.queue:
                self._pending.append(worker)
            return
        worker.running[call.number] = call
        self._busy += bool(worker.session and not call.last)
        if worker.process is not None:
            self._send(worker, call)
        elif not worker.starting:
            worker.starting = True
            self._supply.background(self._start(worker))

    async def _start(self, worker: _Worker) -> None:
        try:
            worker.process = await self._supply.process()
        except (UserError, OSError) as error:
            for call in list(worker.running.values()):
                self._take(worker, call)
                # Code that no longer imports is a fault of the user; a machine without processes is not.
                call.fail(WorkerError(str(error), bystander=isinstance(error, OSError)))
            worker.ended = str(error)
            self._forget(worker)
            return
        finally:
            worker.starting = False
        self._supply.background(self._listen(worker, worker.process))
        for call in worker.running.values():
            self._send(worker, call)

    def _send(self, worker: _Worker, call: _Call) -> None:
        assert worker.process is not None
        worker.process.send(call.number, call.body)
        # An asynchronous worker enforces the limits of its calls; this timer is for a worker that hangs.
        limit_s = 2 * self.timeout_s + 2.0 if self._asynchronous else self.timeout_s
        alone = worker.capacity == 1
        if alone and self._asynchronous:
            limit_s = self.timeout_s + 1.0
        blamed = call if alone else None
        call.timer = self._loop.call_later(limit_s, self._overrun, worker, blamed)

    async def _listen(self, worker: _Worker, process: Process) -> None:
        """Receives answers of one process until it ends or becomes a spare, then settles its calls."""
        try:
            while worker.process is process:
                kind, number, body = await process.read()
                call = worker.running.get(number)
                if kind == wire.BLOCKED:
                    self._overrun(worker, call)
                elif call is not None:
                    self._answer(worker, call, kind, body)
            return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        stopped = bool(worker.ended)
        if worker.process is process:
            worker.process = None
            await self._supply.end(process)
            worker.ended = worker.ended or death(process)
            self._settle(worker, stopped, process)
            self._forget(worker)

    def _answer(self, worker: _Worker, call: _Call, kind: bytes, body: bytes) -> None:
        self._take(worker, call)
        worker.blamed = None
        try:
            value = PlainUnpickler(io.BytesIO(body)).load()
        except Exception as error:
            call.fail(WorkerError(f"the result cannot be read: {error}"))
        else:
            if kind == wire.VALUE:
                call.finish(value)
            elif kind == wire.OVERRUN:
                call.fail(WorkerError(f"overran {self._limit}"))
                if worker.session:
                    worker.ended = f"an earlier call of the episode overran {self._limit}"
                    self._clear(worker, worker.ended)
            else:
                call.fail(WorkerError(*value))
        if call.last or call.alone:
            self._sessions.pop(call.session, None)
            self._let_go(worker)
        elif worker.queue:
            self._pending.append(worker)
        self._pump()

    def _overrun(self, worker: _Worker, blamed: _Call | None) -> None:
        """Ends a call that overran, and its worker if necessary; `blamed` is None where the call is unknown."""
        process = worker.process
        if process is None or worker.blamed is not None or (blamed and blamed.future.done()):
            return
        if blamed is None and len(worker.running) == 1:
            (blamed,) = worker.running.values()
        worker.blamed = blamed
        if worker.session and blamed is not None:
            # Interrupt only, so that the environment can still be closed.
            process.interrupt(blamed.number)
            self._loop.call_later(_GRACE_S, self._stop, worker, process, blamed)
        else:
            self._stop(worker, process, blamed)

    def _stop(self, worker: _Worker, process: Process, blamed: _Call | None) -> None:
        if worker.process is not process or (blamed and blamed.future.done()):
            return
        worker.ended = f"the worker process was stopped because a call in it overran {self._limit}"
        if blamed is not None:
            self._take(worker, blamed)
            blamed.fail(WorkerError(f"overran {self._limit}"))
            worker.cleared = True
        process.kill()

    def _settle(self, worker: _Worker, stopped: bool, process: Process) -> None:
        """Fails or retries the calls of a process that has ended; `stopped` is true where `_stop` ended it."""
        calls = list(worker.running.values())
        for call in calls:
            self._take(worker, call)
        details = "" if stopped else process.tail
        innocent = worker.cleared or (process.status is None and not stopped)
        if not self._closed:
            self.bystanders += len(calls) if innocent else max(0, len(calls) - 1)
        for call in calls:
            call.tries += 1
            if self._closed:
                call.fail(WorkerError(_CLOSED, bystander=True))
            elif worker.session or not (innocent or len(calls) > 1):
                call.fail(WorkerError(worker.ended, details, bystander=innocent))
            elif innocent and call.tries < _TRIES:
                self._waiting.appendleft(call)
            else:  # it may be at fault, or was a bystander too often
                call.alone, call.session = True, f"alone {call.number}"
                self._enqueue_in_session(call)

    def _forget(self, worker: _Worker) -> None:
        """Removes a worker whose process is gone; a session stays until its last call, to report the reason."""
        self._clear(worker, worker.ended, bystander=self._closed)
        if worker in self._shared:
            self._shared.remove(worker)
        if worker.session.startswith("alone "):
            self._sessions.pop(worker.session, None)
        self._pump()

    def _clear(self, worker: _Worker, reason: str, *, bystander: bool = False) -> None:
        """Fails the queued calls of a session, except the last call where that can still run."""
        kept = [call for call in worker.queue if call.last and worker.process is not None]
        for call in worker.queue:
            if call not in kept:
                call.fail(WorkerError(reason, bystander=bystander))
        worker.queue = collections.deque(kept)

    def _take(self, worker: _Worker, call: _Call) -> None:
        """Removes a call from the running ones."""
        del worker.running[call.number]
        self._busy -= bool(worker.session and not call.last)
        if call.timer:
            call.timer.cancel()

    async def _shut_down(self) -> None:
        while self._waiting:
            self._waiting.popleft().fail(WorkerError(_CLOSED, bystander=True))
        workers = [*self._shared, *self._sessions.values()]
        for worker in workers:
            self._clear(worker, _CLOSED, bystander=True)
            worker.ended = worker.ended or _CLOSED
        await self._supply.close({worker.process for worker in workers if worker.running})
