"""A reward for each of the tags that a text has."""

from __future__ import annotations

import re
from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluateResult
from rftjax.evaluators.forms.stand_in.rewards.said import nothing, result, text_of
from rftjax.evaluators.forms.stand_in.typed_interface import reward_function


@reward_function
def tag_count_reward(
    messages: list[Any],
    *,
    required_tags: list[str],
    score_per_tag: float = 0.25,
    require_balanced: bool = True,
    **_: Any,
) -> EvaluateResult:
    """Scores `score_per_tag` a tag, at most 1.0; takes it off again for each tag without its counterpart."""
    text = text_of(messages)
    if text is None:
        return nothing("tag_count")
    parts: dict[str, tuple[float, bool]] = {}
    uneven = 0
    for tag in required_tags:
        opened = len(re.findall(f"<{tag}[^>]*>", text))
        closed = len(re.findall(f"</{tag}>", text))
        found = opened == closed > 0 if require_balanced else opened + closed > 0
        uneven += require_balanced and opened != closed
        parts[f"tag_{tag}"] = (float(found), found)
    count = sum(found for tag, (_, found) in parts.items())
    score = max(0.0, min(1.0, count * score_per_tag) - uneven * score_per_tag)
    whole = count == len(set(required_tags)) and not uneven
    parts["overall"] = (score, whole)
    return result(score, f"{count} of {len(required_tags)} tags", valid=whole, **parts)
