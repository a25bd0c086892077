"""`scripts/export_hf.py` turns a checkpoint of a run into a Hugging Face directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax import config as configs
from rftjax.compare import Run, mean_and_error
from rftjax.errors import UserError
from rftjax.run import results
from rftjax.run.checkpoint import Checkpoints
from rftjax.text import tokenizer
from rftjax.types import TrainState
from rftjax.weights import exporting, hf

DATA = Path(__file__).parent / "data"
SCRIPT = Path(__file__).parents[1] / "scripts" / "export_hf.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)


def workdir_of(workdir: Path, states: dict[int, Any], frozen: Any = (), rank: int = 0) -> Path:
    """Writes what a run leaves: config.json and one checkpoint a step."""
    config = configs.base_config()
    config.model.path = str(DATA / "tiny")
    config.lora.rank = rank
    workdir.mkdir()
    (workdir / "config.json").write_text(configs.to_json(config))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=-1)
    for step, trainable in states.items():
        state = TrainState(jnp.asarray(step), trainable, frozen or {}, {})
        checkpoints.save(step, state, {}, {"eval/reward": -float(step)})
    checkpoints.close()
    return workdir


@pytest.fixture
def params() -> Any:
    return hf.load(DATA / "tiny")[1]


def test_the_best_a_given_and_the_newest_step_are_exported(params: Any, tmp_path: Path):
    states = {step: jax.tree.map(lambda leaf, s=step: leaf + s, params) for step in (1, 2)}
    workdir = workdir_of(tmp_path / "run", states)
    for flags, step in [((), 1), (("--step=2",), 2), (("--step=best",), 1), (("--step=last",), 2)]:
        ran = run(f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *flags)
        assert ran.returncode == 0, ran.stderr
        assert f"step {step} of" in ran.stdout
        found = hf.load(tmp_path / "out")[1]
        np.testing.assert_array_equal(
            found["embed"]["embedding"], states[step]["embed"]["embedding"]
        )
        facts = exporting.facts_of(tmp_path / "out")
        assert (facts["run"], facts["step"], facts["last_step"]) == (str(workdir), step, 2)
        assert facts["eval/reward"] == -step
    words = tokenizer.load(tmp_path / "out")
    assert words.encode("w1 w60") == [4, 63]
    assert tokenizer.stop_tokens(tmp_path / "out", words) == (1,)


def test_adapters_are_merged(params: Any, tmp_path: Path):
    kernel_LDHC = params["layers"]["attention"]["query"]["kernel"]
    L, D, H, C = kernel_LDHC.shape
    adapter = {"a": jnp.ones((L, D, 2)), "b": jnp.full((L, 2, H * C), 0.25)}
    lora = {"layers": {"attention": {"query": adapter}}}
    workdir = workdir_of(tmp_path / "run", {1: lora}, frozen=params, rank=2)
    ran = run(f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
    assert ran.returncode == 0, ran.stderr
    found = hf.load(tmp_path / "out")[1]["layers"]["attention"]
    scale = configs.base_config().lora.alpha / 2
    np.testing.assert_allclose(found["query"]["kernel"], kernel_LDHC + 2 * 0.25 * scale, rtol=1e-6)
    np.testing.assert_array_equal(
        found["key"]["kernel"], params["layers"]["attention"]["key"]["kernel"]
    )


def test_a_checkpoint_is_not_exported_over_its_run(params: Any, tmp_path: Path):
    workdir = workdir_of(tmp_path / "run", {3: params})
    before = sorted(workdir.rglob("*"))
    for flags in ((), ("--adapter",)):
        ran = run(f"--workdir={workdir}", f"--out={workdir}", *flags)
        assert ran.returncode == 1
    assert (
        "holds checkpoints, config.json, which no export wrote"
        in run(f"--workdir={workdir}", f"--out={workdir}").stderr
    )
    assert sorted(workdir.rglob("*")) == before


def test_an_export_without_a_held_out_reward_is_of_the_newest_step(params: Any, tmp_path: Path):
    workdir = workdir_of(tmp_path / "run", {})
    checkpoints = Checkpoints(workdir / "checkpoints", keep=-1)
    for step in (1, 2):
        checkpoints.save(step, TrainState(jnp.asarray(step), params, {}, {}))
    assert results.choose_step(checkpoints, "") == 2
    with pytest.raises(UserError, match="--step=best: no checkpoint has a held-out reward"):
        results.choose_step(checkpoints, "best")
    checkpoints.close()


def test_the_adapter_names_a_base_that_peft_can_load_or_none(tmp_path: Path):
    (tmp_path / "model.gguf").touch()
    assert results.loadable_by_peft("owner/name") == "owner/name"
    assert results.loadable_by_peft(str(tmp_path)) == str(tmp_path)
    assert results.loadable_by_peft(str(tmp_path / "model.gguf")) == ""
    assert results.loadable_by_peft("owner/model.gguf") == ""


def lines(workdir: Path, rewards: dict[int, dict[str, float]], steps: int) -> Run:
    """Writes the metrics and held-out rollouts of a run whose tasks had these rewards at these steps."""
    (workdir / "rollouts").mkdir(parents=True)
    with open(workdir / "metrics.jsonl", "w") as file:
        for step in range(steps + 1):
            line: dict[str, float] = {"step": step}
            if of := rewards.get(step):
                mean, error = mean_and_error([*of.values()])
                line |= {"eval/reward": mean, "eval/reward_stderr": error, "eval/tasks": len(of)}
                path = workdir / "rollouts" / f"heldout_{step:06d}.jsonl"
                records = [{"task_id": t, "reward": r, "valid": True} for t, r in of.items()]
                path.write_text("".join(json.dumps(record) + "\n" for record in records))
            file.write(json.dumps(line) + "\n")
    return Run(workdir)


def test_the_gain_has_the_standard_error_of_the_differences_of_the_same_tasks(tmp_path: Path):
    before = {"a": 0.0, "b": 0.5, "c": 1.0}
    after = {"a": 0.25, "b": 0.75, "c": 1.25}  # each by the same: certain, though the tasks differ
    found = results.held_out(lines(tmp_path / "one", {0: before, 2: after}, 2), "heldout")
    assert found[1].startswith("held-out reward after   0.750 ± 0.289")
    assert found[2] == "gain                    +0.250 ± 0.000  (paired over 3 tasks)"
    after = {"a": 0.5, "b": 0.5, "c": 1.25}
    found = results.held_out(lines(tmp_path / "two", {0: before, 2: after}, 2), "heldout")
    error = np.std([0.5, 0.0, 0.25], ddof=1) / np.sqrt(3)
    assert found[2] == f"gain                    +0.250 ± {error:.3f}  (paired over 3 tasks)"


def test_other_tasks_are_not_paired(tmp_path: Path):
    rewards = {0: {"a": 0.0, "b": 1.0}, 2: {"a": 1.0, "c": 1.0, "d": 0.0, "e": 1.0}}
    found = results.held_out(lines(tmp_path, rewards, 2), "heldout")
    assert found[2] == f"gain                    +0.250 ± {np.hypot(0.5, 0.25):.3f}  (not paired)"


def test_an_evaluation_of_an_earlier_step_is_not_called_after(tmp_path: Path):
    rewards = {0: {"a": 0.0}, 2: {"a": 1.0}}
    found = results.held_out(lines(tmp_path / "one", rewards, 3), "heldout")
    assert found[1].startswith("held-out reward latest  1.000 ± 0.000  (step 2, 1 tasks)")
    found = results.held_out(lines(tmp_path / "two", {0: {"a": 0.0}}, 3), "heldout")
    assert len(found) == 1 and found[0].startswith("held-out reward before")


def test_the_summary_says_which_step_was_exported(params: Any, tmp_path: Path):
    states = {1: params, 2: jax.tree.map(jnp.zeros_like, params)}
    workdir = workdir_of(tmp_path / "run", states)
    config = configs.from_json((workdir / "config.json").read_text())
    for wanted, text in [("best", "step 1, the best; the last is 2, eval/reward -1.000"),
                         ("last", "step 2, the last, eval/reward -2.000")]:  # fmt: skip
        with config.unlocked():
            config.export_step = wanted
        results.export_run(config, workdir)
        assert f"{workdir / 'export'}  ({text})" in results.summary(workdir)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(params: Any, tmp_path: Path):
    workdir = workdir_of(tmp_path / "run", {3: params})
    ran = run(f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--step=7")
    assert ran.returncode == 1
    assert "--step=7: there is no such checkpoint; there are [3]" in ran.stderr
    assert not (tmp_path / "out").exists()
    told = "/nowhere: holds no checkpoint to export; give that of a run"
    assert told in run("--workdir=nowhere", f"--out={tmp_path / 'out'}").stderr
