"""Programs that JAX compiles: a run's own all at once before its first step, and how many there were and how long."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # or taken from the cache on disk
CACHED = "/jax/compilation_cache/cache_hits"


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

    def outline(self) -> Any:
        """Compiles it; returns the shapes and places of what `run` would return."""
        lowered = self.lower()
        return jax.tree.map(
            lambda one, place: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place),
            lowered.out_info,
            lowered.compile().output_shardings,
        )


def compile_all(programs: Sequence[Program]) -> None:
    """Compiles the programs side by side, the largest best first; the calls that they stand for find them compiled."""
    with concurrent.futures.ThreadPoolExecutor(max(1, len(programs))) as threads:
        # Tracing holds Python, compiling does not.
        compiling = [threads.submit(program.lower().compile) for program in programs]
    for one in compiling:
        one.result()


class Compilations:
    """Counts what JAX compiles in this process until `close`, also in the calls of others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._programs, self._cached, self._seconds = 0, 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        jax.monitoring.register_event_listener(self._found)

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        jax.monitoring.unregister_event_listener(self._found)

    def take(self) -> dict[str, float]:
        """Returns metrics of what was compiled since the last call: programs, those found on disk, and seconds.

        Programs that were compiled at the same time count with the seconds of each.
        """
        with self._lock:
            found = self._programs, self._cached, self._seconds
            self._programs, self._cached, self._seconds = 0, 0, 0.0
        names = ("compile/programs", "compile/cached", "time/compile_s")
        return dict(zip(names, map(float, found), strict=True))

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            with self._lock:
                self._programs += 1
                self._seconds += duration_secs

    def _found(self, event: str, **_: str | int) -> None:
        if event == CACHED:
            with self._lock:
                self._cached += 1
