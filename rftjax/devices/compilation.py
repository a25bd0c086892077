"""Compiles a run's programs side by side before its first step, and counts compilations."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # or taken from the cache on disk
CACHED = "/jax/compilation_cache/cache_hits"
MOST = 16  # programs that are compiled at the same time
BEHIND = "compiling-behind"  # the name of the thread that compiles beside the steps


class Program(NamedTuple):
    """A call of a jitted function, made by `run` or compiled for one with arrays like these."""

    function: Any
    arguments: tuple[Any, ...]
    settings: Mapping[str, Any] = MappingProxyType({})

    def run(self) -> Any:
        """Calls the function; arguments that it donates are gone then."""
        return self.function(*self.arguments, **self.settings)

    def lower(self) -> Any:
        """Traces what `run` would do, for `compile`; takes nothing away."""
        return self.function.lower(*self.arguments, **self.settings)

    def abstract_output(self) -> Any:
        """Compiles the call; returns the abstract form of its result: shapes, dtypes and shardings."""
        lowered = self.lower()
        return jax.tree.map(
            lambda one, place: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place),
            lowered.out_info,
            lowered.compile().output_shardings,
        )


@contextlib.contextmanager
def compiling(programs: Iterable[Program]) -> Iterator[None]:
    """Compiles the programs in threads while the caller does other work; name the largest first.

    Calls with the same shapes find them compiled. Where the caller raises, nothing is waited for.
    """
    threads = concurrent.futures.ThreadPoolExecutor(MOST)
    # Tracing holds the GIL, compiling releases it.
    traced = threads.submit(lambda: [threads.submit(one.lower().compile) for one in programs])
    try:
        yield
        for one in traced.result():
            one.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


class Compilations:
    """Counts what JAX compiles in this process until `close`, by others too; compiles what is needed later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._behind = concurrent.futures.ThreadPoolExecutor(1, BEHIND)
        self._programs, self._cached, self._seconds = 0, 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        jax.monitoring.register_event_listener(self._found)

    def close(self) -> None:
        """Stops counting, and compiling once the program under way is done."""
        self._behind.shutdown(cancel_futures=True)
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        jax.monitoring.unregister_event_listener(self._found)

    def behind(self, programs: Iterable[Program]) -> None:
        """Compiles the programs one by one in a thread, while steps go on; an error comes up where one is called."""
        for program in programs:
            self._behind.submit(lambda program=program: program.lower().compile())

    def take(self) -> dict[str, float]:
        """Returns metrics of what was compiled since the last call: programs, those found on disk, and seconds.

        What is compiled behind the steps is not counted, as nothing waits for it.
        Programs that were compiled at the same time count with the seconds of each.
        """
        with self._lock:
            found = self._programs, self._cached, self._seconds
            self._programs, self._cached, self._seconds = 0, 0, 0.0
        names = ("compile/programs", "compile/cached", "time/compile_s")
        return dict(zip(names, map(float, found), strict=True))

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and not threading.current_thread().name.startswith(BEHIND):
            with self._lock:
                self._programs += 1
                self._seconds += duration_secs

    def _found(self, event: str, **_: str | int) -> None:
        if event == CACHED and not threading.current_thread().name.startswith(BEHIND):
            with self._lock:
                self._cached += 1
