"""Templates of OpenAI's graders: `{{ item.FIELD }}` is the row, `{{ sample.output_text }}` what the model said."""

from __future__ import annotations

import json
import re
from typing import Any

from rftjax.types import Trajectory

Values = dict[str, Any]  # {"item": ..., "sample": ...}

_TEMPLATE = re.compile(r"\{\{\s*(.+?)\s*\}\}")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def values_of(trajectory: Trajectory) -> Values:
    """Returns what templates and the code of a grader read."""
    return {"item": item_of(trajectory), "sample": sample_of(trajectory)}


def item_of(trajectory: Trajectory) -> Values:
    """Returns the row: its fields, with `messages` (the prompt) and `id`."""
    task = trajectory.task
    return {"id": task.id, "messages": task.messages, **task.data}


def sample_of(trajectory: Trajectory) -> Values:
    """Returns what the model said in OpenAI's form."""
    said = [one for one in trajectory.messages if one.get("role") == "assistant"]
    last = said[-1] if said else {}
    try:
        parsed = json.loads(trajectory.answer)
    except ValueError:
        parsed = None
    return {
        "output_text": trajectory.answer,
        "output_json": parsed if isinstance(parsed, dict) else {},
        "output_tools": last.get("tool_calls") or [],
        "choices": [{"index": 0, "finish_reason": trajectory.finish_reason, "message": dict(last)}],
    }


def filled(template: str, values: Values) -> str:
    """Replaces the variables of a template; raises ValueError for a path that is not there."""

    def one(match: re.Match[str]) -> str:
        found: Any = values
        for name, index in _STEP.findall(match[1]):
            try:
                found = found[int(index)] if index else found[name]
            except (KeyError, IndexError, TypeError):
                there = ", ".join(map(str, found)) if isinstance(found, dict) else repr(found)
                raise ValueError(
                    f"the template's {match[0]} is not there: no {name or index!r} in {there:.200}"
                ) from None
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _TEMPLATE.sub(one, template)
