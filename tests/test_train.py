import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

import rftjax
from rftjax import config as configs
from rftjax import modes, train
from rftjax.errors import UserError
from rftjax.run import build as job
from rftjax.run import serving
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.interruption import Interrupted
from rftjax.run.startup import step_counts
from rftjax.sampler.engine import Counters
from rftjax.scoring import EvaluatorError
from rftjax.types import SamplingParams
from rftjax.weights import hf

STEPS = 4
# Draws 8 to 11 are the third step's.
EVALUATOR = """
import os, time
from rftjax.types import Score

def evaluate(task, trajectory):
    hold = os.environ.get("RFTJAX_TEST_HOLD", "")
    while trajectory.draw >= 8 and os.path.exists(hold):
        open(hold + ".reached", "w").close()
        time.sleep(0.01)
    words = trajectory.completion.split()
    return Score(float(len(set(words))) / 8, parts={"words": float(len(words))})

def failing(task, trajectory):
    if trajectory.draw >= 4:
        raise RuntimeError("the judge is gone")
    return evaluate(task, trajectory)

def constant(task, trajectory):
    return 0.5

def rare(task, trajectory):
    return evaluate(task, trajectory) if trajectory.draw >= 4 else 0.5
"""
SPEC = """
import json, sys
from rftjax import config

def get_config():
    return config.from_json(open({path!r}).read())
"""
METRICS = {
    "reward/mean",
    "reward/std",
    "loss",
    "grad_norm",
    "entropy",
    "sampler/logprob_diff_mean",
    "sampler/logprob_diff_max",
    "clip/share",
    "groups/zero_variance_share",
    "rollout/truncated_share",
    "rollout/completion_tokens_mean",
    "rollout/turns_mean",
    "evaluator/error_share",
    "time/step_s",
    "time/sample_s",
    "time/evaluate_s",
    "time/update_s",
    "throughput/sampled_tokens_per_s",
}


@pytest.fixture(scope="module")
def config(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    for name, first, count in (("train", 0, 10), ("heldout", 20, 3)):
        rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps = STEPS
    config.model.path = str(tiny_dir)
    config.tasks.train = str(folder / "train.jsonl")
    config.tasks.heldout = str(folder / "heldout.jsonl")
    config.evaluator = f"{folder / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 4, 4, 128
    config.sampler.max_new_tokens, config.sampler.slots = 8, 8
    config.rollout.max_length = 24
    config.scoring.workers, config.scoring.timeout_s = 1, 120.0
    config.optim.lr = 1e-2
    config.eval.every, config.checkpoint.every = 2, 1
    return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The workdir of a run from the first step to the last, through files, checkpoints and export."""
    workdir = tmp_path_factory.mktemp("whole")
    modes.run("train", config, {}, workdir, 0)
    return workdir


def lines_of(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_state(workdir, step=STEPS):
    """Parameters and optimizer state of the last checkpoint, as stored."""
    folder = workdir / "checkpoints"
    assert max(int(path.name) for path in folder.iterdir()) == step

    def read(item):
        tree = reader.metadata(item).item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(item, restore_args=whole)

    with ocp.PyTreeCheckpointer() as reader:
        return [read(folder / str(step) / name) for name in ("trainable", "optimizer")]


def assert_equal(one, two):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def without_times(lines):
    return [
        {
            name: value
            for name, value in line.items()
            if not name.startswith(("time/", "compile/", "throughput/"))
        }
        for line in lines
    ]


def assert_same_run(workdir, whole):
    assert without_times(lines_of(workdir)) == without_times(lines_of(whole))
    for path in sorted((whole / "rollouts").iterdir()):
        assert (workdir / "rollouts" / path.name).read_text() == path.read_text()
    assert_equal(last_state(workdir), last_state(whole))


def test_a_run_writes_every_file_and_metric(whole, config):
    names = {path.name for path in whole.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "rollouts",
        "checkpoints",
        "export",
    } <= names
    lines = lines_of(whole)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines[1:]:
        assert set(line) >= METRICS, METRICS - set(line)
        assert line["sampler/logprob_diff_max"] < 1e-4
        assert line["reward/part/words"] > 0
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 4]
    assert any((whole / "tensorboard").iterdir())
    stored = json.loads((whole / "config.json").read_text())
    assert stored["grpo"]["aggregate"] == "sequence_mean" and stored["steps"] == STEPS


def test_rollouts_hold_what_was_sampled_and_trained_on(whole):
    draws = []
    for step in range(1, STEPS + 1):
        path = whole / "rollouts" / f"step_{step:06d}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(records) == 16
        draws += sorted({record["draw"] for record in records})
        for record in records:
            assert record["step"] == step
            (sequence,) = record["sequences"]
            assert len(sequence["tokens"]) == len(sequence["sampled"]) == len(sequence["logprobs"])
            versions = set(zip(sequence["sampled"], sequence["policy_version"], strict=True))
            assert versions == {(False, -1), (True, step - 1)}
        for draw in {record["draw"] for record in records}:
            group = [record for record in records if record["draw"] == draw]
            assert len({record["task_id"] for record in group}) == 1
            assert abs(sum(record["advantage"] for record in group)) < 1e-5
    assert draws == list(range(4 * STEPS))


def test_the_export_is_the_trained_model(whole, tiny_dir):
    exported, base = rftjax.load(str(whole / "export")), rftjax.load(str(tiny_dir))
    assert_equal(exported.params, last_state(whole)[0])
    for one, two in zip(*map(jax.tree.leaves, (exported.params, base.params)), strict=True):
        assert np.any(np.asarray(one) != np.asarray(two))
    assert exported.stop_tokens() == base.stop_tokens() == (1,)
    assert exported.tokenizer.encode("w1 w2") == base.tokenizer.encode("w1 w2")


def test_two_halves_are_the_whole_bit_for_bit(config, whole, tmp_path, capsys):
    modes.run("train", config, {}, tmp_path, 2)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2]
    assert not (tmp_path / "export").exists()
    modes.run("train", config, {}, tmp_path, 0)
    assert_same_run(tmp_path, whole)
    assert "held-out reward after" in capsys.readouterr().out


def test_sampling_ahead_is_one_update_behind_and_resumes_bit_for_bit(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.overlap.max_staleness, config.grpo.tis_cap = 1, 2.0
    config.eval.every, config.checkpoint.every = 0, 2
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    modes.run("train", config, {}, whole, 0)
    assert [line["rollout/staleness"] for line in lines_of(whole)] == [0.0, 1.0, 0.0, 1.0]
    draws = []
    for step in range(1, STEPS + 1):
        rows = (whole / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        draws += sorted({json.loads(row)["draw"] for row in rows})
    assert draws == list(range(4 * STEPS))
    modes.run("train", config, {}, halves, 2)
    modes.run("train", config, {}, halves, 0)
    assert_equal(last_state(halves), last_state(whole))


def test_unfinished_answers_go_on_in_the_next_step_and_a_resume_repeats_them(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.rollout.partial, config.sampler.dispatch_steps = 2, 2
    config.eval.every, config.checkpoint.every = 0, 0
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    modes.run("train", config, {}, whole, 0)
    lines = [line for line in lines_of(whole) if line["step"]]
    assert lines[0]["rollout/older_share"] == 0 and lines[0]["tis/mean"] == pytest.approx(
        1, abs=0.01
    )
    assert max(line["rollout/older_share"] for line in lines) > 0.1
    assert json.loads((whole / "config.json").read_text())["grpo"]["tis_cap"] == 2.0
    modes.run("train", config, {}, halves, 3)
    modes.run("train", config, {}, halves, 0)
    assert_equal(last_state(halves), last_state(whole))
    taken = []
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        rows = [json.loads(row) for row in (whole / name).read_text().splitlines()]
        assert rows == [json.loads(row) for row in (halves / name).read_text().splitlines()]
        taken += [(row["draw"], row["sample"]) for row in rows]
    assert len(set(taken)) == len(taken) == STEPS * 4 * 4


def test_eval_mode_scores_the_last_checkpoint(config, whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    modes.run("eval", config, {}, whole, 0)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step"] == STEPS
    assert found["eval/reward"] == lines_of(whole)[-1]["eval/reward"]
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_what_serves_a_run_has_the_weights_of_the_step_asked_for(config, whole):
    """With flags on top of the stored config, and without tasks or an evaluator in the given one."""
    given = configs.base_config()
    found = serving.served_config(given, {"serving": {"port": 0}}, whole)
    assert found.serving.port == 0 and found.optim.lr == config.optim.lr
    policy = rftjax.load(config.model.path)
    prompt = [3, 4, 5]
    for wanted, step in (("last", STEPS), ("3", 3)):
        with serving.opened(found, whole, wanted) as (service, model):
            call = service.open(prompt, 8, (0, 0, 0), SamplingParams())
            turn = call.future.result()
        assert model.name == f"{whole.name}-step-{step}"
        checkpoints = Checkpoints(whole / "checkpoints", read_only=True)
        params, _ = checkpoints.restore_params(step)
        checkpoints.close()
        tokens = [[*prompt, *turn.tokens]]
        scored = policy.logprobs(tokens, params=params)[0, len(prompt) :]
        assert np.abs(np.asarray(scored) - turn.logprobs).max() < 1e-4
    with pytest.raises(UserError, match="holds no checkpoint"):
        serving.served_config(given, {}, whole / "nothing")
    with pytest.raises(UserError, match="model.path=''"):
        serving.served_config(given, {}, None)


def test_check_mode_samples_scores_and_starts_no_run(config, tmp_path, capsys):
    modes.run("check", config, {}, tmp_path, 0)
    out = capsys.readouterr().out
    assert "10 to train on, 3 held out" in out and "check       passed" in out
    assert "reward/mean" in out and "GiB" in out
    assert [path.name for path in tmp_path.iterdir()] == ["check"]


def test_check_mode_refuses_a_reward_without_variance(config, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.evaluator = config.evaluator.replace(":evaluate", ":constant")
    with pytest.raises(
        ValueError, match="the same within each of 4 groups of 4: .* partial rewards"
    ):
        modes.run("check", changed, {}, tmp_path, 0)


def test_check_mode_samples_a_whole_step_before_it_says_that_there_is_no_variance(
    config, tmp_path, capsys
):
    changed = config.copy_and_resolve_references()
    changed.evaluator = config.evaluator.replace(":evaluate", ":rare")
    changed.batch.prompts, changed.eval.every = 8, 0
    modes.run("check", changed, {}, tmp_path, 0)
    out = capsys.readouterr().out
    assert "check       passed" in out and "groups/zero_variance_share       0." in out
    changed.batch.prompts = 4
    with pytest.raises(ValueError, match="the same within each of 4 groups of 4"):
        modes.run("check", changed, {}, tmp_path, 0)


def test_a_failing_evaluator_stops_the_run_after_a_checkpoint(config, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.evaluator = config.evaluator.replace(":evaluate", ":failing")
    changed.eval.every = changed.checkpoint.every = 0
    with pytest.raises(
        EvaluatorError, match=r"(?s)16 of 16 samples .* could not be scored.*judge is gone"
    ):
        modes.run("train", changed, {}, tmp_path, 0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.latest_step() == 1
    checkpoints.close()


def test_a_run_interrupted_before_its_first_step_says_so_and_goes_on_from_there(
    config, whole, tmp_path, monkeypatch, capsys
):
    ahead = train.compile_ahead

    def interrupted(*arguments, **settings):
        signal.raise_signal(signal.SIGINT)
        return ahead(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_ahead", interrupted)
        with pytest.raises(Interrupted, match=f"interrupted at 0/{STEPS}"):
            modes.run("train", config, {}, tmp_path, 0)
    assert not lines_of(tmp_path) and "gain" not in capsys.readouterr().out
    assert not (tmp_path / "config.json").exists()
    assert not list((tmp_path / "checkpoints").iterdir())
    modes.run("train", config, {}, tmp_path, 0)
    assert_equal(last_state(tmp_path), last_state(whole))


def start(spec, workdir, hold, *arguments):
    environment = os.environ | {
        "RFTJAX_TEST_HOLD": str(hold),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    command = [sys.executable, "-m", "rftjax.main", f"--config={spec}", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment,
        cwd=Path(rftjax.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    path.unlink()


def test_a_run_that_is_killed_and_interrupted_ends_as_if_nothing_had_happened(
    config, whole, tmp_path
):
    (tmp_path / "config.json").write_text(configs.to_json(config))
    spec, workdir = tmp_path / "spec.py", tmp_path / "run"
    spec.write_text(SPEC.format(path=str(tmp_path / "config.json")))
    # The third step's scores wait for such a file to go, and say so; each process has its own.
    kill, interrupt = tmp_path / "kill", tmp_path / "interrupt"
    kill.touch()
    interrupt.touch()

    process = start(spec, workdir, kill, "--config.steps=4")
    wait_for(process, tmp_path / "kill.reached")
    process.kill()
    process.communicate(timeout=300)  # and closes its pipe
    assert process.returncode == -signal.SIGKILL
    assert lines_of(workdir)[-1]["step"] == 2
    kill.unlink()

    process = start(spec, workdir, interrupt)
    wait_for(process, tmp_path / "interrupt.reached")
    process.send_signal(signal.SIGTERM)
    interrupt.unlink()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    assert (
        "interrupted at 3/4; the same command goes on" in out and "held-out reward after" not in out
    )
    assert lines_of(workdir)[-1]["step"] == 3  # the step under way ended and was saved
    assert not (workdir / "export").exists()

    process = start(spec, workdir, tmp_path / "none")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "held-out reward after" in out
    assert_same_run(workdir, whole)


def test_attention_that_the_devices_do_not_have_is_refused(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.model.attention = "cudnn"
    with pytest.raises(
        ValueError, match="model.attention='cudnn': must be .* model.dtype='float32'"
    ):
        modes.run("train", config, {}, tmp_path, 0)
    config.model.dtype = "bfloat16"
    for form, needed in (
        ("cudnn", "an NVIDIA GPU"),
        ("triton", "an NVIDIA GPU"),
        ("splash", "a TPU"),
    ):
        config.model.attention = form
        with pytest.raises(ValueError, match=f"needs {needed}, there is cpu; set it to 'blocked'"):
            modes.run("train", config, {}, tmp_path / form, 0)


def test_evicted_rows_are_counted_from_step_to_step():
    counters = Counters(evicted_rows=3)
    part = types.SimpleNamespace(
        config=ConfigDict({"environment": "file.py:name", "agent": ""}),
        rollout=types.SimpleNamespace(
            engine=types.SimpleNamespace(counters=counters), bystanders=2
        ),
        compilations=types.SimpleNamespace(take=lambda: {"compile/programs": 1.0}),
        scorer=types.SimpleNamespace(bystanders=1),
    )
    always = {"compile/programs": 1.0, "evaluator/bystanders": 1.0}
    found = {**always, "throughput/evicted_rows": 3.0, "environment/bystanders": 2.0}
    assert step_counts(part) == found
    assert step_counts(part) == {**found, "throughput/evicted_rows": 0.0}
    part.config.environment = ""
    assert step_counts(part) == always


def test_a_flag_that_contradicts_the_stored_config_is_an_error(config, whole, tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(config))
    spec = tmp_path / "spec.py"
    spec.write_text(SPEC.format(path=str(tmp_path / "config.json")))
    process = start(spec, whole, tmp_path / "no", "--config.batch.prompts=2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error:" in out and "batch.prompts" in out and "Traceback" not in out


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_abstract_state_is_that_of_the_state(config, tmp_path, rank, kl):
    one = config.copy_and_resolve_references()
    one.lora.rank, one.grpo.kl_weight, one.mesh.fsdp = rank, kl, 2
    with job.build(job.complete_config(one), tmp_path) as parts:
        abstract, state = parts.state_builder.abstract_state, parts.state_builder.initial_state()
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
        assert not leaf.weak_type
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


def test_a_resume_does_not_read_the_base_model_that_it_does_not_need(
    config, whole, tmp_path, monkeypatch
):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.delete_after(STEPS - 1)
    checkpoints.close()
    monkeypatch.setattr(hf, "_read_leaf", lambda *_: pytest.fail("the base model was read"))
    modes.run("train", config, {}, tmp_path, 0)
    assert_equal(last_state(tmp_path), last_state(whole))


@contextlib.contextmanager
def late_compilations(monkeypatch):
    """Names of what a run compiles in its steps, but for calls of a few instructions outside of jitted functions."""
    compiled, steps = [], []

    def note(event, duration_secs, **facts):
        if event.endswith("backend_compile_duration") and steps:
            compiled.append(facts.get("fun_name", ""))

    ahead = train.compile_ahead

    @contextlib.contextmanager
    def compile_and_note(*arguments, **settings):
        with ahead(*arguments, **settings):
            yield
        steps.append("compiled")

    monkeypatch.setattr(train, "compile_ahead", compile_and_note)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    large = (
        "update", "score", "decode", "prefill", "copy_rows", "chosen_experts", "sampler_params",
        "idle_rows",
    )  # fmt: skip
    late = []
    try:
        yield late
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert steps == ["compiled"]
    late += [name for name in compiled if any(one in name for one in large)]


@pytest.mark.parametrize(("updates", "rank"), [(1, 0), (2, 0), (2, 4)])
def test_a_step_compiles_nothing_that_was_not_compiled_before_it(
    config, tmp_path, monkeypatch, updates, rank
):
    with late_compilations(monkeypatch) as late:
        one = config.copy_and_resolve_references()
        one.eval.every, one.steps, one.export = 0, 2, False
        one.grpo.updates_per_batch, one.grpo.kl_weight = updates, 0.1 * (updates - 1)
        one.lora.rank, one.grpo.kl_refresh_steps = rank, rank // 2
        modes.run("train", one, {}, tmp_path, 0)
    assert not late
    assert all(line["compile/programs"] >= 0 for line in lines_of(tmp_path))


def test_a_failed_start_and_a_check_bind_no_workdir(config, tmp_path):
    broken = config.copy_and_resolve_references()
    broken.evaluator = config.evaluator.replace(":evaluate", ":nothing")
    with pytest.raises(UserError, match="nothing"):
        modes.run("train", broken, {}, tmp_path)
    changed = config.copy_and_resolve_references()
    changed.evaluator = config.evaluator.replace(":evaluate", ":failing")
    changed.batch.prompts, changed.scoring.max_error_share = 5, 0.0  # the first step has draw 4
    with pytest.raises(EvaluatorError):
        modes.run("train", changed, {}, tmp_path)
    modes.run("check", config, {}, tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "run.json").exists()
    assert job.open_config(tmp_path, config, {}).evaluator == config.evaluator


def test_a_run_goes_on_with_moved_inputs_a_grown_length_and_another_rate(config, whole, tmp_path):
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole, workdir)
    shutil.copytree(Path(config.tasks.train).parent, moved)
    shutil.copytree(config.model.path, moved / "model")
    flags = {
        "steps": STEPS + 1,
        "export": False,
        "model.path": str(moved / "model"),
        "tasks.train": str(moved / "train.jsonl"),
        "tasks.heldout": str(moved / "heldout.jsonl"),
        "evaluator": f"{moved / 'evaluator.py'}:evaluate",
        "rollout.max_length": 32,
        "optim.lr": 1e-3,
        "mesh.fsdp": 2,
        "scoring.max_error_share": 1.0,
    }
    given = config.copy_and_resolve_references()
    given.update_from_flattened_dict(flags)
    modes.run("train", given, flags, workdir)
    line = lines_of(workdir)[-1]
    assert (line["step"], line["changed/optim.lr"], line["changed/rollout.max_length"]) == (
        STEPS + 1,
        1e-3,
        32,
    )
    assert "changed/evaluator" not in line
    (moved / "evaluator.py").write_text(EVALUATOR.replace("/ 8", "/ 4"))
    given.steps = flags["steps"] = STEPS + 2
    with pytest.raises(UserError, match="--accept_changed=evaluator"):
        modes.run("train", given, flags, workdir)
    modes.run("train", given, flags, workdir, accepted=["evaluator"])
    assert lines_of(workdir)[-1]["changed/evaluator"] == 1.0


def test_going_back_to_a_checkpoint_makes_the_same_run_again(config, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "rollouts" / "step_000004.jsonl").unlink()
    with pytest.raises(UserError, match=r"restart_from=1: .* there are .*3, 4; give one"):
        modes.run("train", config, {}, workdir, restart_from=1)
    modes.run("train", config, {}, workdir, restart_from=3)
    assert_same_run(workdir, whole)


def test_fewer_steps_than_were_done_end_a_run_complete_with_an_export(config, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "export")
    given = config.copy_and_resolve_references()
    given.steps = 2
    modes.run("train", given, {"steps": 2}, workdir)
    assert (workdir / "export" / "config.json").exists()
    assert [line["step"] for line in lines_of(workdir)] == list(range(STEPS + 1))
