"""`scripts/export_hf.py` turns a checkpoint of a run into a Hugging Face directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rftjax import config as configs
from rftjax import hf, tokenizer
from rftjax.checkpoint import Checkpoints
from rftjax.types import TrainState

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


def test_the_newest_a_given_and_the_best_step_are_exported(params: Any, tmp_path: Path):
    states = {step: jax.tree.map(lambda leaf, s=step: leaf + s, params) for step in (1, 2)}
    workdir = workdir_of(tmp_path / "run", states)
    for flags, step in [((), 2), (("--step=1",), 1), (("--step=best",), 1)]:
        ran = run(f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *flags)
        assert ran.returncode == 0, ran.stderr
        assert f"step {step} of" in ran.stdout
        found = hf.load(tmp_path / "out")[1]
        np.testing.assert_array_equal(
            found["embed"]["embedding"], states[step]["embed"]["embedding"]
        )
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


def test_a_step_that_is_not_there_is_answered_with_those_that_are(params: Any, tmp_path: Path):
    workdir = workdir_of(tmp_path / "run", {3: params})
    ran = run(f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--step=7")
    assert ran.returncode == 1
    assert "--step=7: there is no such checkpoint; there are [3]" in ran.stderr
    assert not (tmp_path / "out").exists()
    assert "config.json" in run("--workdir=nowhere", f"--out={tmp_path / 'out'}").stderr
