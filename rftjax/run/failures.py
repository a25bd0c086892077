"""Messages for exceptions on the command line, and a record of unforeseen ones in the workdir."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import select
import sys
import time
import traceback
from pathlib import Path

from rftjax.devices import processes
from rftjax.errors import UserError

NAME = "errors.txt"
_LIBRARIES = ("rftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
_WAYS_OUT = {
    errno.EACCES: "give a path that you may use, or change its permissions",
    errno.EPERM: "give a path that you may use, or change its permissions",
    errno.EROFS: "give a path on a disk that can be written to",
    errno.ENOSPC: "free some space, or give a path on another disk",
    errno.EDQUOT: "free some space, or give a path on another disk",
    errno.EFBIG: "give a path on a file system that takes large files",
    errno.ENOENT: "correct the path, or put the file back",
    errno.ENOTDIR: "correct the path: a part of it is a file",
    errno.EISDIR: "correct the path: it is a directory",
    errno.EEXIST: "give another path, or remove what is there",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "correct the links on the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that hold files open",
}


def explain(error: BaseException) -> str:
    """Returns the message of an error that the user can put right, "" of any other.

    The operating system's errors about a path are the user's; they are given a way out unless the text has one. So is
    what does not fit into a device's memory.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"a device has too little memory ({str(error).splitlines()[0][:200]}); lower sampler.slots, "
            "batch.pack_rows or batch.memory, set model.remat='layer' or raise mesh.fsdp: "
            "a run that goes on may change these too"
        )
    if not isinstance(error, OSError) or error.errno not in _WAYS_OUT:
        return ""
    if error.strerror and error.strerror != os.strerror(error.errno):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if error.filename is None and error.errno not in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
    ):
        return ""
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{place}{os.strerror(error.errno)}; {_WAYS_OUT[error.errno]}"


def unread(error: BaseException) -> str:
    """Returns what is said where the program that read the output has ended (`| head`), "" of any other error."""
    if not isinstance(error, BrokenPipeError):
        return ""
    output = select.poll()
    output.register(1, 0)  # an error is always told
    if not output.poll(0):
        return ""
    # Python flushes what is left once more at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return "the program that read the output has ended; send the output to a file"


def interrupted(error: BaseException, went_back: bool) -> str:
    """Returns what is said of a run that a signal ended; one that went back to a step must not do so again."""
    same = "the same command" + " without --restart_from" * went_back
    return f"{str(error) or 'interrupted'}; {same} goes on"


def record(workdir: Path, error: BaseException) -> Path | None:
    """Adds traceback, time, step and versions to the workdir's errors.txt; None where that cannot be written."""
    path = workdir / NAME
    lines = [
        f"==== {time.strftime('%Y-%m-%d %H:%M:%S %z')}, after step {_last_step(workdir)}",
        f"command: {' '.join(sys.argv)}",
        f"process {processes.index()} of {processes.count()}, on {platform.platform()}",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        "".join(traceback.format_exception(error)),
    ]
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines) + "\n")
    except OSError:  # the traceback is on the screen
        return None
    return path


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES}


def _last_step(workdir: Path) -> str:
    try:
        return str(json.loads((workdir / "metrics.jsonl").read_bytes().splitlines()[-1])["step"])
    except (OSError, LookupError, ValueError, TypeError):
        return "0"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
