"""A job of a few steps on the tiny model, which tests change to what they look at."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from rftjax import config as configs

EVALUATOR = """
def evaluate(task, trajectory):
    return len(set(trajectory.completion.split())) / 8
"""


def tiny_job(tiny_dir: Path, folder: Path, rows: int = 16) -> ConfigDict:
    """Returns the config of two steps over so many prompts, with rows and evaluator in `folder`, no evaluation."""
    prompts = [{"prompt": f"w{i} w{i + 7} w{i % 5}"} for i in range(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "evaluator.py").write_text(EVALUATOR)
    config = configs.base_config()
    config.steps = 2
    config.model.path, config.tasks.train = str(tiny_dir), str(folder / "train.jsonl")
    config.evaluator = f"{folder / 'evaluator.py'}:evaluate"
    config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 4, 2, 128
    config.sampler.max_new_tokens, config.sampler.slots = 6, 8
    config.rollout.max_length, config.scoring.workers = 16, 1
    config.optim.lr, config.eval.every = 1e-2, 0
    return config
