"""The random-reward control: the quickstart trained on coin tosses, while its held-out answers are scored as ever.

A fair coin knows nothing of the answers, so the held-out reward must stay where it began, within its standard errors.
A gain would mean that something else than the reward teaches: an evaluation that sees training data, a biased
estimate, or format alone being rewarded. `:debug` is the same job in a few seconds.
"""

import quickstart
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Returns the spec; `arg` is empty or "debug"."""
    config = quickstart.get_config(arg)
    config.eval.evaluator = config.evaluator
    config.evaluator = "rftjax.evaluators.random_reward:evaluate"
    config.export = False  # the trained model is of no use
    return config
