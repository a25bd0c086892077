"""Writes every trajectory to files in `rollouts/`, in a background thread."""

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

PENDING = 2  # writes in the queue; a further one blocks until the first is done


class RolloutFiles:
    """Writes trajectories to `folder`, one file a step and stream; each write is atomic.

    `keep` is the number of latest training steps to keep (-1: all, 0: write nothing); held-out files are all kept. With
    `compress` the files are gzipped and end in .gz. A later call raises the error of a failed write.
    """

    def __init__(self, folder: Path, *, keep: int = -1, compress: bool = False) -> None:
        self.folder, self._keep, self._compress = folder, keep, compress
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def write(self, step: int, trajectories: Sequence[Trajectory], stream: str) -> None:
        """Queues a step's trajectories for writing; do not change them afterwards."""
        if not self._keep:
            return
        while len(self._pending) >= PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, step, list(trajectories), stream))

    def wait(self) -> None:
        """Waits until all queued trajectories are on disk; raises the first error."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Waits as `wait` does, then ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def cut(self, last_step: int) -> None:
        """Deletes files of later steps, and partial files that a kill left."""
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
    """Replaces a file atomically, so that readers see the old or the new lines; returns its path.

    `compress` gzips it and appends .gz to the name.
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
    """Returns the size of the trajectories in a file, in bytes."""
    text = b"".join(encode(to_json(trajectory_record(0, one))) for one in trajectories)
    return len(gzip.compress(text) if compress else text)
