"""What a sandboxed program may use, and what became of it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one program and all processes that it starts.

    `memory_bytes` bounds the address space of each process and the resident memory of all together, `files_bytes` all
    that is written to its temporary folder, `output_bytes` what is read of each of its two output streams.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 512 << 20
    files_bytes: int = 64 << 20
    output_bytes: int = 1 << 20
    processes: int = 32


@dataclasses.dataclass(frozen=True)
class Result:
    """What a program did: `reason` is "exit" where it ended by itself, else the limit that ended it: "time", "cpu",
    "memory", "output" or "processes". `status` is the exit status, negative for a signal. Output is cut at its limit.
    """

    status: int
    reason: str
    output: str
    errors: str

    @property
    def passed(self) -> bool:
        """Whether the program ended by itself with status 0."""
        return self.reason == "exit" and self.status == 0
