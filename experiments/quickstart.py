"""The quickstart: SmolLM2-135M-Instruct learns to answer with exactly the JSON record that was asked for.

`:debug` is the same job in a few seconds: few tasks, few steps.
"""

from pathlib import Path

from ml_collections import ConfigDict

from rftjax.config import base_config, embedded_model

HERE = Path(__file__).absolute().parent


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty or "debug"."""
    if arg not in ("", "debug"):
        raise ValueError(f"argument {arg!r}: must be empty or debug")
    config = base_config()
    config.steps = 12
    config.evaluator = "rftjax.evaluators.json_record:evaluate"
    config.model.path = embedded_model()
    config.tasks.train = config.tasks.heldout = f"{HERE}/facts.py:rows"
    config.tasks.heldout_split = "heldout"
    config.batch.prompts, config.batch.group_size = 8, 8
    config.sampler.max_new_tokens = 24
    config.rollout.max_length = 160
    config.batch.pack_tokens, config.batch.pack_rows = 256, 2
    config.sampler.prefill_rows, config.sampler.prefill_chunk = 16, 16  # prompts of 80 tokens
    config.optim.lr = 2e-5
    config.optim.warmup_steps = 2
    config.eval.every, config.checkpoint.every = 12, 6
    if arg == "debug":
        config.steps, config.optim.warmup_steps = 2, 0
        config.batch.prompts, config.batch.group_size = 2, 4
        config.sampler.slots, config.eval.max_tasks = 8, 8
    return config
