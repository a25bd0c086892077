"""A reward for a length within bounds or near a target."""

from __future__ import annotations

import math
import re
from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluateResult
from rftjax.evaluators.forms.stand_in.rewards.said import nothing, result, text_of
from rftjax.evaluators.forms.stand_in.typed_interface import reward_function

DEFAULT_LENGTH = 100  # at which a text without bounds gets the least


@reward_function
def length_reward(
    messages: list[Any],
    *,
    ground_truth: Any = None,
    target_length: int | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    token_method: str = "whitespace",
    scaling: str = "linear",
    reward_range: list[float] | None = None,
    **_: Any,
) -> EvaluateResult:
    """Scores the number of words: the most within the bounds, less the further beyond them, linearly or by a cosine."""
    text = text_of(messages)
    if not text:
        return nothing("length")
    count = count_tokens(text, token_method)
    least, most = reward_range or [0.0, 1.0]
    cosine = scaling == "cosine"

    def falling(miss: float) -> float:  # near a target
        fall = (1.0 - math.cos(min(1.0, miss) * math.pi)) / 2.0 if cosine else min(1.0, miss)
        return most - (most - least) * fall

    def curve(share: float) -> float:  # beyond a bound
        return 1.0 - math.cos(share * math.pi / 2.0) if cosine else share

    if target_length is not None:
        miss = abs(count - target_length) / target_length if target_length > 0 else 1.0
        score, good = falling(miss), miss < 0.2
    elif min_length is not None and count < min_length:
        score, good = least + (most - least) * curve(count / min_length), False
    elif max_length is not None and count > max_length:
        span = max_length if min_length is None else max_length - min_length
        excess = min(1.0, (count - max_length) / (span if span > 0 else 1))
        score, good = most - (most - least) * curve(excess), False
    elif min_length is None and max_length is None:
        score, good = falling(count / DEFAULT_LENGTH), True
    else:
        score, good = most, True
    limit = target_length or max_length or min_length or DEFAULT_LENGTH
    return result(
        score,
        f"{count} tokens",
        length=(score, good),
        token_count=(min(1.0, count / limit), good),
    )


def count_tokens(text: str, method: str = "whitespace") -> int:
    """Counts words apart by white space, or by letters and digits ("words"), or characters ("character")."""
    if method == "character":
        return len(text)
    if method == "words":
        return len(re.findall(r"\b[\w\d]+\b", text))
    return len(re.split(r"\s+", text.strip()))
