"""Records a run: metrics.jsonl, TensorBoard, rollouts, and progress in the terminal."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsFloat

import numpy as np

from rftjax.errors import UserError
from rftjax.monitor.events import Events
from rftjax.monitor.loggers import Loggers
from rftjax.monitor.progress import Progress
from rftjax.monitor.rollout_files import RolloutFiles, write_whole
from rftjax.monitor.rollouts import (
    dropped,
    encode,
    rollouts_markdown,
    sampled_tokens,
    to_json,
)
from rftjax.types import Trajectory

log = logging.getLogger(__name__)

NO_METRICS: Mapping[str, float] = MappingProxyType({})
NO_HISTOGRAMS: Mapping[str, np.ndarray] = MappingProxyType({})
NO_TEXTS: Mapping[str, str] = MappingProxyType({})
Alarms = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, str]]


class Recorder:
    """Writes a run's metrics and rollouts below `workdir`, and its progress to the terminal.

    `steps` is the length of the run. `resume_step` N first removes all records after step N, which the earlier run
    wrote after its last checkpoint. TensorBoard gets histograms and rollout texts every `every` steps, with `rollouts`
    conversations a text (0: none); metrics.jsonl has every step. `RolloutFiles` takes `keep_rollouts` and
    `compress_rollouts`. `alarms` maps the metrics' lines to sentences by name. `config` holds the run's fields by path,
    for TensorBoard; `loggers` also get every line. A process that is not `primary` writes nothing; `agree` hands it the
    primary's line of a step, so that what is decided by the lines is decided alike.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        steps: int,
        resume_step: int = 0,
        every: int = 1,
        rollouts: int = 8,
        histograms: bool = True,
        keep_rollouts: int = -1,
        compress_rollouts: bool = False,
        quiet: bool = False,
        primary: bool = True,
        alarms: Alarms = lambda lines: {},
        config: Mapping[str, Any] = NO_TEXTS,
        loggers: Loggers | None = None,
        agree: Callable[[Any], Any] = lambda line: line,
    ) -> None:
        if every < 1:
            raise UserError(f"logging.every={every}: a number of steps, at least 1")
        self.workdir, self.steps = Path(workdir).absolute(), steps
        self._every, self._rollouts, self._histograms = every, rollouts, histograms
        self._primary, self._agree = primary, agree
        self._alarms = alarms
        self._loggers = loggers or Loggers({})
        self._metrics_path = self.workdir / "metrics.jsonl"
        self._pending: dict[int, dict[str, SupportsFloat]] = {}
        self._times_s: dict[str, float] = collections.defaultdict(float)
        self._outside_s = 0.0
        self._sampled_tokens = 0
        self._lines: list[dict[str, Any]] = []
        self._files = RolloutFiles(
            self.workdir / "rollouts", keep=keep_rollouts, compress=compress_rollouts
        )
        if primary:
            with self._writing():
                self._files.folder.mkdir(parents=True, exist_ok=True)
                self._lines = _cut_metrics(self._metrics_path, resume_step)
                self._files.cut(resume_step)
                self._events = Events(self.workdir / "tensorboard", purge_step=resume_step + 1)
                if config:
                    self._events.config(resume_step, self.workdir.name, config)
        self._lines = self._agree(self._lines)
        self._progress = Progress(steps, self._lines, quiet=quiet or not primary)
        self._step_began_s = time.monotonic()

    def write(
        self,
        step: int,
        metrics: Mapping[str, SupportsFloat] = NO_METRICS,
        histograms: Mapping[str, np.ndarray] = NO_HISTOGRAMS,
        trajectories: Sequence[Trajectory] = (),
        texts: Mapping[str, str] = NO_TEXTS,
        stream: str = "train",
    ) -> None:
        """Adds to a step; `flush` writes its line in metrics.jsonl.

        `stream` is that of the trajectories: "train", "heldout" or the name of a further held-out set. `texts` are
        Markdown for TensorBoard's text tab.
        """
        self._pending.setdefault(step, {}).update(metrics)
        if stream == "train":
            self._sampled_tokens += sum(map(sampled_tokens, trajectories))
        if not self._primary:
            return
        if text := dropped(trajectories):
            self.say(f"step {step}{'' if stream == 'train' else f', {stream}'}: {text}")
        shown = step % self._every == 0 or stream != "train"
        with self._writing():
            if trajectories:
                self._files.write(step, trajectories, stream)
            if trajectories and self._rollouts and shown:
                markdown = rollouts_markdown(trajectories, self._rollouts)
                self._events.text(step, f"rollouts/{stream}", markdown)
            for tag, text in texts.items():
                self._events.text(step, tag, text)
            if self._histograms and shown:
                for tag, values in histograms.items():
                    self._events.histogram(step, tag, values)

    @contextmanager
    def time(self, name: str, *, in_step: bool = True) -> Iterator[None]:
        """Adds the seconds spent inside to `time/<name>_s` of the next flushed step.

        With `in_step=False` (held-out evaluation, saves) they do not count in `time/step_s`.
        """
        began_s = time.monotonic()
        try:
            yield
        finally:
            elapsed_s = time.monotonic() - began_s
            self._times_s[f"time/{name}_s"] += elapsed_s
            self._outside_s += 0.0 if in_step else elapsed_s

    def flush(self, step: int) -> None:
        """Ends a step: writes its line to metrics.jsonl, TensorBoard and the terminal.

        Call it before saving the step's checkpoint, so that a resume finds the line. A second flush of the last step,
        after an evaluation at the end, adds to its line. All processes call it together.
        """
        self._flush(step, self._agree)

    def _flush(self, step: int, agree: Callable[[Any], Any]) -> None:
        old = self._lines[-1] if self._lines else {"step": -1}
        if step < old["step"]:
            raise UserError(f"metrics of step {step} came after those of step {old['step']}")
        again = step == old["step"]
        metrics = {name: float(value) for name, value in self._pending.pop(step, {}).items()}
        metrics = {**self._end_timers(step, again), **metrics}
        if not self._primary:
            self._keep(agree(None), again)
            return
        if again:
            metrics = {name: x for name, x in metrics.items() if old.get(name) != x}
        line = {**(old if again else {"step": step}), **_without_nan(step, metrics)}
        alarms = self._alarms([*(self._lines[:-1] if again else self._lines), line])
        fired = {f"alarm/{name}": 1.0 for name in alarms}
        line, metrics = {**line, **fired}, {**metrics, **fired}
        self._keep(agree(line), again)
        with self._writing():
            if again:
                write_whole(self._metrics_path, _encoded(self._lines))
            else:
                with open(self._metrics_path, "ab") as file:
                    file.write(encode(to_json(line)))
            self._events.scalars(step, metrics)
            self._loggers.log(step, metrics)
            if alarms:
                text = "\n".join(f"- **{name}**: {words}" for name, words in alarms.items())
                self._events.text(step, "alarms", text)
        for name, words in alarms.items():
            if f"alarm/{name}" not in old:
                self._progress.close()  # the warning has a line of its own
                log.warning("step %d: alarm %s: %s", step, name, words)
        self._progress.show(line)

    def _keep(self, line: dict[str, Any] | None, again: bool) -> None:
        if line is not None:
            self._lines[-1 if again else len(self._lines) :] = [line]

    def say(self, text: str) -> None:
        """Prints a separate line."""
        self._progress.say(text)

    @property
    def lines(self) -> Sequence[Mapping[str, Any]]:
        """The metrics of all flushed steps, including those before a resume."""
        return self._lines

    def wait(self) -> None:
        """Waits until all rollouts are on disk; call it before saving the step's checkpoint."""
        with self._writing():
            self._files.wait()

    def close(self) -> None:
        """Flushes pending steps and closes the files; a second call does nothing."""
        with contextlib.ExitStack() as closing:
            closing.enter_context(self._writing())
            if self._primary:
                closing.callback(self._events.close)
            closing.callback(self._loggers.close)
            closing.callback(self._progress.close)
            closing.callback(self._files.close)
            for step in sorted(self._pending):
                self._flush(step, lambda line: line)  # others may not be here

    def _end_timers(self, step: int, again: bool) -> dict[str, float]:
        """Returns times and throughput of the step that ends now; step 0 only evaluates."""
        now_s = time.monotonic()
        metrics: dict[str, float] = dict(self._times_s)
        if step > 0 and not again:
            metrics["time/step_s"] = max(now_s - self._step_began_s - self._outside_s, 0.0)
        if self._sampled_tokens and metrics.get("time/sample_s", 0.0) > 0:
            metrics["throughput/sampled_tokens_per_s"] = (
                self._sampled_tokens / metrics["time/sample_s"]
            )
        self._times_s.clear()
        self._step_began_s, self._outside_s, self._sampled_tokens = now_s, 0.0, 0
        return metrics

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Adds the path and the way out to an OSError."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot record the run ({error.strerror}). Free some space or make the directory "
                "writable; the same command goes on from the last checkpoint",
                str(error.filename or self.workdir),
            ) from error


def check_workdir(path: str | Path, *, needed_bytes: int = 0) -> Path:
    """Makes the directory and writes a test file there; raises UserError if that fails or space is short."""
    workdir = Path(path).absolute()
    try:
        str(workdir).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--workdir={path}: must be UTF-8, as Orbax writes no other path; give another directory"
        ) from error
    probe = workdir / f".probe-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"rftjax")
            os.fsync(file.fileno())
        probe.unlink()
        free_bytes = shutil.disk_usage(workdir).free
    except OSError as error:
        raise UserError(
            f"--workdir={path}: cannot be written to ({error.strerror}); "
            "give a directory that you may write to, on a disk with free space"
        ) from error
    if free_bytes < needed_bytes:
        raise UserError(
            f"--workdir={path}: {free_bytes / 2**30:.1f} GiB are free there, the run needs about "
            f"{needed_bytes / 2**30:.1f} GiB; free some, lower checkpoint.keep or give another disk"
        )
    return workdir


def _without_nan(step: int, metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Replaces NaN and infinity by None, which JSON can represent, with a warning."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        log.warning("step %d: not a finite number, written as null: %s", step, ", ".join(broken))
    return {name: None if name in broken else value for name, value in metrics.items()}


def _encoded(lines: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    return (encode(to_json(line)) for line in lines)


def _cut_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drops lines after a step and lines that a kill left partial; returns the rest."""
    if not path.exists():
        return []
    kept, dropped = [], 0
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text) if text.strip() else None
        except ValueError:
            line = {}
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, int) and step <= last_step:
            kept.append(line)
        else:
            dropped += line is not None
    if dropped:
        write_whole(path, _encoded(kept))
    return kept
