"""When a run goes on, evaluates and pauses, and how it ends."""

from __future__ import annotations

import logging
from typing import Any

from ml_collections import ConfigDict

from rftjax.monitor import alarms
from rftjax.monitor.recorder import Recorder
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.heldout import HeldOut
from rftjax.run.interruption import Interrupted, Interruption

log = logging.getLogger(__name__)


class Schedule:
    """Decides after each finished step what comes next, from the config, the metrics so far and signals.

    A run lasts to `config.steps`, to the end of step `stop_after` where that is not 0, or until it is to end early.
    """

    def __init__(
        self,
        config: ConfigDict,
        stop_after: int,
        heldout: HeldOut,
        checkpoints: Checkpoints,
        recorder: Recorder,
        interruption: Interruption,
    ) -> None:
        self._steps, self._last = config.steps, min(config.steps, stop_after or config.steps)
        self._early: dict[str, Any] = {
            "metric": config.checkpoint.best_metric,
            "patience": config.eval.patience,
            "dead_steps": config.eval.dead_steps,
        }
        self._heldout, self._checkpoints = heldout, checkpoints
        self._recorder, self._interruption = recorder, interruption

    def goes_on(self, step: int) -> bool:
        """Whether another step follows; all processes ask together, and get the same answer."""
        self._interruption.agree()
        return step < self._last and not (self._interruption.received or self._stop_reason())

    def pauses(self, step: int) -> bool:
        """Whether no samples may be begun ahead in this step: what follows it needs the sampler or may be the end."""
        ends = step == self._last or self._interruption.received
        return ends or self._heldout.due(step) or self._checkpoints.due(step)

    def evaluates(self, step: int) -> bool:
        """Whether the held-out sets are evaluated now: they are due, or the run has ended, and it is not done yet."""
        wanted = self._heldout.due(step) or self._ended(step)
        missing = self._heldout.missing(step, self._recorder.lines)
        return wanted and missing and not self._interruption.received

    def complete(self, step: int) -> bool:
        """Returns whether a run that leaves off after this step is complete; raises Interrupted where a signal keeps
        it from what it was to do."""
        if reason := self._stop_reason():
            log.warning("ended early after step %d: %s", step, reason)
        ended = self._ended(step)
        complete = ended and not self._heldout.missing(step, self._recorder.lines)
        if self._interruption.received and not complete and (ended or step < self._last):
            raise Interrupted(step, self._steps)
        return complete

    def _ended(self, step: int) -> bool:
        return step >= self._steps or bool(self._stop_reason())

    def _stop_reason(self) -> str:
        """Returns why the run should end early, "" where it should not."""
        return alarms.stop_reason(self._recorder.lines, **self._early)
