"""The rewards of Eval Protocol that need no library of their own; the others are the package's."""

from rftjax.evaluators.forms.stand_in.rewards import (
    format,
    function_calling,
    length,
    math,
    repetition,
    tag_count,
)
from rftjax.evaluators.forms.stand_in.rewards.function_calling import exact_tool_match_reward

__all__ = [
    "exact_tool_match_reward",
    "format",
    "function_calling",
    "length",
    "math",
    "repetition",
    "tag_count",
]
