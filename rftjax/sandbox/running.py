"""Starts sandboxed programs, watches their limits and collects what they write."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rftjax.errors import UserError
from rftjax.sandbox.limits import Limits, Result

BOUNDARY = str(Path(__file__).with_name("boundary.py"))
CODE = "/code"  # where a program finds the files that it is run with
# What some interpreters need to start; the program inside gets none of it.
LOADER = ("LD_LIBRARY_PATH",)
POLL_S = 0.02
DEFAULT = Limits()
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/usr", "/etc/ld.so.cache", "/etc/alternatives")
CPU_SIGNAL = 128 + signal.SIGXCPU
_numbers = itertools.count(os.getpid() % 65536 << 8)


def run(
    command: Sequence[str],
    *,
    stdin: str | bytes = "",
    limits: Limits = DEFAULT,
    files: Mapping[str, str] | None = None,
    readable: Sequence[str | Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Result:
    """Runs a program inside the sandbox; raises UserError where this machine has none.

    `command[0]` is an absolute path. The program sees the system's libraries, Python's own folders, the paths of
    `readable` and `files` (texts by their names) in the folder `/code`, all read-only; an empty `/tmp`, which is its
    working directory; and the variables of `environment` alone.
    """
    way, reason = support()
    if not way:
        raise UserError(reason)
    with contextlib.ExitStack() as held:
        memory = {f"{CODE}/{name}": _in_memory(text, held) for name, text in (files or {}).items()}
        return _run(way, command, stdin, limits, readable, environment or {}, memory)


def run_python(
    code: str,
    *,
    stdin: str | bytes = "",
    limits: Limits = DEFAULT,
    readable: Sequence[str | Path] = (),
) -> Result:
    """Runs Python source as `run` does, by this interpreter with its installed packages."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return run(
        [sys.executable, "-s", f"{CODE}/main.py"],
        stdin=stdin,
        limits=limits,
        files={"main.py": code},
        readable=readable,
        environment=environment,
    )


def require(field: str) -> None:
    """Raises UserError where this machine has no sandbox; `field` names what asks for one."""
    way, reason = support()
    if not way:
        raise UserError(f"{field}: {reason}")


@functools.cache
def support() -> tuple[str, str]:
    """Returns how this machine draws the boundary, "namespaces" or "bubblewrap", or "" and why none of them works."""
    if not sys.platform.startswith("linux"):
        return (
            "",
            f"code cannot be sandboxed on {sys.platform}: use Linux, or an evaluator that runs no code",
        )
    told = []
    ways = ["namespaces"] + (["bubblewrap"] if shutil.which("bwrap") else [])
    for way in ways:
        try:
            result = _run(way, ["/bin/sh", "-c", "echo inside"], "", DEFAULT, [], {}, {})
        except UserError as error:
            told.append(f"{way}: {error}")
            continue
        if result.output == "inside\n":
            return way, ""
        told.append(f"{way}: the trial ended with {result}")
    advice = (
        "allow user namespaces (kernel.unprivileged_userns_clone=1, user.max_user_namespaces above 0; in a container "
        "the capability SYS_ADMIN or an unconfined seccomp and AppArmor profile), or install bubblewrap"
    )
    return "", f"code cannot be sandboxed on this machine ({'; '.join(told)}): {advice}"


def _run(
    way: str,
    command: Sequence[str],
    stdin: str | bytes,
    limits: Limits,
    readable: Sequence[str | Path],
    environment: Mapping[str, str],
    files: Mapping[str, int],
) -> Result:
    """Runs a program by one way to draw the boundary; `files` holds descriptors by paths inside."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode("utf-8", "surrogatepass")
    report, theirs = os.pipe()
    try:
        settings = dataclasses.asdict(limits) | {
            "command": list(command),
            "environment": dict(environment),
            "namespaces": way == "namespaces",
            "parent": os.getpid(),
            "number": next(_numbers) % (1 << 24),
            "readable": _readable(readable),
            "files": dict(files),
            "report": theirs,
        }
        words = [sys.executable, "-I", "-S", BOUNDARY, json.dumps(settings)]
        if way == "bubblewrap":
            words = [*_bubblewrap(settings), *words]
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: os.environ[name] for name in LOADER if name in os.environ},
            pass_fds=(theirs, *files.values()),
            start_new_session=True,
        )
        os.close(theirs)
        theirs = -1
        with process:
            try:
                result = _watch(process, data, limits)
            finally:
                _kill(process)
        os.set_blocking(report, False)
        with contextlib.suppress(BlockingIOError):
            if fault := os.read(report, 1 << 16):
                raise UserError(f"the sandbox could not start: {json.loads(fault)}")
        return result
    finally:
        for descriptor in (report, theirs):
            if descriptor >= 0:
                os.close(descriptor)


def _in_memory(text: str, held: contextlib.ExitStack) -> int:
    """Returns a descriptor of a text that lies in no folder: nothing is left of it, however this process ends."""
    descriptor = os.memfd_create("code")
    held.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _readable(paths: Sequence[str | Path]) -> list[str]:
    """Returns what exists of the system's, Python's and the given paths, none inside another one."""
    python = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    found: list[str] = []
    given = [os.path.abspath(str(path)) for path in paths]
    for path in sorted({*given, *SYSTEM, *python, BOUNDARY}):
        above = (other for other in found if not os.path.islink(other))
        if os.path.lexists(path) and not any(path.startswith(other + "/") for other in above):
            found.append(path)
    return found


def _bubblewrap(settings: Mapping[str, Any]) -> list[str]:
    """Returns the command that draws the boundary by bubblewrap, before the one that it runs."""
    words = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    ]
    words += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(settings["files_bytes"])]
    words += ["--tmpfs", "/tmp", "--chdir", "/tmp"]
    for path in settings["readable"]:
        link = os.path.islink(path)
        words += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    for path, descriptor in settings["files"].items():
        words += ["--ro-bind-data", str(descriptor), path]
    return words


def _watch(process: subprocess.Popen[bytes], data: bytes, limits: Limits) -> Result:
    """Feeds and reads the program until it ends or passes a limit."""
    assert process.stdin and process.stdout and process.stderr
    outputs: dict[IO[bytes], bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    end = time.monotonic() + limits.wall_s
    reason, next_look = "exit", 0.0
    with selectors.DefaultSelector() as selector:
        for stream in outputs:
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        view = memoryview(data)
        while selector.get_map():
            for key, _ in selector.select(POLL_S):
                stream: Any = key.fileobj
                if stream is process.stdin:
                    view = _feed(selector, stream, view)
                elif not (chunk := stream.read1(1 << 16)):
                    selector.unregister(stream)
                else:
                    outputs[stream] += chunk
            now = time.monotonic()
            if any(len(output) > limits.output_bytes for output in outputs.values()):
                reason = "output"
            elif now > end:
                reason = "time"
            elif now > next_look:
                next_look = now + POLL_S
                reason = _passed_limit(process.pid, limits)
            if reason != "exit":
                _kill(process)
                break
            if process.poll() is not None and not process.stdin.closed:
                view = _feed(selector, process.stdin, view[:0])
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        status = process.wait(max(end - time.monotonic(), POLL_S) if reason == "exit" else None)
    except subprocess.TimeoutExpired:
        reason = "time"
        _kill(process)
        status = process.wait()
    if reason == "exit" and status == CPU_SIGNAL:
        reason = "cpu"
    output, errors = (
        bytes(text[: limits.output_bytes]).decode("utf-8", "replace") for text in outputs.values()
    )
    return Result(128 - status if status > 128 else status, reason, output, errors)


def _feed(selector: Any, stream: Any, view: memoryview) -> memoryview:
    """Writes more of the input; closes it at its end, or where nobody reads it."""
    try:
        view = view[os.write(stream.fileno(), view[: 1 << 16]) :] if view else view
    except BlockingIOError:
        return view
    except BrokenPipeError:
        view = view[:0]
    if not view:
        selector.unregister(stream)
        stream.close()
    return view


def _passed_limit(pid: int, limits: Limits) -> str:
    """Returns the limit that all processes together have passed, or "exit"."""
    count = memory = 0
    for child in _descendants(pid):
        count += 1
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = Path(f"/proc/{child}/statm").read_text().split()
            memory += (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    if count > limits.processes + 2:  # the init process, and bubblewrap's
        return "processes"
    return "memory" if memory > limits.memory_bytes else "exit"


def _descendants(pid: int) -> Iterator[int]:
    waiting = [pid]
    while waiting:
        folder = f"/proc/{waiting.pop()}/task"
        with contextlib.suppress(OSError):
            for thread in os.listdir(folder):
                children = Path(folder, thread, "children").read_text().split()
                yield from map(int, children)
                waiting += map(int, children)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the boundary's processes; the init process among them takes all inside with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
