"""Writes tests/data/eval_protocol/scores.json: what the files beside it score under the real package.

Run it in an environment that has `eval-protocol` (0.3.33 made the committed file) and this project on its path; nothing
else of the project's requirements is needed:

    PYTHONPATH=. python scripts/reference/make_eval_protocol.py
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
from pathlib import Path

from rftjax.evaluators.forms.form import SAMPLE, scores
from rftjax.evaluators.forms.load import load
from rftjax.types import Task, Trajectory

FOLDER = Path(__file__).parents[2] / "tests" / "data" / "eval_protocol"
TESTS = (
    "pointwise.py:test_sums",
    "pointwise.py:test_words",
    "groups.py:test_shortest",
    "groups.py:test_against_the_mean",
    "rewards.py:test_rewards",
)
CALL = '{"name": "add", "arguments": {"b": 2, "a": 1}}'
ANSWERS = (
    "The answer is 12.",
    "<answer>12</answer>",
    "<answer> 13 </answer> or so",
    "<think>\nfive and seven\n</think>\n<answer>\n12\n</answer>",
    "<think>no end <answer>12</answer><answer>13",
    "one two three",
    "one two one two one two one two one two",
    "I refuse to say.",
    f"<tool_call>{CALL}</tool_call>",
    "",
    "A good deal longer than all of the other answers, with many words and with many words and so on.",
)


def trajectories() -> list[Trajectory]:
    """The answers as the samples of one draw."""
    data = {"question": "5 + 7 =", "truth": "12"}
    task = Task("sum-1", [{"role": "user", "content": "5 + 7 = Answer in <answer> tags."}], data)
    return [
        Trajectory(task, 0, at, [*task.messages, {"role": "assistant", "content": text}])
        for at, text in enumerate(ANSWERS)
    ]


def measured(test: str) -> list[dict]:
    """What one evaluator says of every answer."""
    form = load(f"{FOLDER}/{test}")

    async def rated(call: list[Trajectory]) -> list:
        results = form.rate(call)
        return scores(await results if inspect.isawaitable(results) else results, len(call))

    calls = [[one] for one in trajectories()] if form.scope == SAMPLE else [trajectories()]
    found = [score for call in calls for score in asyncio.run(rated(call))]
    return [
        {"reward": one.reward, "valid": one.valid, "parts": one.parts, "metrics": one.metrics}
        for one in found
    ]


def main() -> None:
    """Writes the file."""
    package = importlib.metadata.version("eval-protocol")
    result = {
        "package": f"eval-protocol {package}",
        "scores": {one: measured(one) for one in TESTS},
    }
    (FOLDER / "scores.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
