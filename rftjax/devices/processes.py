"""Several processes of one run, by JAX's own runtime: start-up, what each takes, and what they exchange.

Every process runs the same program over the same configuration and calls the functions below in the same order. Where
there is one process, they do nothing.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rftjax.errors import NotFinite, UserError

HEARTBEAT_S = 30  # without a sign of life, after which the other processes end
START_S = 300  # for all processes to come
TELL_S = 15.0  # that a start may take before a process says what it waits for
CHUNK = 1 << 20  # bytes of one exchange: constant, so that what is exchanged is no shape
AUTO = "auto"
_alone = False  # inside of `together`

Item = TypeVar("Item")


class OtherProcess(UserError):
    """What another process of this run raised; its own message says more."""


class OtherNotFinite(OtherProcess, NotFinite):
    """A number that is not finite, in another process: none keeps the state that all of them share."""


def start(coordinator: str, processes: int, process: int) -> None:
    """Joins the run's other processes; call it before any other function of JAX.

    `coordinator` is "HOST:PORT" of process 0, or "auto": the cluster says where it is and how many there are, and on
    Slurm and Open MPI which GPU is this process's. Raises UserError where that cannot be; ends the program where others
    do not come in START_S seconds.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        # Else JAX asks the cluster for the devices, though all that it needs is given.
        "cluster_detection_method": "deactivate",
    }
    which = "this process" if coordinator == AUTO else f"process {process} of {processes}"
    # JAX may end the program where others were given other numbers.
    _tell(f"--coordinator={coordinator}: {which} joins the run")
    rule = (
        "give all of them the same address of process 0, which they can reach, the same --processes, and each its own"
        " --process; docs/several_processes.md has launch lines"
    )
    told = f"--coordinator={coordinator}: {which} waits for the others, up to {START_S} s: {rule}"
    apart = f"error: --coordinator={coordinator}: the processes did not come together; {rule}"
    timers = [
        threading.Timer(TELL_S, _tell, (told,)),
        threading.Timer(START_S, leave, (apart,)),  # JAX would abort
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            **({} if coordinator == AUTO else given),
            initialization_timeout=START_S + HEARTBEAT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        what = "the processes did not come together"
        if coordinator == AUTO and isinstance(error, ValueError):
            what = "JAX finds no variables of Slurm, Open MPI or a TPU pod here"
        raise UserError(
            f"--coordinator={coordinator}: {what} ({str(error).splitlines()[0]:.200}); {rule}"
        ) from error
    finally:
        for timer in timers:
            timer.cancel()
    # JAX has taken the signal to tell those who ask it, as nobody does here: it would end nothing.
    signal.signal(signal.SIGTERM, on_sigterm or signal.SIG_DFL)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def count() -> int:
    """Returns how many processes there are."""
    return jax.process_count()


def index() -> int:
    """Returns the number of this process."""
    return jax.process_index()


def first() -> bool:
    """Whether this is process 0, which writes the files."""
    return jax.process_index() == 0


def share(items: Sequence[Item]) -> list[Item]:
    """Returns the items that this process takes."""
    return list(items)[jax.process_index() :: jax.process_count()]


def gather(value: Any) -> list[Any]:
    """Returns what each process gives, by the number of the process."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = from_words(multihost_utils.process_allgather(as_words(data.size)))
    pieces = []
    for at in range(0, int(sizes.max()), CHUNK):
        piece = np.zeros(CHUNK, np.uint8)
        part = data[at : at + CHUNK]
        piece[: part.size] = part
        pieces.append(multihost_utils.process_allgather(piece))
    rows = np.concatenate(pieces, axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def as_words(size: int) -> np.ndarray:
    """Returns a size as two int32: JAX carries no int64, and a step's conversations may pass 2 GiB."""
    return np.asarray([size], np.int64).view(np.int32)


def from_words(words: np.ndarray) -> np.ndarray:
    """Returns the sizes of which `as_words` made the pairs."""
    return np.ascontiguousarray(words).reshape(-1).view(np.int64)


def agree(value: Item) -> Item:
    """Returns what process 0 gives."""
    return gather(value if first() else None)[0] if jax.process_count() > 1 else value


def same(found: Mapping[str, str], rule: str) -> None:
    """Raises UserError in every process where they do not all give the same; it names what differs, and the rule."""
    everywhere = gather(dict(found))
    problems = []
    for name in dict.fromkeys(name for one in everywhere for name in one):
        values = [one.get(name, "nothing") for one in everywhere]
        if other := next((at for at, value in enumerate(values) if value != values[0]), 0):
            problems.append(f"{name}: {values[0]} in process 0, {values[other]} in process {other}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"the processes of the run differ: {'; '.join(problems[:10])}{more}. {rule}"
        )


def interruptible() -> bool:
    """Whether an exception may end what runs now: anywhere but between others that wait for this process."""
    return _alone or jax.process_count() == 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises in every process what the block raises in one: there OtherProcess, or KeyboardInterrupt where a signal
    ended the block. The block exchanges nothing.

    Where one process raises NotFinite all do, so that all or none of them save.
    """
    global _alone
    fault: BaseException | None = None
    _alone = True
    try:
        yield
        _alone = False
    except (Exception, KeyboardInterrupt) as error:
        _alone = False
        if jax.process_count() == 1:
            raise
        fault = error
    finally:
        _alone = False
    bad, stopped = isinstance(fault, NotFinite), isinstance(fault, KeyboardInterrupt)
    said = gather((f"{type(fault).__name__}: {fault}" if fault else "", bad, stopped))
    lost = any(other for _, other, _ in said)
    if fault is not None and bad == lost:
        raise fault
    for process, (text, other, interrupted) in enumerate(said):
        if text and other == lost:
            if interrupted:
                raise KeyboardInterrupt
            kind = OtherNotFinite if lost else OtherProcess
            raise kind(f"process {process} of {count()} failed: {text}") from fault


def leave(message: str) -> NoReturn:
    """Ends this process with a message and waits for nothing that it does with others; they end by its absence."""
    sys.stdout.flush()
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    os._exit(1)


def to_host(tree: Any) -> Any:
    """Returns arrays in the host's memory, also those of which other processes have parts."""
    whole = jax.tree.map(
        lambda leaf: (
            leaf
            if not isinstance(leaf, jax.Array)
            or leaf.is_fully_addressable
            or leaf.is_fully_replicated
            else multihost_utils.process_allgather(leaf, tiled=True)
        ),
        tree,
    )
    return jax.device_get(whole)
