"""Reports metrics to further services: `logging.to` names them, one module each.

A module has a class `Service(workdir, fields, project, name, identity)` with `log(step, metrics)`, `close()` and
`identity`, by which a resumed run continues the same record. No fault or hang of a service stops or delays a run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rftjax.errors import UserError

log = logging.getLogger(__name__)

WAITING = 1000  # lines queued for a service; further ones are dropped
CLOSE_S = 60.0  # seconds to wait for a service at the end of a run


class Loggers:
    """Sends metrics to services, one thread each; `services` maps names to functions that connect."""

    def __init__(self, services: Mapping[str, Callable[[], Any]]) -> None:
        self._threads = [_Thread(name, connect) for name, connect in services.items()]

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Queues the metrics of a step, without None values, and returns at once."""
        found = {name: value for name, value in metrics.items() if value is not None}
        for thread in self._threads:
            thread.put((step, found))

    def close(self) -> None:
        """Waits up to CLOSE_S for each service to send its queue; a second call does nothing."""
        for thread in self._threads:
            thread.put(None)
        for thread in self._threads:
            thread.finish()
        self._threads.clear()


def open_loggers(
    names: Sequence[str], workdir: Path, fields: Mapping[str, Any], *, project: str, name: str
) -> Loggers:
    """Returns the loggers of a run, which continue its earlier records; raises UserError for a missing package.

    `fields` is the run's config by path. The run is called `name`, or like its workdir.
    """
    missing = [one for one in names if importlib.util.find_spec(one) is None]
    if missing:
        raise UserError(
            f"logging.to={tuple(names)!r}: the package {missing[0]} is not installed; install it with"
            f" pip install 'rftjax[{missing[0]}]', or leave the name out"
        )

    def connect(service: str) -> Callable[[], Any]:
        module = importlib.import_module(f"rftjax.monitor.loggers.to_{service}")

        def opened() -> Any:
            identity = _identities(workdir).get(service, "")
            found = module.Service(workdir, dict(fields), project, name or workdir.name, identity)
            _remember(workdir, service, found.identity)
            return found

        return opened

    return Loggers({service: connect(service) for service in dict.fromkeys(names)})


class _Thread:
    """One service; after its first fault it gets no more metrics, which is logged once."""

    def __init__(self, name: str, connect: Callable[[], Any]) -> None:
        self._name, self._connect = name, connect
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._full = False
        # A daemon, so that a service that hangs does not keep Python from exiting.
        self._thread = threading.Thread(target=self._run, name=f"logging.to {name}", daemon=True)
        self._thread.start()

    def put(self, line: tuple[int, dict[str, float]] | None) -> None:
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            if not self._full:
                log.warning("logging.to: %s takes no metrics; they are dropped", self._name)
            self._full = True

    def finish(self) -> None:
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("logging.to: %s does not end; the run ends without it", self._name)

    def _run(self) -> None:
        try:
            service = self._connect()
            while (line := self._waiting.get()) is not None:
                service.log(*line)
            service.close()
        # Any fault of a library or the network: the run has its own files.
        except (Exception, SystemExit) as error:
            log.warning(
                "logging.to: %s failed and gets no more metrics of this run: %s: %s",
                *(self._name, type(error).__name__, error),
            )
            while self._waiting.get() is not None:
                pass


def _path(workdir: Path) -> Path:
    return workdir / "loggers.json"


def _identities(workdir: Path) -> dict[str, str]:
    path = _path(workdir)
    return json.loads(path.read_text()) if path.exists() else {}


_LOCK = threading.Lock()


def _remember(workdir: Path, service: str, identity: str) -> None:
    with _LOCK:
        path, temporary = _path(workdir), workdir / ".loggers.json.tmp"
        temporary.write_text(json.dumps(_identities(workdir) | {service: identity}) + "\n")
        os.replace(temporary, path)
