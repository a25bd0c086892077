"""What every reward begins with: the text of the last message, and a result with one metric."""

from __future__ import annotations

from typing import Any

from rftjax.evaluators.forms.stand_in.models import (
    ChatCompletionContentPartTextParam,
    EvaluateResult,
    Message,
    MetricResult,
)


def text_of(messages: list[Any]) -> str | None:
    """Returns the text of the last message, None where it is not the assistant's or has none."""
    if not messages:
        return None
    last = Message.model_validate(messages[-1]) if isinstance(messages[-1], dict) else messages[-1]
    if last.role != "assistant" or last.content is None:
        return None
    if isinstance(last.content, str):
        return last.content
    return "\n".join(
        part.text for part in last.content if isinstance(part, ChatCompletionContentPartTextParam)
    )


def nothing(name: str, *, valid: bool = True) -> EvaluateResult:
    """Returns the result of a conversation without an answer."""
    reason = "No assistant response found"
    metrics = {name: MetricResult(score=0.0, is_score_valid=False, reason=reason)}
    return EvaluateResult(score=0.0, reason=reason, metrics=metrics, is_score_valid=valid)


def result(
    score: float, reason: str, *, valid: bool = True, **parts: tuple[float, bool]
) -> EvaluateResult:
    """Returns a result with metrics, each a score and whether it is valid."""
    metrics = {
        name: MetricResult(score=one, is_score_valid=sound, reason=reason)
        for name, (one, sound) in parts.items()
    }
    return EvaluateResult(score=score, reason=reason, metrics=metrics, is_score_valid=valid)
