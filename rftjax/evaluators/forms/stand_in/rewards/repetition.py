"""A reward that repeated word groups lower."""

from __future__ import annotations

from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluateResult
from rftjax.evaluators.forms.stand_in.rewards.said import nothing, result, text_of
from rftjax.evaluators.forms.stand_in.typed_interface import reward_function


@reward_function
def repetition_penalty_reward(
    messages: list[Any],
    ground_truth: Any = None,
    ngram_size: int = 3,
    max_penalty: float = 0.5,
    language: str = "en",
    **_: Any,
) -> EvaluateResult:
    """Scores 1.0 less `max_penalty` times the share of repeated n-grams of lower-case words."""
    text = text_of(messages)
    if text is None:
        return nothing("repetition")
    words = list(text) if language == "zh" else text.lower().split()
    ngrams = list(zip(*(words[start:] for start in range(ngram_size)), strict=False))
    if not ngrams:
        return result(1.0, "too short for a repetition", repetition=(1.0, True))
    repeated = 1.0 - len(set(ngrams)) / len(ngrams)
    score = max(0.0, 1.0 - repeated * max_penalty)
    few = repeated < 0.2
    return result(
        score,
        f"repetition {repeated:.2f}",
        valid=score > 0.0,
        repetition=(score, few),
        unique_ngram_ratio=(1.0 - repeated, few),
        repetition_penalty=(1.0 - repeated * max_penalty, few),
    )
