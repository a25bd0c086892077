"""The page to read first: sample, evaluate, batch, update, record."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from ml_collections import ConfigDict

from rftjax.interruption import Interruption
from rftjax.job import Job
from rftjax.metrics import histograms, rollout_metrics
from rftjax.scoring import EvaluatorError
from rftjax.tasks import TaskStream
from rftjax.types import TrainState

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path, stop_after: int = 0) -> tuple[TrainState, bool]:
    """Trains to `config.steps`, or to the end of step `stop_after`, from the workdir's last checkpoint on.

    Returns the last state and whether the run is complete. Raises EvaluatorError, after a checkpoint, where too many
    samples cannot be scored.
    """
    with Job.build(config, workdir) as job, Interruption() as interruption:
        stream = TaskStream(job.train_tasks, seed=config.seed)
        learner = job.learner()
        checkpoints = job.checkpoints()
        start = checkpoints.latest_step() or 0
        host = checkpoints.restore_host(start) if start else {"stream": stream.state()}
        stream.restore(host["stream"])
        recorder = job.recorder(start)
        sampling = job.sampling(stream)
        last = min(config.steps, stop_after or config.steps)

        def goes_on() -> bool:
            return step < last and not (interruption.received or job.stop_reason(recorder.lines))

        def heldout(step: int) -> dict[str, float]:
            with recorder.time("eval", in_step=False):
                job.set_weights(state)
                metrics, sampled = job.evaluate()
            for name, trajectories in sampled.items():
                recorder.write(step, metrics, trajectories=trajectories, stream=name)
            return metrics

        step, results = start, {}
        try:
            ahead = job.compiling(learner, stream, recorder)
            with ahead if goes_on() else contextlib.nullcontext():
                state = job.origin.state(checkpoints, start)
            if start == 0 and goes_on() and job.heldout_due(0):
                heldout(0)
                recorder.flush(0)
            while goes_on():
                trajectories = []
                while wanted := learner.wanted(trajectories):
                    with recorder.time("sample"):
                        sampled = sampling.take(state, wanted)
                    with recorder.time("evaluate"):
                        job.scorer.check(job.scorer.gather(sampled))
                        trajectories += sampled
                step += 1
                evaluates = job.heldout_due(step)
                with recorder.time("update"):
                    ends = step == last or interruption.received
                    sampling.begin(state, last=ends or evaluates or checkpoints.due(step))
                    batches, choice = learner.batch(state, trajectories, step)
                    state, metrics = learner.update(state, batches, step)
                metrics |= choice | rollout_metrics(trajectories) | job.counts()
                recorder.write(step, metrics, histograms(trajectories), trajectories)
                host = {"stream": sampling.position()}
                results = heldout(step) if evaluates else {}
                recorder.flush(step)
                if checkpoints.due(step):
                    checkpoints.save(step, state, host, results)
            checkpoints.save(step, state, host, results)
            reason = job.stop_reason(recorder.lines)
            if reason:
                log.warning("ended early after step %d: %s", step, reason)
        except EvaluatorError:
            checkpoints.save(step, state, host)
            raise
        finally:
            checkpoints.close()
            recorder.close()
            sampling.close()
    return state, step == config.steps or bool(reason)
