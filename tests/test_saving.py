"""The last finished step is saved whatever ends a run, and an evaluation that is missing is made up."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax import config as configs
from rftjax import train
from rftjax.errors import NotFinite, UserError
from rftjax.monitor.recorder import Recorder
from rftjax.run import build as job
from rftjax.run import interruption as interruptions
from rftjax.run.binding import Binding, stored_config
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.interruption import SIGNALS, Interrupted, Interruption
from rftjax.run.saving import Saving, check_updates
from rftjax.scoring import EvaluatorError
from rftjax.types import TrainState
from rftjax.weights import hf


@pytest.fixture(autouse=True)
def terminal():
    """Hanging up ends this process, as in a terminal and not under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def state(value: float) -> TrainState:
    return TrainState(jnp.int32(value), {"w": jnp.full(3, float(value))}, {}, {"m": jnp.zeros(3)})


def kept(folder) -> dict[int, float]:
    checkpoints = Checkpoints(folder, read_only=True)
    found = {step: checkpoints.restore_params(step)[0]["w"][0] for step in checkpoints.steps()}
    checkpoints.close()
    return found


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=1)


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path / "run", steps=9, quiet=True)


@pytest.fixture
def broken(recorder):
    """A recorder that cannot write its last line."""
    recorder.write(2, {"loss": 1.0})
    (recorder.workdir / "metrics.jsonl").mkdir()
    return recorder


@pytest.fixture
def interruption():
    with Interruption() as one:
        yield one


@pytest.mark.parametrize("error", [RuntimeError, OSError, EvaluatorError])
def test_an_error_saves_the_last_finished_step_and_is_the_one_that_goes_up(
    checkpoints, interruption, broken, error, caplog
):
    closed = []
    with (
        pytest.raises(error, match="first"),
        Saving(checkpoints, interruption, broken, lambda: closed.append(1)) as saving,
    ):
        saving.finished(1, state(1), {"draw": 4})
        saving.finished(2, state(2), {"draw": 8})
        raise error("first")
    assert kept(checkpoints.directory) == {2: 2.0}
    assert closed == [1]
    assert "while the run ended: IsADirectoryError: " in caplog.text


def test_a_workdir_that_cannot_be_bound_at_first_loses_no_step(
    tmp_path, checkpoints, interruption, recorder
):
    config = configs.base_config()
    binding = Binding(tmp_path, config, {"evaluator": {"name": "evaluate"}})
    blocked = tmp_path / ".run.json.tmp"
    blocked.mkdir()
    with (
        pytest.raises(IsADirectoryError),
        Saving(checkpoints, interruption, recorder, bind=binding.bind) as saving,
    ):
        saving.finished(2, state(2), {})
        try:
            binding.bind(2)
        finally:
            blocked.rmdir()
    assert kept(checkpoints.directory) == {2: 2.0}
    assert stored_config(tmp_path).steps == config.steps
    assert json.loads((tmp_path / "run.json").read_text())["inputs"] == binding.inputs


def test_a_second_signal_while_the_last_step_is_saved_names_that_step(
    checkpoints, interruption, recorder
):
    with (
        pytest.raises(Interrupted, match="interrupted at 2/9"),
        Saving(
            checkpoints, interruption, recorder, bind=lambda _: signal.raise_signal(2)
        ) as saving,
    ):
        saving.finished(2, state(2), {})
        signal.raise_signal(signal.SIGINT)
    assert kept(checkpoints.directory) == {2: 2.0}


def test_what_fails_in_the_end_goes_up_where_nothing_else_does(checkpoints, interruption, broken):
    with (
        pytest.raises(OSError, match="cannot record the run"),
        Saving(checkpoints, interruption, broken) as saving,
    ):
        saving.finished(2, state(2), {})
    assert kept(checkpoints.directory) == {2: 2.0}


def test_a_save_that_fails_does_not_hide_the_error_before_it(
    checkpoints, interruption, recorder, caplog
):
    with (
        pytest.raises(RuntimeError, match="first"),
        Saving(checkpoints, interruption, recorder) as saving,
    ):
        saving.finished(1, state(1), {"draw": object()})
        raise RuntimeError("first")
    assert "is not JSON" in caplog.text


def test_a_state_that_an_update_took_along_is_not_saved(
    checkpoints, interruption, recorder, caplog
):
    with (
        pytest.raises(RuntimeError, match="first"),
        Saving(checkpoints, interruption, recorder) as saving,
    ):
        saving.finished(1, state(1), {})
        saving.save()
        given = state(2)
        saving.finished(2, given, {})
        given.trainable["w"].delete()
        raise RuntimeError("first")
    assert kept(checkpoints.directory) == {1: 1.0}
    assert "the state of step 2 went into the update that failed" in caplog.text


def test_a_state_without_finite_answers_does_not_take_the_place_of_a_good_one(
    checkpoints, interruption, recorder
):
    with pytest.raises(NotFinite), Saving(checkpoints, interruption, recorder) as saving:
        saving.finished(1, state(1), {})
        saving.save()
        saving.finished(2, state(2), {})
        raise NotFinite("logits")
    assert kept(checkpoints.directory) == {1: 1.0}


@pytest.mark.parametrize("place", ["trainable", "optimizer"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_saved(
    checkpoints, interruption, recorder, place, value
):
    broken = state(2)
    if place == "trainable":
        broken.trainable["w"] = broken.trainable["w"].at[1].set(value)
    else:
        broken.opt_state["m"] = broken.opt_state["m"].at[1].set(value)
    checkpoints.save(1, state(1))
    with (
        pytest.raises(
            NotFinite, match=f"step 2 is not saved: {place}.* last checkpoint, of step 1"
        ),
        Saving(checkpoints, interruption, recorder) as saving,
    ):
        saving.finished(2, broken, {})
        saving.save()
    assert kept(checkpoints.directory) == {1: 1.0}


def test_the_metric_of_a_late_evaluation_ranks_the_checkpoint(tmp_path, interruption, recorder):
    for late in (True, False):
        checkpoints = Checkpoints(tmp_path / str(late), keep=1)
        with Saving(checkpoints, interruption, recorder) as saving:
            saving.finished(1, state(1), {})
            saving.save() if late else None
            saving.evaluated(1, {"eval/reward": 0.75})
            saving.save()
        again = Checkpoints(tmp_path / str(late), keep=1)
        with Saving(again, interruption, recorder) as saving:
            saving.evaluated(1, {"eval/reward": 0.25})  # it has one already
            saving.finished(2, state(2), {})
            saving.evaluated(2, {"eval/reward": 0.5})
        again = Checkpoints(tmp_path / str(late), read_only=True)
        assert (again.steps(), again.best_step(), again.metric(1)) == ([1, 2], 1, 0.75)
        again.close()


def test_a_step_without_an_evaluation_is_not_ranked_by_the_one_before(
    tmp_path, interruption, recorder
):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with Saving(checkpoints, interruption, recorder) as saving:
        saving.finished(1, state(1), {})
        saving.evaluated(1, {"eval/reward": 0.75})
        saving.save()
        saving.finished(2, state(2), {})
    again = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert (again.steps(), again.best_step()) == ([1, 2], 1)
    assert again.metric(1) == 0.75 and np.isnan(again.metric(2))
    again.close()


def test_a_checkpoint_is_begun_once_the_rollouts_before_it_are_on_disk(tmp_path, interruption):
    calls = []

    class Written(Recorder):
        def wait(self):
            super().wait()
            calls.append("rollouts")

    class Saved(Checkpoints):
        def save(self, *arguments):
            calls.append("checkpoint")
            return super().save(*arguments)

    recorder = Written(tmp_path / "run", steps=9, quiet=True)
    with Saving(Saved(tmp_path / "checkpoints"), interruption, recorder) as saving:
        saving.finished(1, state(1), {})
        saving.save()
        assert calls == ["rollouts", "checkpoint"]


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_ends_the_run_at_once_and_the_finished_step_is_saved(
    checkpoints, recorder, first, second
):
    with (
        pytest.raises(Interrupted, match="interrupted at 3/9"),
        Interruption() as told,
        Saving(checkpoints, told, recorder) as saving,
    ):
        saving.finished(3, state(3), {})
        assert not told.received
        signal.raise_signal(first)
        assert told.received
        signal.raise_signal(second)
        pytest.fail("it went on")
    assert kept(checkpoints.directory) == {3: 3.0}


def test_the_time_for_a_step_after_sigterm_is_short(checkpoints, recorder, monkeypatch):
    monkeypatch.setattr(interruptions, "GRACE_S", 0.05)
    with (
        pytest.raises(Interrupted, match="interrupted at 3/9"),
        Interruption() as told,
        Saving(checkpoints, told, recorder) as saving,
    ):
        saving.finished(3, state(3), {})
        signal.raise_signal(signal.SIGTERM)
        threading.Event().wait(60)
        pytest.fail("it went on")
    assert kept(checkpoints.directory) == {3: 3.0}
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


def test_an_update_is_not_cut_by_a_second_signal(monkeypatch):
    done = []
    with pytest.raises(KeyboardInterrupt), Interruption() as told:
        with told.hold(), told.hold():
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            done.append("update")
        pytest.fail("it went on")
    assert done == ["update"]


def test_signals_mean_what_they_did_before_once_a_run_is_over():
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)]
    with Interruption():
        assert signal.getsignal(signal.SIGHUP) != before[2]
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)] == before


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as told:
            signal.raise_signal(signal.SIGHUP)
            assert not told.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_steps_without_a_finite_gradient_end_a_run_once_they_are_several_in_a_row():
    lines = [{"step": 0, "eval/reward": 1.0}]
    lines += [{"step": n, "update/nonfinite_share": x} for n, x in enumerate([1, 0.5, 1, 1, 1], 1)]
    check_updates(lines[:5], 0, 3)
    check_updates(lines, 3, 3)  # the run went on from step 3, and two are not three
    check_updates(lines, 0, 0)
    with pytest.raises(UserError, match="no gradient of steps 3 to 5 was finite.* of step 2 are"):
        check_updates(lines, 0, 3)
    with pytest.raises(UserError, match="no gradient of steps 3 to 5 was finite"):
        check_updates(lines, 2, 3)  # exactly three


EVALUATOR = """
import os

def evaluate(task, trajectory):
    return len(set(trajectory.completion.split())) / 8

def heldout(task, trajectory):
    if os.path.exists(__file__ + ".gone"):
        raise RuntimeError("the judge is gone")
    return evaluate(task, trajectory)

def huge(task, trajectory):
    return 3e38 * (-1) ** trajectory.sample
"""


@pytest.fixture(scope="module")
def config(tiny_dir, tmp_path_factory):
    jax.clear_caches()
    folder = tmp_path_factory.mktemp("job")
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps = 3
    config.model.path, config.tasks.train = str(tiny_dir), str(folder / "train.jsonl")
    config.tasks.heldout_count = 2
    config.evaluator = f"{folder / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 2, 64
    config.sampler.max_new_tokens, config.sampler.slots = 4, 4
    config.rollout.max_length, config.scoring.workers = 16, 1
    config.optim.lr, config.eval.every, config.checkpoint.every = 1e-2, 2, 0
    return config


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_an_evaluation_that_failed_is_made_up_by_the_run_that_goes_on(config, tmp_path):
    one = config.copy_and_resolve_references()
    file = one.evaluator.rpartition(":")[0]
    one.eval.evaluator = f"{file}:heldout"
    one = job.complete_config(one)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert train.train(one, whole)[1]
    train.train(one, parted, stop_after=1)
    gone = Path(file + ".gone")
    gone.touch()
    with pytest.raises(EvaluatorError, match="the judge is gone"):
        train.train(one, parted)
    assert "eval/reward" not in lines_of(parted)[-1] and lines_of(parted)[-1]["step"] == 2
    gone.unlink()
    assert train.train(one, parted)[1]
    names = ("step", "reward/mean", "eval/reward", "loss")
    expected, found = (
        [[line.get(name) for name in names] for line in lines_of(run)] for run in (whole, parted)
    )
    assert found == expected
    checkpoints = Checkpoints(parted / "checkpoints", read_only=True)
    assert checkpoints.metric(2) == lines_of(parted)[2]["eval/reward"]
    checkpoints.close()


def test_a_run_whose_steps_were_lowered_is_complete_and_evaluated(config, tmp_path):
    one = job.complete_config(config)
    assert not train.train(one, tmp_path, stop_after=1)[1]
    with one.unlocked():
        one.steps = 1
    assert train.train(one, tmp_path)[1]
    assert "eval/reward" in lines_of(tmp_path)[1]


def test_a_run_whose_steps_were_lowered_into_its_warm_up_ends_complete(config, tmp_path):
    one = config.copy_and_resolve_references()
    one.optim.warmup_steps, one.optim.schedule, one.eval.every = 2, "cosine", 0
    train.train(job.open_config(tmp_path, one, {}), tmp_path, stop_after=1)
    with one.unlocked():
        one.steps = 2
    lowered = job.open_config(tmp_path, one, {"steps": 2})
    assert (lowered.steps, lowered.optim.warmup_steps) == (2, 2)
    assert train.train(lowered, tmp_path)[1]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    with pytest.raises(UserError, match="optim.warmup_steps=2: must be below steps=2"):
        job.complete_config(one)


def test_gradients_that_are_not_finite_leave_the_last_good_weights(config, tmp_path):
    one = config.copy_and_resolve_references()
    one.evaluator = one.evaluator.replace(":evaluate", ":huge")
    one.grpo.scale, one.eval.every, one.optim.max_nonfinite = "none", 0, 2
    with pytest.raises(UserError, match="optim.max_nonfinite=2: no gradient of steps 1 to 2"):
        train.train(job.complete_config(one), tmp_path)
    assert [line["update/nonfinite_share"] for line in lines_of(tmp_path)] == [1.0, 1.0]
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    params, _ = checkpoints.restore_params(2)
    checkpoints.close()
    base = hf.load(one.model.path)[1]
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(base))
