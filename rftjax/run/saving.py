"""The last finished step of a run: saved when it is due, and on every way out."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from rftjax.devices import processes
from rftjax.errors import NotFinite, UserError
from rftjax.monitor.recorder import Recorder
from rftjax.run import failures
from rftjax.run.checkpoint import NO_METRICS, Checkpoints, meet
from rftjax.run.interruption import Interrupted, Interruption
from rftjax.types import TrainState

log = logging.getLogger(__name__)


class Saving:
    """Holds the last finished step, and saves it whatever ends the block of this context.

    `bind` is called with the step before each save. Leaving the block closes the recorder, saves, and calls the
    functions of `close`. What fails in them is raised where nothing else is, else logged. A KeyboardInterrupt becomes
    Interrupted, which names the last step that is saved.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        interruption: Interruption,
        recorder: Recorder,
        *close: Callable[[], None],
        bind: Callable[[int], object] | None = None,
    ) -> None:
        self._checkpoints, self._interruption = checkpoints, interruption
        self._recorder, self._close, self._bind = recorder, close, bind
        self._finished: tuple[int, TrainState, Mapping[str, Any]] | None = None
        self._metrics = NO_METRICS

    def finished(self, step: int, state: TrainState, host: Mapping[str, Any]) -> None:
        """Takes a step's state once nothing of it is missing; `host` is what a resume needs beside it."""
        self._finished, self._metrics = (step, state, host), NO_METRICS

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the held-out metrics of the finished step, or of the checkpoint that the run went on from."""
        self._metrics = metrics
        self._checkpoints.rank(step, metrics)

    def save(self) -> None:
        """Saves the finished step, once, and once its rollouts are on disk."""
        if self._finished is None:
            return
        step, state, host = self._finished
        with self._interruption.hold():
            self._recorder.wait()
            if self._bind is not None:
                self._bind(step)
            self._checkpoints.save(step, state, host, self._metrics)

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._leave_alone(error)
        failed: list[BaseException] = []
        saved: list[int] = []
        calls = (
            self._recorder.close,
            functools.partial(self._rescue, error),
            lambda: saved.extend(self._checkpoints.steps()),
            self._checkpoints.close,
            *self._close,
        )
        try:
            with self._interruption.hold():
                for call in calls:
                    try:
                        call()
                    except Exception as fault:
                        failed.append(fault)
        except KeyboardInterrupt as second:
            error = error or second
        if error is None and failed:
            raise failed.pop(0)
        for fault in failed:
            if str(fault) != str(error):
                log.error("while the run ended: %s: %s", type(fault).__name__, fault)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(max(saved, default=0), self._recorder.steps) from error

    def _leave_alone(self, error: BaseException) -> None:
        """Ends this process at once where the run's others do not end too: what they do together would never end."""
        step = 0 if self._finished is None else self._finished[0]
        if not meet(f"the end of {self._checkpoints.directory} after step {step}"):
            text = failures.explain(error) or "".join(traceback.format_exception(error))
            processes.leave(
                f"error: {text}\nprocess {processes.index()} of the run ends alone, and the others because of it; the"
                " same command for all goes on from the last checkpoint"
            )

    def _rescue(self, error: BaseException | None) -> None:
        """Saves the finished step where it can be used: an update that fails takes the state before it along."""
        if self._finished is None:
            return
        step, state, _ = self._finished
        lost = any(
            leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)
        )
        if lost or isinstance(error, NotFinite):
            latest = self._checkpoints.latest_step()
            if latest != step:
                reason = "went into the update that failed" if lost else "gives no finite numbers"
                log.error(
                    "the state of step %d %s and is not saved; the last checkpoint is of step %s",
                    step, reason, latest or 0,
                )  # fmt: skip
            return
        self.save()


def check_updates(lines: Sequence[Mapping[str, Any]], start: int, limit: int) -> None:
    """Raises UserError where no update of the last `limit` steps after `start` had a finite gradient (0: never)."""
    shares = [line.get("update/nonfinite_share") for line in lines if line["step"] > start]
    if limit and len(shares) >= limit and all(share == 1.0 for share in shares[-limit:]):
        steps = [line["step"] for line in lines][-limit:]
        raise UserError(
            f"optim.max_nonfinite={limit}: no gradient of steps {steps[0]} to {steps[-1]} was finite. Their updates"
            f" were left out, and the weights of step {steps[0] - 1} are saved. The same command goes on from there;"
            " give it a lower --config.optim.lr, or --restart_from an earlier checkpoint"
        )
