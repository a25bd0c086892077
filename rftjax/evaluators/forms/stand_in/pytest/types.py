"""Names for annotations: what rollouts are made with, which are rftjax's own here."""

from rftjax.evaluators.forms.stand_in.models import CompletionParams, EvaluationRow
from rftjax.evaluators.forms.stand_in.pytest.default_single_turn_rollout_process import (
    RolloutProcessorConfig,
)

Dataset = list[EvaluationRow]
EvaluationTestMode = str

__all__ = ["CompletionParams", "Dataset", "EvaluationTestMode", "RolloutProcessorConfig"]
