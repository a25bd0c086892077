import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rftjax import config as configs
from rftjax import modes
from rftjax.devices import processes
from rftjax.run import build as job

ROOT = Path(__file__).parents[1]
USER_CODE = """
import os, signal

def evaluate(task, trajectory):
    return len(set(trajectory.completion.split())) / 8

def hook(step, metrics, trajectories, state):
    if step == 1 and os.environ.get("PROCESS") == "1":
        os.kill(os.getpid(), signal.SIGINT)
"""
# What each of two processes runs: the same calls, in the same order.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
import jax
import test_partial, test_rollout
from rftjax import config as configs, modes
from rftjax.devices import processes
from rftjax.errors import NotFinite
from rftjax.run.interruption import Interrupted, Interruption
from rftjax.run.prefetch import Prefetch
from rftjax.run.shares import scored_by_all
from rftjax.run.training import device_bytes
from rftjax.models import decoder
from rftjax.sampler import device
from rftjax.scoring import Scorer
from rftjax.types import Task, TrainState, Trajectory

def fail_in_one():
    faults = [(None, ValueError("no more room")), (OSError("no file"), NotFinite("logits"))]
    for fault in (pair[processes.index()] for pair in faults):
        try:
            with processes.together():
                if fault:
                    raise fault
        except (ValueError, OSError) as error:
            print(type(error).__name__, isinstance(error, NotFinite), error)

def interrupt_one():
    with Interruption():
        if processes.index() == 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        everywhere = processes.gather(processes.index())  # what the others wait for is not cut
        try:
            with processes.together():
                time.sleep(60 * processes.index())
        except KeyboardInterrupt as error:
            print("interrupted after", everywhere)

def differ():
    try:
        own = {"seed": "0", "steps": str(processes.index())}
        own |= {"extra": "1"} if processes.index() else {}
        processes.same(own, "Start them alike")
    except ValueError as error:
        print(error)

def sample_ahead(sampling):
    def use(state, *, keep=False):
        sampling.use(state)
    def sample(draws):
        return sampling.rollout(draws, test_partial.GROUP, test_partial.PARAMS)
    def batches(source, staleness):
        prefetch = Prefetch(source, 2, use, sample, lambda: None, staleness)
        for step in range(4):
            older = max(0, step - 1) if not staleness else step  # what the other one samples with
            found = prefetch.take(TrainState(older, {}, {}, ()), 2)
            prefetch.begin(TrainState(step, {}, {}, ()), last=False)
            assert processes.gather(step) == [step] * 2  # beside the thread
            yield test_partial.facts(found)
        prefetch.close()
    source = sampling.stream
    before = source.state()
    ahead = list(batches(source, 1))
    source.restore(before)
    assert list(batches(source, 0)) == ahead
    print("ahead", [found[0][0] for found in ahead])

def measure_memory():
    whole, pages = os.sysconf, 2**20 * (3 - processes.index())
    os.sysconf = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}.__getitem__
    print("memory", device_bytes() / 2**30)
    os.sysconf = whole

def score_all_at_once():
    with Scorer("") as scorer:
        scorer.scope = "all"
        own = [Trajectory(Task("row", []), processes.index() + 2 * at, 0, turn_rewards=[float(at)]) for at in range(2)]
        for one in own:
            scorer.submit(one)
        found = scored_by_all(scorer, own)
        print("scored", [(one.draw, one.score.reward) for one in found], len(scorer._pending))

def carry_what_is_not_complete(folder):
    tokenizer = test_rollout.ambiguous_tokenizer(folder)
    made = (decoder.init(test_rollout.CONFIG, jax.random.key(seed)) for seed in range(2))
    weights = [device.sampler_params(test_rollout.CONFIG, one) for one in made]
    whole, resumed = (test_partial.Sampling(weights, tokenizer) for _ in range(2))
    taken = [whole.take(step) for step in range(3)]
    stored = json.dumps(whole.partial.position())
    resumed.partial.restore(json.loads(stored))
    assert json.dumps(resumed.partial.position()) == stored
    for step in range(3, 6):
        taken.append(whole.take(step))
        assert test_partial.facts(resumed.take(step)) == test_partial.facts(taken[-1])
    draws = [sorted({one.draw for one in batch}) for batch in taken]
    ages = [len({*one.sequences[0].policy_version}) - 1 for batch in taken for one in batch]
    print("carried", json.dumps([draws, ages, stored, json.dumps(whole.partial.position())]))
    sample_ahead(test_partial.Sampling(weights, tokenizer))

if __name__ == "__main__":
    address, workdir = sys.argv[1:]
    processes.HEARTBEAT_S = 240  # on a busy machine; a death shows in the connection before
    processes.start(address, 2, int(os.environ["PROCESS"]))
    masks = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print("taken", bool(int(masks["SigCgt"], 16) >> signal.SIGTERM - 1 & 1))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    fail_in_one()
    interrupt_one()
    differ()
    measure_memory()
    score_all_at_once()
    carry_what_is_not_complete(Path(workdir) / f"tokenizer{processes.index()}")
    config = configs.from_json((Path(workdir) / "given.json").read_text())
    for _ in range(2):
        try:
            modes.run("train", config, {}, Path(workdir), 0)
        except Interrupted as error:
            print(error)
    print("stays", flush=True)
    if processes.index() == 1:
        os._exit(9)
    try:
        processes.gather(None)
    except Exception as error:
        processes.leave(f"error: {error}")
"""


@pytest.fixture(scope="module")
def config(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    for name, first, count in (("train", 0, 8), ("heldout", 20, 3)):
        rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "user.py").write_text(USER_CODE)
    config = configs.base_config()
    config.steps = 2
    shutil.copytree(tiny_dir, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    shape = json.loads((tiny_dir / "config.json").read_text()) | {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
    }
    (folder / "model/config.json").write_text(json.dumps(shape))
    config.model.path, config.model.init = str(folder / "model"), "random"
    config.tasks.train = str(folder / "train.jsonl")
    config.tasks.heldout = str(folder / "heldout.jsonl")
    config.evaluator, config.hooks = f"{folder}/user.py:evaluate", f"{folder}/user.py:hook"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 4, 4, 128
    config.sampler.max_new_tokens, config.sampler.slots = 8, 8
    config.rollout.max_length = 24
    config.scoring.workers, config.scoring.timeout_s = 1, 120.0
    config.optim.lr = 1e-2
    config.mesh.fsdp = 8
    config.eval.every, config.checkpoint.every = 2, 0
    return config


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
    """The workdir of a run by two processes, their weights in their hosts' memory, and what each of them said."""
    workdir = tmp_path_factory.mktemp("two")
    config = config.copy_and_resolve_references()
    config.optim.offload = "all"
    (workdir / "given.json").write_text(configs.to_json(config))
    (workdir / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(workdir / "program.py"), address, str(workdir)]
    xla = "--xla_force_host_platform_device_count=4"
    xla += " --xla_cpu_collective_call_terminate_timeout_seconds=240"
    flags = {"XLA_FLAGS": xla, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **flags, "PROCESS": str(process)},
        )
        for process in range(2)
    ]
    try:
        said = [(*one.communicate(timeout=300), one.returncode) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    return workdir, said


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    modes.run("train", config, {}, workdir, 0)
    return workdir


def records(workdir, name):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_two_processes_train_save_resume_and_export_as_one_does(one, two):
    workdir, said = two
    for name in ("step_000001", "step_000002", "heldout_000000", "heldout_000002"):
        left, right = (records(place, f"rollouts/{name}.jsonl") for place in (one, workdir))
        assert [row["draw"] for row in left] == [row["draw"] for row in right], said
        for one_row, other in zip(left, right, strict=True):
            assert one_row["reward"] == other["reward"]
            for first, second in zip(one_row["sequences"], other["sequences"], strict=True):
                assert first["tokens"] == second["tokens"]
    for left, right in zip(
        *(records(place, "metrics.jsonl") for place in (one, workdir)), strict=True
    ):
        own = ("time/", "compile/", "throughput/")
        left, right = (
            {name: line[name] for name in line if not name.startswith(own)}
            for line in (left, right)
        )
        assert set(left) == set(right)
        for name in left:
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name
    weights = [load_file(place / "export/model.safetensors") for place in (one, workdir)]
    for name, array in weights[0].items():
        np.testing.assert_allclose(weights[1][name], array, atol=1e-5, err_msg=name)


def test_a_signal_to_one_process_and_a_fault_in_one_end_all(two):
    for process, (said, errors, _) in enumerate(two[1]):
        lines = said.splitlines()
        own = "ValueError False no more room"
        other = "OtherProcess False process 1 of 2 failed: ValueError: no more room"
        assert (own if process else other) in lines, errors
        assert "interrupted at 1/2" in lines, errors


def test_a_number_that_is_not_finite_in_one_process_is_that_in_all(two):
    """Also where another process has a fault of its own: all or none of them save."""
    for process, (said, errors, _) in enumerate(two[1]):
        own = "NotFinite True logits"
        other = "OtherNotFinite True process 1 of 2 failed: NotFinite: logits"
        assert (own if process else other) in said.splitlines(), errors


def test_processes_agree_on_the_least_memory_of_their_devices(two):
    for said, errors, _ in two[1]:
        assert "memory 8.0" in said.splitlines(), errors


def test_an_evaluator_of_all_keeps_no_conversation_of_its_own_process(two):
    for said, errors, _ in two[1]:
        scored = "scored [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0)] 0"
        assert scored in said.splitlines(), errors


@pytest.mark.parametrize("size", [0, 7, 2**31, 5 << 40])
def test_sizes_beyond_what_int32_holds_pass_through_jax(size):
    words = np.asarray(jnp.stack([processes.as_words(size)] * 2))
    assert words.dtype == np.int32
    assert processes.from_words(words).tolist() == [size] * 2


def test_a_process_that_dies_ends_the_other_with_a_message(two):
    (said, errors, code), (_, _, other) = two[1]
    assert "stays" in said and other == 9
    assert code not in (0, None) and "error" in errors.lower(), errors


def test_a_process_that_waits_in_vain_says_what_for_and_ends_by_itself():
    program = """
from rftjax.devices import processes
processes.TELL_S, processes.START_S = 0.1, 1
processes.start("127.0.0.1:1", 2, 1)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    _, waits, error = run.stderr.splitlines()
    assert "process 1 of 2 waits for the others, up to 1 s: give all of them the same" in waits
    assert error.startswith("error: --coordinator=127.0.0.1:1: the processes did not come together")
    assert run.returncode == 1


def test_one_process_takes_all_and_exchanges_nothing():
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    value = object()
    assert processes.gather(value) == [value] and processes.agree(value) is value
    assert processes.first() and processes.count() == 1
    with pytest.raises(KeyError), processes.together():
        raise KeyError


def test_each_process_goes_on_with_its_own_unfinished_answers(two):
    told = []
    for said, errors, _ in two[1]:
        lines = [line for line in said.splitlines() if line.startswith("carried ")]
        assert lines, errors
        told.append(json.loads(lines[0].removeprefix("carried ")))
    (left, ages, *stored), (right, more_ages, *others) = told
    assert stored == others  # the whole position in each
    assert all(len(draws) == 1 for draws in left + right)  # of two groups a step
    for position, steps in zip(map(json.loads, stored), (3, 6), strict=True):
        taken = [draw for draws in left[:steps] + right[:steps] for draw in draws]
        under_way = position["carried"]["draws"]
        assert sorted(taken + under_way) == list(range(position["draw"]))
        assert len(under_way) == 3
        assert {turn["draw"] for turn in position["carried"]["turns"]} <= {*under_way}
    assert max(ages + more_ages) >= 2


def test_processes_may_sample_ahead_where_no_device_waits_for_others(config, two):
    for process, (said, errors, _) in enumerate(two[1]):
        assert f"ahead {list(range(process, 8, 2))}" in said.splitlines(), errors
    config = config.copy_and_resolve_references()
    config.overlap.max_staleness, config.grpo.tis_cap = 1, 2.0
    with pytest.raises(ValueError, match="two threads give their collectives no common order"):
        configs.check(job.complete_config(config), devices=8, processes=2)
    config.mesh.data, config.mesh.fsdp = 8, 1
    configs.check(job.complete_config(config), devices=8, processes=2)


def test_a_second_signal_ends_what_no_other_process_waits_for_and_ends_it_in_all(two):
    for said, errors, _ in two[1]:
        assert "interrupted after [0, 1]" in said.splitlines(), errors


def test_sigterm_ends_a_process_that_has_joined_and_does_not_train_yet(two):
    for said, errors, _ in two[1]:
        assert "taken False" in said.splitlines(), errors


def test_processes_that_were_started_otherwise_are_refused_by_name(two):
    what = "steps: 0 in process 0, 1 in process 1; extra: nothing in process 0, 1 in process 1"
    for said, errors, _ in two[1]:
        assert f"the processes of the run differ: {what}. Start them alike" in said, errors
