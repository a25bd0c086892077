"""The names of Eval Protocol that an evaluator's file imports, for where that package is not installed.

They hold what an evaluator reads and writes, and record the decorator's arguments; rollouts and tests by pytest are the
package's own. The records follow eval-protocol 0.3.33.
"""

from rftjax.evaluators.forms.stand_in.models import (
    EvaluateResult,
    EvaluationRow,
    InputMetadata,
    Message,
    MetricResult,
    Status,
    StepOutput,
)
from rftjax.evaluators.forms.stand_in.pytest import (
    RemoteRolloutProcessor,
    SingleTurnRolloutProcessor,
    evaluation_test,
)
from rftjax.evaluators.forms.stand_in.typed_interface import reward_function

__all__ = [
    "EvaluateResult",
    "EvaluationRow",
    "InputMetadata",
    "Message",
    "MetricResult",
    "RemoteRolloutProcessor",
    "SingleTurnRolloutProcessor",
    "Status",
    "StepOutput",
    "evaluation_test",
    "reward_function",
]
