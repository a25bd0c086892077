"""Writes tests/data/eval_protocol/scores.json: what the files beside it score under the real package.

Run it in an environment that has `eval-protocol` (0.3.33 made the committed file) and this project on its path; nothing
else of the project's requirements is needed:

    PYTHONPATH=. python scripts/reference/make_eval_protocol.py
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import inspect
import json
import random
import re
from pathlib import Path

from rftjax.evaluators.forms.form import SAMPLE, scores
from rftjax.evaluators.forms.load import load
from rftjax.types import Task, Trajectory
from rftjax.workers import stand_ins

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


# What answers to sums are made of, for the reward that reads numbers in many forms.
PIECES = (
    *("12", "-3", "3.5", "1,234", "1/2", "3 / 4", "12 apples", "5x", "2 y", "7%", "1e5", "2.5E-3"),
    *("$4$", "$$\\frac{1}{2}$$", "$3 \\times 10^{4}$", "$5n + 3$", "$\\boxed{4}$", "12.0001"),
    *("\\boxed{12}", "\\boxed{\\frac{1}{2}}", "\\boxed{B}", "\\boxed{3 or 4}", "\\boxed{12 cm}"),
    *("#### 12", "#### 1,234.5", "#### 12345", "<answer>12</answer>", "<answer>$12$</answer>"),
    *(
        "<answer>\\frac{1}{2}</answer>",
        "<answer>12 km</answer>",
        "<ANS> 1/2 </ANS>",
        " or ",
        "x = ",
    ),
    *(
        "so it is ",
        "0",
        "12.0",
        "12.01",
        "item_5",
        "1.2.3",
        "2024-01-02",
        "4 a b",
        "1 / 0",
        "12,34",
    ),
)
SUMS = 400


def sums() -> list[tuple[str, str, dict]]:
    """Answers with their truths and the reward's settings, the same ones each time."""
    drawn = random.Random(0)

    def text() -> str:
        found = (drawn.choice(PIECES) + drawn.choice(("", " ", " and ", "\n")) for _ in range(4))
        return "".join(list(found)[: drawn.randint(1, 4)])

    settings = ({}, {}, {"require_units": True}, {"tolerance": 0.1})
    truths = ("12", "#### 12", "\\boxed{12}", "0.5")
    return [
        (text(), drawn.choice((text(), drawn.choice(PIECES), *truths)), drawn.choice(settings))
        for _ in range(SUMS)
    ]


def sum_scores() -> list[float]:
    """What the reward for mathematics says of each."""
    stand_ins.offer()
    reward = importlib.import_module("eval_protocol.rewards.math").math_reward
    return [
        reward([{"role": "assistant", "content": text}], ground_truth=truth, **settings).score
        for text, truth, settings in sums()
    ]


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
        "sums": sum_scores(),
    }
    text = re.sub(r"\n {3,}|\n {2}(?=[\]}])", " ", json.dumps(result, indent=1))
    (FOLDER / "scores.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
