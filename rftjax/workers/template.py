"""Processes that run user code: a template, which imports it once, and the workers that are forked from it.

The parent of every template and worker is a guardian, which runs no user code. The guardian forwards what the worker
prints and waits until the worker ends or the life socket is closed (the main process closes it, or dies). It then kills
the worker and all its descendants. Standard library only, and never JAX: a template starts in well under a second and
holds no accelerator.

A fork would share or lose the threads, child processes, open files and sockets that an import leaves behind. User code
that leaves any is not forked: each worker imports it anew.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from typing import Any, NoReturn

from rftjax.workers import serving, wire
from rftjax.workers.serving import Channel

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """Runs a guardian and a template; argv[1] is the JSON object from `processes.Template.start`."""
    settings = json.loads(sys.argv[1])
    sys.argv = [""]
    sys.path[:] = settings["path"]
    life_fd, data_fd, control_fd = settings["fds"]
    for fd in (life_fd, data_fd, control_fd):
        os.set_inheritable(fd, False)
    _split(life_fd, (data_fd, control_fd))
    # Writing a core file takes longer than the time limit.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _set_oom_score(700)  # out of memory: the kernel kills workers first, then this, then training
    sys.stdout = sys.stderr = os.fdopen(  # as long as the process lasts
        1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    faulthandler.enable(2, all_threads=False)
    serving.withheld.update(dict.fromkeys(settings["withheld"], settings["env_field"]))
    channel = Channel(data_fd)
    before = _open_files()
    handler = serving.load(channel, settings)
    reason = _why_not_forked(before)
    serving.ready(channel, handler, reason)
    control = socket.socket(fileno=control_fd)
    if not reason:
        gc.collect()
        gc.freeze()  # so that garbage collection in workers does not copy shared pages
    command = _serve_forks(control, channel, handler, settings)
    control.close()
    if command == wire.SERVE:
        serving.serve(channel, handler, settings["timeout_s"])
    sys.exit(0)


def _serve_forks(
    control: socket.socket, channel: Channel, handler: Any, settings: dict[str, Any]
) -> bytes:
    """Forks a worker for each FORK command; returns the first other command."""
    guardians: set[int] = set()
    while True:
        command, fds, _, _ = socket.recv_fds(control, 1, 2)
        guardians = {pid for pid in guardians if os.waitpid(pid, os.WNOHANG)[0] == 0}
        if command != wire.FORK:
            return command
        data_fd, life_fd = fds
        with warnings.catch_warnings():
            # Libraries warn of forks with threads; this process has none.
            warnings.simplefilter("ignore")
            try:
                pid = os.fork()
            except OSError as error:  # process limit: the closed sockets report it
                sys.stderr.write(f"no worker could be started: {error}\n")
                pid = -1
        if pid == 0:
            control.close()
            os.close(channel.fd)
            _work(data_fd, life_fd, handler, settings["timeout_s"])
        if pid > 0:
            guardians.add(pid)
        os.close(data_fd)
        os.close(life_fd)


def _work(data_fd: int, life_fd: int, handler: Any, timeout_s: float) -> NoReturn:
    """Splits a newly forked process into guardian and worker."""
    for fd in (data_fd, life_fd):
        os.set_inheritable(fd, False)
    _split(life_fd, (data_fd,))
    _set_oom_score(800)
    # Reseed, as Python does its own generator: workers must not draw the same numbers.
    for name in ("numpy.random", "torch"):
        if module := sys.modules.get(name):
            module.seed()
    atexit._clear()  # exit handlers from before the fork belong to the template
    try:
        serving.serve(Channel(data_fd), handler, timeout_s)
        atexit._run_exitfuncs()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(0)  # no teardown of objects that the template made


def _split(life_fd: int, others: tuple[int, ...]) -> None:
    """Forks: the parent becomes the guardian and never returns; the child returns, its output piped to the guardian.

    The guardian closes the descriptors `others`.
    """
    _linux_prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphaned grandchildren come to the guardian
    guardian = os.getpid()
    wake_read, wake_write = os.pipe()
    printed_read, printed_write = os.pipe()
    # Shared with the guardian, which writes the number of a call here before it sends SIGUSR2.
    interrupted = mmap.mmap(-1, wire.INTERRUPT.size)
    interrupted[:] = wire.INTERRUPT.pack(-1)
    os.set_blocking(wake_write, False)
    old_wakeup = signal.set_wakeup_fd(wake_write)
    old_handler = signal.signal(signal.SIGCHLD, lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        for fd in (*others, printed_write):
            os.close(fd)
        _guard(pid, life_fd, wake_read, printed_read, interrupted)
    serving.interrupted = interrupted
    signal.set_wakeup_fd(old_wakeup)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if old_handler is None else old_handler)
    os.setpgid(0, 0)
    _linux_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for fd in (1, 2):
        os.dup2(printed_write, fd)
    for fd in (null, wake_read, wake_write, printed_read, printed_write, life_fd):
        os.close(fd)


class _Output:
    """What a worker prints: the start is shown, the end is kept for the message of a crash."""

    def __init__(self, printed_fd: int, life_fd: int):
        self._printed_fd, self._life_fd = printed_fd, life_fd
        self._budget = wire.Budget()
        self.tail = b""
        self.open = True
        os.set_blocking(printed_fd, False)

    def pass_on(self) -> bool:
        """Forwards one block of output; returns whether there was any."""
        try:
            data = os.read(self._printed_fd, 2**16)
        except BlockingIOError:
            return False
        if not data:
            self.open = False
            return False
        self.tail = (self.tail + data)[-wire.TAIL_BYTES :]
        if shown := self._budget.take(data):
            _tell(self._life_fd, wire.PRINTED, 0, shown)
        return True


def _tell(life_fd: int, kind: bytes, number: int, body: bytes) -> None:
    frame = memoryview(wire.HEADER.pack(kind, number, len(body)) + body)
    with contextlib.suppress(OSError):  # the main process may be gone
        while frame:
            frame = frame[os.write(life_fd, frame) :]


def _guard(
    worker: int, life_fd: int, wake_fd: int, printed_fd: int, interrupted: mmap.mmap
) -> NoReturn:
    """Waits for the worker, kills its descendants, reports its exit status (negative: the signal) and exits."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    status, alive = 0, True
    output = _Output(printed_fd, life_fd)
    while alive:
        watched = [life_fd, wake_fd, *([printed_fd] if output.open else [])]
        readable, _, _ = select.select(watched, [], [])
        if printed_fd in readable:
            output.pass_on()
        if wake_fd in readable:
            os.read(wake_fd, 4096)
        for pid, ended in _reap():
            if pid == worker:
                alive, status = False, ended
        if alive and life_fd in readable:
            told = _read_life(life_fd)
            if not told:
                break
            interrupted[:] = told
            os.kill(worker, signal.SIGUSR2)
    _kill_descendants(worker)
    give_up = time.monotonic() + 2.0
    while time.monotonic() < give_up:
        try:
            for pid, ended in _reap(raise_if_none=True):
                status = ended if pid == worker else status
        except ChildProcessError:
            break
        _kill_descendants(worker)  # orphans become children here one generation at a time
        time.sleep(0.002)
    for _ in range(32):  # a pipe holds less
        if not output.pass_on():
            break
    _tell(life_fd, wire.ENDED, os.waitstatus_to_exitcode(status), output.tail)
    os._exit(0)


def _read_life(life_fd: int) -> bytes:
    try:
        return os.read(life_fd, wire.INTERRUPT.size)
    except ConnectionError:
        return b""


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
    """Kills the worker's process group and, on Linux, orphans that left the group."""
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


def _open_files() -> set[tuple[int, str]]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.add((int(entry), os.readlink(f"/proc/self/fd/{entry}")))
    return found


def _threads() -> list[str]:
    """Names of this process's threads, except one that restarts by itself after a fork."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{entry}/comm") as file:
                found.append(file.read().strip())
    return [name for name in found if name != "jemalloc_bg_thd"]


def _why_not_forked(before: set[tuple[int, str]]) -> str:
    """Returns why the imported code cannot be forked, "" where it can."""
    if len(sys._current_frames()) > 1 or len(_threads()) > 1:
        return "starts threads"
    opened = [
        name for _, name in _open_files() - before if not name.startswith(("/dev/", "/proc/"))
    ]
    if opened:
        return f"leaves {opened[0]} open"
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return "starts processes"
    return ""


def _set_oom_score(score: int) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(score))


def _linux_prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
