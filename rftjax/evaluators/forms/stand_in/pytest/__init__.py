"""The decorator `evaluation_test`, and names that stand for ways of making rollouts, which are rftjax's own here."""

from rftjax.evaluators.forms.stand_in.pytest.default_single_turn_rollout_process import (
    AgentRolloutProcessor,
    ExceptionHandlerConfig,
    MCPGymRolloutProcessor,
    NoOpRolloutProcessor,
    RemoteRolloutProcessor,
    RolloutProcessor,
    RolloutProcessorConfig,
    SingleTurnRolloutProcessor,
)
from rftjax.evaluators.forms.stand_in.pytest.evaluation_test import (
    default_dataset_adapter,
    evaluation_test,
)

__all__ = [
    "AgentRolloutProcessor",
    "ExceptionHandlerConfig",
    "MCPGymRolloutProcessor",
    "NoOpRolloutProcessor",
    "RemoteRolloutProcessor",
    "RolloutProcessor",
    "RolloutProcessorConfig",
    "SingleTurnRolloutProcessor",
    "default_dataset_adapter",
    "evaluation_test",
]
