"""A reward for exactly the tool calls that are wanted."""

from __future__ import annotations

import json
import re
from typing import Any

from rftjax.evaluators.forms.stand_in.models import EvaluateResult, Message
from rftjax.evaluators.forms.stand_in.rewards.said import result
from rftjax.evaluators.forms.stand_in.typed_interface import reward_function


@reward_function
def exact_tool_match_reward(
    messages: list[Any], ground_truth: Any = None, **_: Any
) -> EvaluateResult:
    """Scores 1.0 where the last message makes the calls of `ground_truth["tool_calls"]`, in their order.

    A message's calls stand in `tool_calls`, else in <tool_call> tags of its text. Without a ground truth no call is
    wanted.
    """
    if not messages:
        return result(0.0, "No messages provided for evaluation.")
    last = messages[-1]
    last = Message.model_validate(last) if isinstance(last, dict) else last
    if isinstance(ground_truth, str):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError:
            return result(0.0, "the ground truth is not JSON")
    if ground_truth is not None and not isinstance(ground_truth, dict):
        return result(0.0, "the ground truth is not an object")
    made = _simple([one.model_dump() for one in last.tool_calls or []]) or _written(last.content)
    wanted = _simple((ground_truth or {}).get("tool_calls") or [])
    equal = json.dumps(made, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    return result(float(equal), f"{len(made)} calls, {len(wanted)} wanted")


def _simple(calls: list[Any]) -> list[dict[str, Any]]:
    """Returns the functions of calls in OpenAI's form, arguments parsed where they are JSON."""
    functions = [one.get("function") for one in calls if isinstance(one, dict)]
    return [
        {**one, "arguments": _parsed(one["arguments"])}
        for one in functions
        if isinstance(one, dict) and "arguments" in one
    ]


def _written(content: Any) -> list[dict[str, Any]]:
    found = re.findall(r"<tool_call>(.*?)</tool_call>", content or "", re.DOTALL)
    calls = [one for one in map(_parsed, map(str.strip, found)) if isinstance(one, dict)]
    return _simple(
        [
            one
            if "function" in one and "type" in one
            else {"function": {"name": one["name"], "arguments": one["arguments"]}}
            for one in calls
            if ("function" in one and "type" in one) or {"name", "arguments"} <= one.keys()
        ]
    )


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except ValueError:
        return value
