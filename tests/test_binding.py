import json
import logging

import jax.numpy as jnp
import pytest

from rftjax import config as configs
from rftjax.errors import UserError
from rftjax.run.binding import Binding, stored_config
from rftjax.run.checkpoint import Checkpoints
from rftjax.types import TrainState

INPUTS = {
    "model.path": {"config.json": "a"},
    "tasks.train": {"rows": "b"},
    "tasks.heldout": {"rows": "h"},
    "eval.sets[hard]": {"rows": "s"},
    "evaluator": {"name": "evaluate", "the file itself": "c"},
}


@pytest.fixture
def config():
    config = configs.base_config()
    config.evaluator = "reward.py:evaluate"
    config.eval.sets = ("hard=hard.jsonl",)
    return config


@pytest.fixture
def checkpoints(tmp_path):
    found = Checkpoints(tmp_path / "checkpoints", keep=-1)
    yield found
    found.close()


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, TrainState(jnp.int32(step), {"w": jnp.zeros(2)}, {}, ()))
    checkpoints.wait()


@pytest.fixture
def begun(tmp_path, config, checkpoints):
    """A workdir with checkpoints of steps 2, 4 and 6."""
    binding = Binding(tmp_path, config, INPUTS)
    assert binding.start(checkpoints) == 0
    binding.bind(1)
    save(checkpoints, 2, 4, 6)
    return tmp_path


def test_a_workdir_is_bound_by_its_first_checkpoint_and_not_by_a_step_0(
    tmp_path, config, checkpoints
):
    binding = Binding(tmp_path, config, INPUTS)
    assert not (tmp_path / "config.json").exists()
    binding.bind(1)
    assert (tmp_path / "config.json").exists() and stored_config(tmp_path) is None
    save(checkpoints, 0)
    assert stored_config(tmp_path) is None
    other = {**INPUTS, "tasks.train": {"rows": "other"}}
    assert Binding(tmp_path, config, other).start(checkpoints) == 0
    save(checkpoints, 1)
    assert stored_config(tmp_path).evaluator == config.evaluator
    with pytest.raises(UserError, match="not the tasks that the run began with"):
        Binding(tmp_path, config, other)


def test_checkpoints_without_a_config_are_refused(begun):
    (begun / "config.json").unlink()
    with pytest.raises(UserError, match=r"has checkpoints but no config\.json"):
        stored_config(begun)


@pytest.mark.parametrize("name", ["model.path", "tasks.train", "tasks.heldout", "evaluator"])
def test_inputs_with_other_contents_are_refused_with_a_way_out(begun, config, name):
    changed = {**INPUTS, name: {**INPUTS[name], "new part": "x"}}
    with pytest.raises(UserError, match="new part") as caught:
        Binding(begun, config, changed)
    assert "new workdir" in str(caught.value)
    assert ("--accept_changed=" in str(caught.value)) == (name in ("tasks.heldout", "evaluator"))


def test_an_accepted_change_is_marked_once_and_holds_from_then_on(begun, config, checkpoints):
    changed = {**INPUTS, "evaluator": {"name": "evaluate", "the file itself": "new"}}
    binding = Binding(begun, config, changed, accepted=["evaluator"])
    assert binding.start(checkpoints) == 6
    assert binding.bind(7) == {"changed/evaluator": 1.0}
    assert binding.bind(8) == {}
    again = Binding(begun, config, changed)
    again.start(checkpoints)
    assert again.bind(7) == {}
    (entry,) = json.loads((begun / "run.json").read_text())["changes"]
    assert (entry["after_step"], entry["field"]) == (6, "evaluator")


def test_a_name_that_cannot_be_accepted_is_refused(begun, config):
    with pytest.raises(UserError, match="--accept_changed=tasks.train: must be of evaluator"):
        Binding(begun, config, INPUTS, accepted=["tasks.train"])


def test_a_file_of_a_held_out_set_may_not_change_unseen_but_the_set_may(begun, config):
    changed = {**INPUTS, "eval.sets[hard]": {"rows": "new"}}
    with pytest.raises(UserError, match=r"eval\.sets\[hard\].*--accept_changed=eval\.sets"):
        Binding(begun, config, changed)
    config.eval.sets = ("hard=harder.jsonl",)
    Binding(begun, config, changed)
    config.eval.sets = ()
    Binding(begun, config, {k: v for k, v in INPUTS.items() if not k.startswith("eval.sets")})


def test_another_number_of_held_out_tasks_is_no_change_of_their_files(begun, config):
    changed = {**INPUTS, "tasks.heldout": {"rows": "fewer"}, "eval.sets[hard]": {"rows": "fewer"}}
    config.eval.max_tasks = 2
    Binding(begun, config, changed)
    config.eval.max_tasks = configs.base_config().eval.max_tasks
    with pytest.raises(UserError, match="tasks.heldout"):
        Binding(begun, config, changed)


def test_an_environment_that_was_taken_away_is_a_change(tmp_path, config, checkpoints):
    Binding(tmp_path, config, {**INPUTS, "environment": {"name": "World"}}).bind(1)
    save(checkpoints, 1)
    with pytest.raises(UserError, match="environment: differs"):
        Binding(tmp_path, config, INPUTS)


def test_a_changed_learning_rate_is_in_the_metrics_and_the_history(begun, config, checkpoints):
    config.optim.lr, config.scoring.workers = 0.5, 7
    binding = Binding(begun, config, INPUTS)
    binding.start(checkpoints)
    assert binding.bind(7) == {"changed/optim.lr": 0.5}
    record = json.loads((begun / "run.json").read_text())
    assert {(one["field"], one["before"], one["after"]) for one in record["changes"]} == {
        ("optim.lr", 1e-5, 0.5),
        ("scoring.workers", 2, 7),
    }
    assert stored_config(begun).optim.lr == 0.5


def test_going_back_says_what_it_drops_and_drops_it(begun, config, checkpoints, caplog):
    lines = [{"step": step, "loss": 0.0} for step in range(8)]
    (begun / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (begun / "rollouts").mkdir()
    for name in ("step_000004.jsonl", "step_000005.jsonl.gz", "heldout-hard_000006.jsonl"):
        (begun / "rollouts" / name).touch()
    with caplog.at_level(logging.WARNING):
        assert Binding(begun, config, INPUTS).start(checkpoints, restart_from=4) == 4
    assert checkpoints.steps() == [2, 4]
    assert (
        "--restart_from=4: dropped are the checkpoints of steps 6, the metrics of steps 5 to 7, 2 files of rollouts"
        in caplog.text
    )


@pytest.mark.parametrize("step", [0, 3, 8])
def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(
    begun, config, checkpoints, step
):
    with pytest.raises(UserError, match=f"restart_from={step}: .* there are 2, 4, 6; give one"):
        Binding(begun, config, INPUTS).start(checkpoints, restart_from=step)
    assert checkpoints.steps() == [2, 4, 6]


def test_a_record_that_is_damaged_says_what_to_do_and_that_works(begun, config):
    (begun / "run.json").write_text("{")
    with pytest.raises(UserError, match="delete it"):
        Binding(begun, config, INPUTS)
    (begun / "run.json").unlink()
    Binding(begun, config, INPUTS)


def test_an_input_that_only_moved_is_in_the_history_and_not_in_the_metrics(
    begun, config, checkpoints
):
    config.evaluator = "moved/reward.py:evaluate"
    binding = Binding(begun, config, INPUTS)
    binding.start(checkpoints)
    assert binding.bind(7) == {}
    (entry,) = json.loads((begun / "run.json").read_text())["changes"]
    assert entry["after"] == "moved/reward.py:evaluate"
