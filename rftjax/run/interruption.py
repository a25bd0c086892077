"""Signals: the step under way ends, a second signal ends the run at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rftjax.devices import processes

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 20.0  # for the step under way after SIGTERM or SIGHUP: schedulers kill 30 s later
AGAIN_S = 0.2  # until the next try where other processes wait for this one


class Interrupted(Exception):
    """A signal ended a run before its last step; `step` is the last one that is saved."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"interrupted at {step}/{steps}")


class Interruption:
    """Notes SIGINT, SIGTERM and SIGHUP, so that the step under way can end and be saved.

    `received` says so; where there are several processes, from the next `agree` on, and in all of them.

    A second one raises KeyboardInterrupt where the main thread is, as `GRACE_S` after a SIGTERM or SIGHUP do: those
    come before a SIGKILL. Nothing is raised inside `hold`.
    """

    def __init__(self) -> None:
        self.received = self._noted = False
        self._urgent = False
        self._holds = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._before[number] = signal.signal(number, self._note)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._hurry)
        return self

    def agree(self) -> None:
        """Makes a signal that one process got known to all, which call this together."""
        self.received = any(processes.gather(self._noted))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps a second signal waiting until the block has ended: an update or a save must not be cut."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._urgent and not self._holds:
            self._hurry(signal.SIGALRM, None)

    def _note(self, number: int, frame: Any) -> None:
        if self._noted:
            self._hurry(number, frame)
            return
        self._noted = True
        self.received = self.received or processes.count() == 1
        log.warning("%s: the step under way ends first", signal.Signals(number).name)
        if number != signal.SIGINT:
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def _hurry(self, number: int, frame: Any) -> None:
        if not self._holds and processes.interruptible():
            self._raise()
        if not self._urgent:
            what = "is being written" if self._holds else "the other processes wait for"
            log.warning("%s: what %s ends first", signal.Signals(number).name, what)
        self._urgent = True
        if not self._holds:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)

    def _raise(self) -> None:
        self._urgent = False
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
