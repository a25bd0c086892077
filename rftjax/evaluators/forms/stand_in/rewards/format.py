"""A reward for a text that matches a pattern."""

from __future__ import annotations

import re
from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluateResult
from rftjax.evaluators.forms.stand_in.rewards.said import nothing, result, text_of
from rftjax.evaluators.forms.stand_in.typed_interface import reward_function

THINK_ANSWER = r"^<think>\n.*?</think>\n<answer>\n.*?</answer>$"


@reward_function
def format_reward(
    messages: list[Any],
    ground_truth: Any = None,
    format_regex: str = THINK_ANSWER,
    require_exact_match: bool = True,
    **_: Any,
) -> EvaluateResult:
    """Scores 1.0 for a match from the start (anywhere without `require_exact_match`); a miss is not valid."""
    text = text_of(messages)
    if not text:
        return nothing("format_check", valid=False)
    pattern = re.compile(format_regex, re.DOTALL)
    match = pattern.match(text) if require_exact_match else pattern.search(text)
    score, found = float(bool(match)), bool(match)
    reason = "Format is correct" if found else "Format is incorrect"
    return result(score, reason, valid=found, format_check=(score, found))
