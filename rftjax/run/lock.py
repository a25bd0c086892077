"""One training run a workdir: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rftjax.errors import UserError

NAME = ".lock"
SHARED_S = 10.0
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[str]:
    """Holds the lock of a workdir and yields the text in its file, another for each run; UserError names the host and
    the process of the run that holds it.

    The kernel frees the lock when the process ends, however it ends. On a file system without locks the text in the
    file decides: it counts while its process lives, and a text of another host counts until somebody deletes the file.
    """
    path = workdir / NAME
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(file, path):
            _refuse_by_text(file, path)
        text = f"{socket.gethostname()} {os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        _write(file, text)
        try:
            yield text
        finally:
            _write(file, "")
    finally:
        os.close(file)


def check_shared(workdir: Path, text: str) -> None:
    """Raises UserError where the lock of this folder does not hold the text that process 0 has written.

    A file system of several hosts has SHARED_S seconds to show it.
    """
    until_s = time.monotonic() + SHARED_S
    while not (shared := _reads(workdir / NAME, text)) and time.monotonic() < until_s:
        time.sleep(0.2)
    if not shared:
        raise UserError(
            f"--workdir={workdir}: on host {socket.gethostname()} this is another folder than that of process 0:"
            " checkpoints would be lost; give one on a file system that all processes of the run share"
        )


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _lock(file: int, path: Path) -> bool:
    """Takes the kernel's lock, False where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise UserError(_message(path, *_holder(file), "wait for it or stop it")) from error
    return True


def _refuse_by_text(file: int, path: Path) -> None:
    host, pid, began = _holder(file)
    if host == socket.gethostname():
        if _alive(int(pid)):
            raise UserError(_message(path, host, pid, began, "wait for it or stop it"))
    elif host:
        raise UserError(_message(path, host, pid, began, f"if it has ended, delete {path}"))


def _message(path: Path, host: str, pid: str, began: str, way_out: str) -> str:
    who = f"process {pid} on host {host}, since {began}" if host else "another process"
    return (
        f"--workdir={path.parent}: another run is at work there ({who}); {way_out}, "
        "or give another --workdir"
    )


def _holder(file: int) -> tuple[str, str, str]:
    """Returns host, process and start of the run that the text names, "" where it names none."""
    words = os.pread(file, 1000, 0).decode(errors="replace").split(maxsplit=2)
    if len(words) != 3 or not words[1].isdigit():
        return "", "", ""
    return words[0], words[1], words[2].strip()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _write(file: int, text: str) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)
