"""A multi-turn job: SmolLM2-135M-Instruct learns to look up what it needs before it answers.

`:debug` is the same job in a few seconds.
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
    config.steps = 8
    config.evaluator = "rftjax.evaluators.exact_match:evaluate"
    config.environment = f"{HERE}/directory.py:reply"
    config.model.path = embedded_model()
    config.tasks.train = config.tasks.heldout = f"{HERE}/directory.py:rows"
    config.tasks.heldout_split = "heldout"
    config.batch.prompts, config.batch.group_size = 8, 8
    config.batch.pack_tokens, config.batch.pack_rows = 384, 2
    config.sampler.max_new_tokens = 10
    config.rollout.max_turns, config.rollout.max_length = 3, 224
    config.optim.lr, config.optim.warmup_steps = 2e-5, 2
    config.eval.every, config.checkpoint.every = 4, 4
    if arg == "debug":
        config.steps, config.optim.warmup_steps = 2, 0
        config.batch.prompts, config.batch.group_size = 2, 4
        config.sampler.slots, config.eval.max_tasks = 8, 8
    return config
