import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import rftjax
from rftjax import config as configs
from rftjax import tasks, train
from rftjax.run import build as job
from rftjax.workers.user_code import load_function

SOURCE = Path(__file__).parents[1] / "experiments" / "loop.py"
EVALUATOR = """
def evaluate(task, trajectory):
    return len(set(trajectory.completion.split())) / 8
"""


@pytest.fixture(scope="module")
def loop():
    spec = importlib.util.spec_from_file_location("loop", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_a_page():
    assert len(SOURCE.read_text().splitlines()) <= 120


def test_the_loop_makes_the_updates_of_train(loop, tiny_dir, tmp_path):
    rows = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps, config.model.path = 2, str(tiny_dir)
    config.tasks.train = str(tmp_path / "rows.jsonl")
    config.evaluator = f"{tmp_path / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 3, 4, 64
    config.sampler.max_new_tokens, config.sampler.slots, config.rollout.max_length = 6, 12, 24
    config.scoring.workers, config.scoring.timeout_s = 1, 120.0
    config.optim.lr, config.seed = 1e-3, 5
    state, _ = train.train(job.complete_config(config), tmp_path / "run")

    policy = rftjax.load(str(tiny_dir))
    found = loop.train(
        policy,
        tasks.load(config.tasks.train),
        load_function(config.evaluator),
        steps=2,
        prompts=3,
        samples=4,
        max_new_tokens=6,
        lr=1e-3,
        seed=5,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    for line, metrics in zip(lines, found, strict=True):
        for name in ("reward/mean", "loss", "grad_norm", "clip/share"):
            np.testing.assert_allclose(metrics[name], line[name], rtol=1e-4, atol=1e-6)
    start = rftjax.load(str(tiny_dir)).params
    moved = jax.tree.map(lambda one, two: np.abs(one - two).max(), policy.params, start)
    assert max(jax.tree.leaves(moved)) > 1e-3  # two updates of Adam
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=2e-5),
        policy.params,
        jax.device_get(state.trainable),
    )
