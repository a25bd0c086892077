"""The files of `rollouts/`: every trajectory whole, written by a thread of its own while the run goes on."""

from __future__ import annotations

import collections
import concurrent.futures
import gzip
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rftjax.monitor import transcripts
from rftjax.monitor.rollouts import encode, to_json, trajectory_record
from rftjax.types import Trajectory

PENDING = 2  # writes that may wait; the next one waits for the first of them


class RolloutFiles:
    """Writes trajectories to `folder`: one file a step and stream, whole or not at all.

    `keep` is how many of the latest training steps stay (-1: all, 0: nothing is written); of held-out sets all do. With
    `compress` the files are gzipped, and their names end in .gz. An error of a write is raised by a later call.
    """

    def __init__(self, folder: Path, *, keep: int = -1, compress: bool = False) -> None:
        self.folder, self._keep, self._compress = folder, keep, compress
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def write(self, step: int, trajectories: Sequence[Trajectory], stream: str) -> None:
        """Begins to write a step's trajectories, which must not change any more."""
        if not self._keep:
            return
        while len(self._pending) >= PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, step, list(trajectories), stream))

    def wait(self) -> None:
        """Returns when all that was given is on disk; raises the first error."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def cut(self, last_step: int) -> None:
        """Deletes what is beyond a step, and what a kill left half written."""
        for path in [*self.folder.iterdir()]:
            match = transcripts.NAME.fullmatch(path.name)
            left = path.name.startswith(".") and transcripts.NAME.fullmatch(
                path.name[1:].removesuffix(".tmp")
            )
            if left or (match and int(match[2]) > last_step):
                path.unlink()

    def _write(self, step: int, trajectories: list[Trajectory], stream: str) -> None:
        lines = (encode(to_json(trajectory_record(step, one, stream))) for one in trajectories)
        path = self.folder / f"{transcripts.stem(stream)}_{step:06d}.jsonl"
        write_whole(path, lines, compress=self._compress)
        if stream == "train" and self._keep > 0:
            files = transcripts.files(self.folder.parent, stream)
            for old in [*files][: -self._keep]:
                files[old].unlink(missing_ok=True)


def write_whole(path: Path, lines: Iterator[bytes], *, compress: bool = False) -> Path:
    """Replaces a file at once: whoever reads it sees the old lines or the new ones; returns its path.

    With `compress` the name gets .gz.
    """
    path = path.with_name(f"{path.name}.gz") if compress else path
    partial = path.with_name(f".{path.name}.tmp")
    with open(partial, "wb") as file:
        if compress:
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                packed.writelines(lines)
        else:
            file.writelines(lines)
    os.replace(partial, path)
    return path


def size(trajectories: Sequence[Trajectory], *, compress: bool = False) -> int:
    """Returns how many bytes the trajectories take in a file."""
    text = b"".join(encode(to_json(trajectory_record(0, one))) for one in trajectories)
    return len(gzip.compress(text) if compress else text)
