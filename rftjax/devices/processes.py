"""Several processes of one run, by JAX's own runtime: start-up, what each takes, and what they exchange.

Every process runs the same program over the same configuration and calls the functions below in the same order. Where
there is one process, they do nothing.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rftjax.errors import NotFinite, UserError

HEARTBEAT_S = 30  # without a sign of life, after which the other processes end
START_S = 300  # for all processes to come
CHUNK = 1 << 20  # bytes of one exchange: constant, so that what is exchanged is no shape
AUTO = "auto"

Item = TypeVar("Item")


class OtherProcess(UserError):
    """What another process of this run raised; its own message says more."""


class OtherNotFinite(OtherProcess, NotFinite):
    """A number that is not finite, in another process: none keeps the state that all of them share."""


def start(coordinator: str, processes: int, process: int) -> None:
    """Joins the run's other processes; call it before any other function of JAX.

    `coordinator` is "HOST:PORT" of process 0, or "auto": the cluster says where it is and how many there are. Raises
    UserError where they do not come together in START_S seconds.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    try:
        jax.distributed.initialize(
            **({} if coordinator == AUTO else given),
            initialization_timeout=START_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator={coordinator}: the processes did not come together"
            f" ({str(error).splitlines()[0]:.200}); give all of them the same address, which they can reach, and each"
            " its own --process; docs/several_processes.md has launch lines"
        ) from error


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


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises in every process what the block raises in one: there OtherProcess. The block exchanges nothing.

    Where one process raises NotFinite all do, so that all or none of them save.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        fault = error
    bad = isinstance(fault, NotFinite)
    said = gather((f"{type(fault).__name__}: {fault}" if fault else "", bad))
    lost = any(other for _, other in said)
    if fault is not None and bad == lost:
        raise fault
    for process, (text, other) in enumerate(said):
        if text and other == lost:
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
