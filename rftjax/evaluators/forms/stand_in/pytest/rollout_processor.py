"""The base of rollout processors, under the name of its module in the package."""

from rftjax.evaluators.forms.stand_in.pytest.default_single_turn_rollout_process import (
    RolloutProcessor,
)

__all__ = ["RolloutProcessor"]
