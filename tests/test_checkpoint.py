"""Checkpoints come back bit for bit, survive kills, and refuse what does not fit."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rftjax.run.checkpoint import Checkpoints, CorruptCheckpoint
from rftjax.types import TrainState

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_constant_schedule(0.0, 1e-2, 3), weight_decay=0.1),
)


def make_state(width: int = 4, frozen: bool = False) -> TrainState:
    trainable = {
        "layers": {"kernel": jax.random.normal(jax.random.key(0), (3, width, 5))},
        "half": jax.random.normal(jax.random.key(1), (7,)).astype(jnp.bfloat16),
    }
    base = {"embed": jnp.arange(6, dtype=jnp.float16), "ids": jnp.arange(3)} if frozen else {}
    return TrainState(jnp.zeros((), jnp.int32), trainable, base, OPTIMIZER.init(trainable))


def update(state: TrainState) -> TrainState:
    gradient = jax.tree.map(lambda leaf: jnp.sin(leaf * 3 + state.step), state.trainable)
    updates, opt_state = OPTIMIZER.update(gradient, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(state.step + 1, trainable, state.frozen, opt_state)


donating_update = jax.jit(update, donate_argnums=0)


def to_host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def first_step_saved(directory: Path, state: TrainState | None = None) -> Checkpoints:
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state if state is not None else make_state(), {"draw": 8})
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("frozen", [False, True])
def test_state_and_host_object_come_back_bit_for_bit(tmp_path, frozen):
    state = update(update(make_state(frozen=frozen)))
    host = {"draw": 2**70, "best": 0.1 + 0.2, "sampler": {"key": [1, 2]}, "text": "ä\n"}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(2, state, host, {"eval/reward": 0.5})
    checkpoints.close()
    example = jax.eval_shape(lambda: make_state(frozen=frozen))
    restored, restored_host = Checkpoints(tmp_path).restore(2, example)
    assert_same_bits(state, restored)
    assert isinstance(restored, TrainState)
    assert restored_host == host
    assert_same_bits(update(state), update(restored))


def test_donating_the_state_right_after_save_does_not_change_what_is_written(tmp_path):
    trainable = {"kernel": jnp.ones((512, 1024)), "bias": jnp.ones(7)}
    state = TrainState(jnp.zeros((), jnp.int32), trainable, {}, OPTIMIZER.init(trainable))
    checkpoints = Checkpoints(tmp_path, keep=-1)
    saved = {}
    for step in (1, 2):
        state = donating_update(state)
        saved[step] = to_host(state)
        checkpoints.save(step, state)
        for _ in range(3):
            before = state.trainable["kernel"]
            state = donating_update(state)
        assert before.is_deleted(), "the update donates nothing: this test shows nothing"
    checkpoints.wait()
    for step, expected in saved.items():
        restored, _ = checkpoints.restore(step, state)
        assert_same_bits(expected, restored)


def test_restored_arrays_have_the_shardings_of_the_example_on_another_mesh(tmp_path):
    state = make_state(width=8)
    devices = np.array(jax.devices())

    def placed(mesh: Mesh) -> TrainState:
        def place(leaf):
            spec = PartitionSpec(None, mesh.axis_names[0]) if leaf.ndim == 3 else PartitionSpec()
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(place, state)

    wide, narrow = placed(Mesh(devices, ("fsdp",))), placed(Mesh(devices[:1], ("data",)))
    checkpoints = first_step_saved(tmp_path, wide)
    for example in (narrow, wide):
        restored, _ = checkpoints.restore(1, example)
        assert_same_bits(state, restored)
        for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(example), strict=True):
            assert leaf.sharding == like.sharding


def test_parameters_come_back_alone_as_host_arrays(tmp_path):
    state = make_state(frozen=True)
    checkpoints = first_step_saved(tmp_path, state)
    shutil.rmtree(tmp_path / "1" / "optimizer")
    trainable, frozen = checkpoints.restore_params(1)
    assert_same_bits(state.trainable, trainable)
    assert_same_bits(state.frozen, frozen)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((trainable, frozen)))
    full = first_step_saved(tmp_path / "full")
    assert full.restore_params(1)[1] == {}


def test_newest_and_best_stay_and_one_without_metric_is_never_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    rewards = {1: 0.2, 2: 0.9, 3: 0.5, 4: None, 5: 0.1, 6: None, 7: float("nan")}
    kept, best = [], []
    for step, reward in rewards.items():
        checkpoints.save(step, make_state(), {}, {} if reward is None else {"eval/reward": reward})
        kept.append(checkpoints.steps())
        best.append(checkpoints.best_step())
        assert checkpoints.latest_step() == step
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
    assert best == [1] + [2] * 6
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    assert (again.best_step(), again.latest_step()) == (2, 7)
    again.save(8, make_state(), {}, {"eval/reward": 0.9})
    assert again.steps() == [8]
    assert again.best_step() == 8


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_ranks_nothing(tmp_path, value):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(), {}, {"eval/reward": value})
    checkpoints.rank(1, {"eval/reward": value})
    assert checkpoints.best_step() is None and np.isnan(checkpoints.metric(1))
    checkpoints.save(2, make_state())
    assert checkpoints.steps() == [2]


def test_a_directory_without_checkpoints_has_no_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", every=5)
    assert checkpoints.latest_step() is None
    assert checkpoints.best_step() is None
    assert [step for step in range(11) if checkpoints.due(step)] == [5, 10]
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        checkpoints.restore(3, make_state())
    with pytest.raises(ValueError, match="no such directory"):
        Checkpoints(tmp_path / "missing", read_only=True)


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    checkpoints = first_step_saved(tmp_path)
    assert not checkpoints.save(1, update(make_state()))
    assert_same_bits(checkpoints.restore(1, make_state())[0], make_state())


def test_steps_deleted_after_a_fall_back_can_be_written_anew(tmp_path):
    checkpoints = first_step_saved(tmp_path)
    checkpoints.save(2, make_state(), {}, {"eval/reward": 1.0})
    checkpoints.delete_after(1)
    assert checkpoints.steps() == [1]
    state = update(make_state())
    assert checkpoints.save(2, state)
    assert_same_bits(checkpoints.restore(2, make_state())[0], state)


KILLED = """
    import os, signal, sys, threading, time
    import jax.numpy as jnp
    from orbax.checkpoint import checkpoint_managers
    from rftjax.run.checkpoint import Checkpoints
    from rftjax.types import TrainState

    def state(step):
        trainable = {f"leaf{i}": jnp.full((50_000,), step, jnp.float32) for i in range(20)}
        return TrainState(jnp.asarray(step), trainable, {}, ())

    directory, delay_s = sys.argv[1], float(sys.argv[2])
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(1, state(1), {"draw": 1})
    checkpoints.wait()
    checkpoints.save(2, state(2), {"draw": 2})
    if delay_s < 0:  # at the first sight of a directory under construction
        while not [name for name in os.listdir(directory) if "2." in name]:
            pass
    else:
        time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("delay_s", [-1.0, 0.0, 0.02])
def test_sigkill_during_a_save_leaves_the_last_whole_checkpoint_and_the_step_can_be_saved_again(
    tmp_path, delay_s
):
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # what an earlier kill left
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(delay_s)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if delay_s < 0:
        assert list(tmp_path.glob("2.orbax-checkpoint-tmp*"))

    checkpoints = Checkpoints(tmp_path, keep=2)
    latest = checkpoints.latest_step()
    assert latest in (1, 2)
    trainable = {f"leaf{i}": jnp.zeros(50_000) for i in range(20)}
    state, host = checkpoints.restore(latest, TrainState(jnp.asarray(0), trainable, {}, ()))
    assert host == {"draw": latest}
    assert all((leaf == latest).all() for leaf in jax.tree.leaves(state))
    assert checkpoints.save(latest + 1, state, {"draw": latest + 1})
    checkpoints.close()
    assert Checkpoints(tmp_path).latest_step() == latest + 1
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_an_old_checkpoint_half_deleted_by_a_kill_does_not_disturb_the_restart(tmp_path):
    checkpoints = first_step_saved(tmp_path)
    checkpoints.save(2, make_state())
    checkpoints.close()
    for path in sorted((tmp_path / "1").iterdir()):
        if path.name != "host":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = Checkpoints(tmp_path, keep=1)
    assert again.latest_step() == 2
    again.save(3, make_state())
    assert again.steps() == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3"]


def test_another_model_is_refused_by_the_name_of_the_leaf(tmp_path):
    checkpoints = first_step_saved(tmp_path)
    with pytest.raises(ValueError, match=r"trainable/layers/kernel: float32\[3, 4, 5\] in the "):
        checkpoints.restore(1, make_state(width=6))
    with pytest.raises(ValueError, match="frozen/embed: absent in the checkpoint, float16"):
        checkpoints.restore(1, make_state(frozen=True))
    with pytest.raises(ValueError, match=r"half: bfloat16\[7\] in the checkpoint, float32\[7\]"):
        checkpoints.restore(1, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_state()))
    other = make_state()._replace(
        opt_state=optax.sgd(0.1, momentum=0.9).init(make_state().trainable)
    )
    with pytest.raises(ValueError, match=r"optimizer/opt_state/.* in this run.*another --workdir"):
        checkpoints.restore(1, other)


@pytest.mark.parametrize("item", ["trainable", "optimizer", "host"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_reported_with_the_item_and_an_earlier_step_still_loads(tmp_path, item, damage):
    checkpoints = first_step_saved(tmp_path)
    checkpoints.save(2, make_state())
    checkpoints.close()
    if damage == "missing":
        shutil.rmtree(tmp_path / "2" / item)
    else:
        files = [path for path in (tmp_path / "2" / item).rglob("*") if path.is_file()]
        for path in files:
            os.truncate(path, path.stat().st_size // 2)
    again = Checkpoints(tmp_path)
    assert again.latest_step() == 2
    with pytest.raises(CorruptCheckpoint, match=f"2/{item} cannot be read .*delete") as caught:
        again.restore(2, make_state())
    assert caught.value.step == 2
    assert_same_bits(again.restore(1, make_state())[0], make_state())


FULL_DISK = """
    import os, resource, sys
    import jax.numpy as jnp
    from rftjax.run.checkpoint import Checkpoints
    from rftjax.types import TrainState

    def state(count):
        values = jnp.sin(jnp.arange(count, dtype=jnp.float32) ** 2)
        return TrainState(jnp.asarray(0), {"kernel": values}, {}, ())

    checkpoints = Checkpoints(sys.argv[1], keep=1)
    checkpoints.save(1, state(10))
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        checkpoints.save(2, state(200_000))
        checkpoints.wait()
    except OSError as error:
        print("MESSAGE", error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(sys.argv[1]) == ["1"], os.listdir(sys.argv[1])
    assert checkpoints.save(2, state(10))
    assert checkpoints.steps() == [2]
"""


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "the disk is full" in run.stdout
    assert str(tmp_path) in run.stdout
    assert "Traceback" not in run.stderr


def test_an_unwritable_place_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write a checkpoint.*another --workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_reader_leaves_a_save_under_way_alone(tmp_path):
    first_step_saved(tmp_path).close()
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.steps() == [1]
    assert_same_bits(reader.restore_params(1)[0], make_state().trainable)
    assert partial.exists()


def test_senseless_settings_and_host_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match=r"checkpoint\.every=-1"):
        Checkpoints(tmp_path, every=-1)
    with pytest.raises(ValueError, match=r"host\['rng'\] of a checkpoint is not JSON"):
        Checkpoints(tmp_path).save(1, make_state(), {"rng": np.arange(3)})


def test_saving_logs_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        checkpoints = first_step_saved(tmp_path)
        checkpoints.restore(1, make_state())
    assert [record for record in caplog.records if "orbax" in record.pathname] == []
