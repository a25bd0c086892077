"""What the specs of frontier models share: a job that is planned from a config.json of shapes/, without weights."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from rftjax.config import base_config

HERE = Path(__file__).absolute().parent


def spec(family: str, arg: str) -> ConfigDict:
    """Returns the spec of a folder of shapes/; `arg` is empty (LoRA), "full", "debug" or "full,debug"."""
    chosen = set(arg.split(",")) - {""}
    if chosen - {"full", "debug"}:
        raise ValueError(f"argument {arg!r}: must be empty or debug, full, or full,debug")
    config = base_config()
    config.evaluator = "rftjax.evaluators.json_record:evaluate"
    config.tasks.train = config.tasks.heldout = f"{HERE}/facts.py:rows"
    config.tasks.heldout_split = "heldout"
    config.model.path = f"{HERE}/shapes/{family}"
    config.model.dtype, config.model.remat = "bfloat16", "layer"
    config.steps = 100
    config.batch.prompts, config.batch.group_size = 64, 8
    config.sampler.slots, config.sampler.max_new_tokens = 256, 1024
    config.rollout.max_length, config.batch.pack_tokens = 2048, 2048
    # Experts lie on their devices, in the update and in decoding: no step gathers them.
    if "full" in chosen:
        config.optim.lr = 1e-6
        config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor = 1, -1, 16, 4
    else:
        config.lora.rank, config.optim.lr = 8, 1e-5
        config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor = 1, 1, -1, 2
    if "debug" in chosen:
        config.model.path = f"{HERE}/shapes/debug_{family}"
        config.model.init, config.model.dtype = "random", "float32"
        config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor = -1, 1, 1, 1
        config.steps, config.eval.max_tasks = 2, 4
        config.batch.prompts, config.batch.group_size = 2, 4
        config.sampler.slots, config.sampler.max_new_tokens = 8, 8
        config.rollout.max_length, config.batch.pack_tokens = 512, 512
    return config
