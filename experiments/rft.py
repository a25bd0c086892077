"""The general spec: all from flags, for people who bring a model, their tasks and an evaluator and write no spec.

    python -m rftjax.main --config=experiments/rft.py --workdir=DIR --config.model.path=MODEL \
        --config.tasks.train=train.jsonl --config.tasks.heldout=heldout.jsonl --config.evaluator=reward.py:evaluate
"""

from ml_collections import ConfigDict

from rftjax.config import base_config


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; with `arg` "debug" two steps of two small groups, to try a job out."""
    if arg not in ("", "debug"):
        raise ValueError(f"argument {arg!r}: must be empty or debug")
    config = base_config()
    if arg == "debug":
        config.steps = 2
        config.batch.prompts, config.batch.group_size = 2, 4
        config.sampler.slots, config.sampler.max_new_tokens = 8, 32
        config.eval.max_tasks = 8
    return config
