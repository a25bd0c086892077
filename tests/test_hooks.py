import json

import numpy as np
import pytest

from rftjax import config as configs
from rftjax import modes
from rftjax.errors import UserError
from rftjax.run.hooks import Hook
from rftjax.types import TrainState

HOOKS = """
import numpy as np

def counts(step, metrics, trajectories, state):
    metrics["loss"] = 5.0  # its own copy
    return {"samples": len(trajectories), "seen/loss": np.float32(metrics["loss"]), "at": int(state.step)}

def silent(step, metrics, trajectories, state): ...
def text(step, metrics, trajectories, state): return {"x": "much"}
def listed(step, metrics, trajectories, state): return [1.0]
def nan(step, metrics, trajectories, state): return {"x": float("nan")}
def named(step, metrics, trajectories, state): return {"step": 3}
def short(step, metrics, trajectories): return {}
async def later(step, metrics, trajectories, state): return {}
class Counter:
    def __call__(self, step, metrics, trajectories, state): return {}

def breaks(step, metrics, trajectories, state):
    import os
    if step == 1 and not os.path.exists(__file__ + ".mended"):
        raise RuntimeError("no such luck")
    return {"fine": 1.0}
"""
STATE = TrainState(np.int32(3), {}, {}, ())


@pytest.fixture
def file(tmp_path):
    (tmp_path / "hooks_of_test.py").write_text(HOOKS)
    return tmp_path / "hooks_of_test.py"


@pytest.mark.parametrize("name", ["short", "later", "Counter"])
def test_a_hook_that_cannot_be_called_is_refused_before_the_first_step(file, name):
    with pytest.raises(UserError, match=f"hooks='.*{name}': must be callable as hook"):
        Hook(f"{file}:{name}")


def test_numbers_are_recorded_under_hook_or_the_name_that_is_given(file):
    metrics = {"loss": 1.0}
    found = Hook(f"{file}:counts")(3, metrics, [], STATE)
    assert found == {"hook/samples": 0.0, "seen/loss": 5.0, "hook/at": 3.0}
    assert metrics == {"loss": 1.0}
    assert Hook(f"{file}:silent")(3, metrics, [], STATE) == {} == Hook("")(3, metrics, [], STATE)


@pytest.mark.parametrize("name, told", [
    ("text", "returned x='much', which is no finite number"),
    ("nan", "returned x=nan"),
    ("listed", "returned list, not numbers by name or None"),
    ("named", "returned the name 'step'"),
    ("breaks", "(?s)raised this.*no such luck.*the step is saved"),
])  # fmt: skip
def test_what_is_wrong_with_a_hook_is_told(file, name, told):
    with pytest.raises(UserError, match=told):
        Hook(f"{file}:{name}")(1, {}, [], STATE)


def test_a_hook_that_raises_ends_the_run_after_its_step_and_the_same_command_goes_on(
    file, tiny_dir, tmp_path
):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3 w4"}\n')
    (tmp_path / "reward.py").write_text(
        "def evaluate(task, trajectory): return len(trajectory.completion) % 5 / 5"
    )
    config = configs.base_config()
    config.steps, config.model.path, config.export = 2, str(tiny_dir), False
    config.tasks.train = str(tmp_path / "rows.jsonl")
    config.evaluator, config.hooks = f"{tmp_path / 'reward.py'}:evaluate", f"{file}:breaks"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 2, 64
    config.sampler.max_new_tokens, config.sampler.slots, config.rollout.max_length = 4, 8, 16
    config.scoring.workers, config.scoring.timeout_s = 1, 120.0
    with pytest.raises(UserError, match=r"(?s)called with step 1, raised this.*no such luck"):
        modes.run("train", config, {}, tmp_path / "run", 0)
    file.with_name(file.name + ".mended").touch()
    modes.run("train", config, {}, tmp_path / "run", 0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2] and lines[-1]["hook/fine"] == 1.0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hooks"].endswith(":breaks")
