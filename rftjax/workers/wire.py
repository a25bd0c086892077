"""Frames between the main process, guardians and workers, and their limits.

Worker processes import this module: standard library only.
"""

from __future__ import annotations

import struct
import time

# A frame is kind (one byte), a number (of the call, or an exit status), length of the body in bytes, and the body.
HEADER = struct.Struct("<cqQ")
READY, FAILED, VALUE, ERROR, OVERRUN, BLOCKED, CALL = b"R", b"F", b"V", b"E", b"T", b"B", b"C"
PRINTED, ENDED = b"P", b"X"  # sent by a guardian
INTERRUPT = struct.Struct("<q")  # sent to a guardian: the number of the call
FORK, SERVE = b"F", b"S"  # sent to a template
MAX_RESULT_BYTES = 64 * 2**20
TAIL_BYTES = 2000  # of a worker's output, kept for the message of a crash


class Budget:
    """A token bucket for output: `at_once` bytes, refilled by `per_s` bytes a second."""

    def __init__(self, at_once: int = 20_000, per_s: int = 500):
        self._at_once, self._per_s = at_once, per_s
        self._left: float = at_once
        self._seen_s = time.monotonic()
        self._dropping = False

    def take(self, data: bytes) -> bytes:
        """Returns the part of `data` to show, with a note where dropping begins."""
        now_s = time.monotonic()
        earned = (now_s - self._seen_s) * self._per_s
        self._left, self._seen_s = min(self._at_once, self._left + earned), now_s
        shown = data[: int(self._left)]
        self._left -= len(shown)
        if self._left > self._at_once / 2:
            self._dropping = False
        if len(shown) < len(data) and not self._dropping:
            self._dropping = True
            shown += b"\n[user code printed more than is shown; the rest is dropped]\n"
        return shown
