"""Shows the progress of a run in the terminal."""

from __future__ import annotations

import collections
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any


class Progress:
    """The state of the run on one line: redrawn in a terminal, printed once a step elsewhere.

    `lines` are the metrics before a resume, shown until a step replaces them.
    """

    def __init__(self, steps: int, lines: Iterable[dict[str, Any]] = (), *, quiet: bool) -> None:
        # There is no stdout where the shell closed it.
        self._steps, self._quiet = steps, quiet or sys.stdout is None
        self._shown: dict[str, float] = {}
        self._alarms: list[str] = []
        self._ends_s = collections.deque([time.monotonic()], maxlen=11)
        self._drawn = False
        for line in lines:
            self._remember(line)

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows the metrics of the step that just ended."""
        self._remember(line)
        self._ends_s.append(time.monotonic())
        if self._quiet:
            return
        text = self._text(line["step"])
        if sys.stdout.isatty():
            done = round(20 * min(line["step"] / max(self._steps, 1), 1.0))
            text = f"[{'#' * done}{'.' * (20 - done)}]  {text}"
            columns = shutil.get_terminal_size().columns
            sys.stdout.write(f"\r\033[2K{text[: columns - 1]}")
            self._drawn = True
        else:
            sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """Prints a separate line."""
        self.close()
        if not self._quiet:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Ends the redrawn line, so that the next output starts on a new one."""
        if self._drawn:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._drawn = False

    def _remember(self, line: Mapping[str, Any]) -> None:
        self._alarms = [name.removeprefix("alarm/") for name in line if name.startswith("alarm/")]
        for name in ("reward/mean", "eval/reward", "time/step_s"):
            if line.get(name) is not None:
                self._shown[name] = line[name]

    def _text(self, step: int) -> str:
        fields = [f"step {step:>{len(str(self._steps)) + 1}}/{self._steps}"]
        if "reward/mean" in self._shown:
            fields.append(f"reward {self._shown['reward/mean']:.2f}")
        if "eval/reward" in self._shown:
            fields.append(f"held-out {self._shown['eval/reward']:.2f}")
        if "time/step_s" in self._shown:
            fields.append(f"{self._shown['time/step_s']:.1f} s/step")
        if 0 < step < self._steps:
            mean_s = (self._ends_s[-1] - self._ends_s[0]) / (len(self._ends_s) - 1)
            fields.append(f"left {format_duration(mean_s * (self._steps - step))}")
        fields += [f"ALARM {name}" for name in self._alarms]
        return "  ".join(fields)


def format_duration(seconds: float) -> str:
    """Seconds as 45s, 6m30s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
