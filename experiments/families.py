"""What the specs of the families share: a job, LoRA or full, and a short form from random weights.

The tasks are the quickstart's, so that each spec runs as it is; flags bring your tasks and evaluator.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from rftjax.config import base_config

HERE = Path(__file__).absolute().parent


def job(family: str, path: str, arg: str) -> ConfigDict:
    """Returns the spec of a model; `arg` is empty (LoRA), "full", "debug" or "full,debug"."""
    chosen = set(arg.split(",")) - {""}
    if chosen - {"full", "debug"}:
        raise ValueError(f"argument {arg!r}: must be empty or debug, full, or full,debug")
    config = base_config()
    config.steps = 100
    config.evaluator = "rftjax.evaluators.json_record:evaluate"
    config.tasks.train = config.tasks.heldout = f"{HERE}/facts.py:rows"
    config.tasks.heldout_split = "heldout"
    config.model.path = path
    config.model.dtype, config.model.remat = "bfloat16", "layer"
    config.batch.prompts, config.batch.group_size = 32, 8
    config.batch.pack_tokens = 2048
    config.sampler.slots, config.sampler.max_new_tokens = 128, 1024
    config.rollout.max_length = 2048
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.optim.warmup_steps = 5
    if "full" in chosen:
        config.optim.lr = 1e-6
    else:
        config.lora.rank, config.lora.alpha, config.optim.lr = 16, 32.0, 2e-5
    if "debug" in chosen:
        config.model.path = f"{HERE}/shapes/debug_{family}"
        config.model.init, config.model.dtype = "random", "float32"
        config.mesh.data, config.mesh.fsdp = -1, 1
        config.mesh.tensor = 1
        config.steps, config.optim.warmup_steps, config.eval.max_tasks = 2, 0, 4
        config.batch.prompts, config.batch.group_size, config.batch.pack_tokens = 2, 4, 512
        config.sampler.slots, config.sampler.max_new_tokens = 8, 8
        config.rollout.max_length = 512
    return config
