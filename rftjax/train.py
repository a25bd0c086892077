"""The page to read first: sample, evaluate, batch, update, record."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from rftjax.monitor.step_metrics import histograms, rollout_metrics
from rftjax.run.build import Job
from rftjax.run.interruption import Interrupted, Interruption
from rftjax.run.saving import Saving, check_updates
from rftjax.scoring import answered
from rftjax.tasks.curriculum import task_stream
from rftjax.types import TrainState

log = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    workdir: Path,
    stop_after: int = 0,
    restart_from: int = -1,
    accepted: Sequence[str] = (),
) -> tuple[TrainState, bool]:
    """Trains to `config.steps`, or to the end of step `stop_after`, from the workdir's last checkpoint or another one.

    `accepted` names inputs that may differ from those the run began with. Returns the last state and whether the run is
    complete. The last finished step is saved whatever ends the run. Raises EvaluatorError where too many samples cannot
    be scored, and Interrupted.
    """
    with Job.build(config, workdir) as job, Interruption() as interruption:
        stream = task_stream(job.train_tasks, config.seed, config.tasks.sampling)
        learner = job.learner()
        checkpoints = job.checkpoints()
        binding = job.binding(stream, accepted)
        start = step = binding.start(checkpoints, restart_from)
        if start:
            stream.restore(checkpoints.restore_host(start)["stream"])
        recorder = job.recorder(start)
        sampling = job.sampling(stream)
        last = min(config.steps, stop_after or config.steps)

        def goes_on() -> bool:
            return step < last and not (interruption.received or job.stop_reason(recorder.lines))

        def heldout_missing() -> bool:
            return job.heldout_missing(step, recorder.lines) and not interruption.received

        def heldout() -> None:
            with recorder.time("eval", in_step=False):
                job.set_weights(state)
                metrics, sampled = job.evaluate()
            for name, trajectories in sampled.items():
                recorder.write(step, metrics, trajectories=trajectories, stream=name)
            saving.evaluated(step, metrics)

        with Saving(
            checkpoints, interruption, recorder, sampling.close, bind=binding.bind
        ) as saving:
            ahead = job.compiling(learner, stream, recorder)
            with ahead if goes_on() else contextlib.nullcontext():
                state = job.state_builder.state(checkpoints, start)
            if job.heldout_due(step) and heldout_missing():
                heldout()
                recorder.flush(step)
            while goes_on():
                trajectories = []
                while wanted := learner.wanted(trajectories):
                    with recorder.time("sample"):
                        sampled = sampling.take(state, wanted)
                    with recorder.time("evaluate"):
                        job.scorer.gather(sampled)
                        trajectories += sampled
                job.scorer.check(answered(trajectories))
                pauses = job.heldout_due(step + 1) or checkpoints.due(step + 1)
                with recorder.time("update"), interruption.hold():
                    step += 1
                    stream.observe(trajectories)
                    ends = step == last or interruption.received
                    sampling.begin(state, last=ends or pauses)
                    batches, choice = learner.batch(state, trajectories, step)
                    state, metrics = learner.update(state, batches, step)
                    saving.finished(step, state, {"stream": sampling.position()})
                    metrics |= binding.bind(step)
                metrics |= choice | rollout_metrics(trajectories) | job.counts()
                recorder.write(step, metrics, histograms(trajectories), trajectories)
                recorder.write(step, job.hook(step, metrics, trajectories, state))
                if job.heldout_due(step) and heldout_missing():
                    heldout()
                with interruption.hold():
                    recorder.flush(step)
                    check_updates(recorder.lines, start, config.optim.max_nonfinite)
                    if checkpoints.due(step):
                        saving.save()
            reason = job.stop_reason(recorder.lines)
            ended = step >= config.steps or bool(reason)
            if ended and heldout_missing():
                heldout()
                recorder.flush(step)
            saving.save()
            if reason:
                log.warning("ended early after step %d: %s", step, reason)
    complete = ended and not job.heldout_missing(step, recorder.lines)
    if interruption.received and not complete and (ended or step < last):
        raise Interrupted(step, config.steps)
    return state, complete
