"""The page to read first: sample, evaluate, batch, update, record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from rftjax.monitor.recorder import Recorder
from rftjax.monitor.step_metrics import histograms, rollout_metrics
from rftjax.run.build import Parts, build
from rftjax.run.interruption import Interruption
from rftjax.run.prefetch import make_prefetch
from rftjax.run.saving import Saving, check_updates
from rftjax.run.schedule import Schedule
from rftjax.run.shares import scored_by_all
from rftjax.run.startup import compile_ahead, step_counts
from rftjax.run.training import make_learner
from rftjax.run.workdir import open_binding, open_checkpoints, open_recorder
from rftjax.scoring import answered
from rftjax.tasks.curriculum import task_stream
from rftjax.types import TrainState


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
    with build(config, workdir) as parts, Interruption() as interruption:
        stream = task_stream(parts.train_tasks, config.seed, config.tasks.sampling)
        learner = make_learner(parts)
        checkpoints = open_checkpoints(parts)
        binding = open_binding(parts, stream, accepted)
        start = step = binding.start(checkpoints, restart_from)
        prefetch = make_prefetch(parts, stream)
        if start:
            prefetch.restore(checkpoints.restore_host(start)["stream"])
        recorder = open_recorder(parts, start)
        schedule = Schedule(config, stop_after, parts.heldout, checkpoints, recorder, interruption)
        with Saving(
            checkpoints, interruption, recorder, prefetch.close, bind=binding.bind
        ) as saving:
            with compile_ahead(parts, learner, stream, recorder, needed=schedule.goes_on(step)):
                state = parts.state_builder.state(checkpoints, start)
            if schedule.evaluates(step):
                saving.evaluated(step, evaluate_heldout(parts, step, state, recorder))
                recorder.flush(step)
            while schedule.goes_on(step):
                trajectories = []
                while wanted := learner.wanted(trajectories):
                    with recorder.time("sample"):
                        sampled = prefetch.take(state, wanted)
                    with recorder.time("evaluate"):
                        trajectories += scored_by_all(parts.scorer, sampled)
                parts.scorer.check(answered(trajectories))
                with recorder.time("update"), interruption.hold():
                    step += 1
                    stream.observe(trajectories)
                    prefetch.begin(state, last=schedule.pauses(step))
                    batches, choice = learner.batch(state, trajectories, step)
                    state, metrics = learner.update(state, batches, step)
                    saving.finished(step, state, {"stream": prefetch.position()})
                    metrics |= binding.bind(step)
                metrics |= choice | rollout_metrics(trajectories) | step_counts(parts)
                recorder.write(step, metrics, histograms(trajectories), trajectories)
                recorder.write(step, parts.hook(step, metrics, trajectories, state))
                if schedule.evaluates(step):
                    saving.evaluated(step, evaluate_heldout(parts, step, state, recorder))
                with interruption.hold():
                    recorder.flush(step)
                    check_updates(recorder.lines, start, config.optim.max_nonfinite)
                    if checkpoints.due(step):
                        saving.save()
            if schedule.evaluates(step):  # where the metrics of this step end the run early
                saving.evaluated(step, evaluate_heldout(parts, step, state, recorder))
                recorder.flush(step)
            saving.save()
    return state, schedule.complete(step)


def evaluate_heldout(
    parts: Parts, step: int, state: TrainState, recorder: Recorder
) -> dict[str, float]:
    """Evaluates and records the held-out sets with the weights of a state; returns their metrics."""
    with recorder.time("eval", in_step=False):
        parts.sampler_weights.load(state)
        metrics, sampled = parts.heldout.evaluate()
    for name, trajectories in sampled.items():
        recorder.write(step, metrics, trajectories=trajectories, stream=name)
    return metrics
