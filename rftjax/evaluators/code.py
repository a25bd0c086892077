"""Reward 1.0 for Python code that passes all tests of its row, run in a sandbox (`rftjax.sandbox`, Linux)."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from rftjax import sandbox
from rftjax.types import Score, Task, Trajectory

BLOCK = re.compile(r"^```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Runs the answer and then each test in one namespace; a secret word, which the answer is not given, tells what passed.
DRIVER = """
import json, sys
word, answer, tests = json.loads(sys.stdin.readline())
space = {"__name__": "__main__"}
exec(compile(answer, "answer.py", "exec"), space)
for number, test in enumerate(tests):
    try:
        exec(compile(test, f"test_{number}.py", "exec"), space)
    except Exception as error:
        print(f"test {number}: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        print(f"\\n{word} {number}", flush=True)
"""

sandbox.require("evaluator='rftjax.evaluators.code:evaluate'")


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    """Runs the fenced blocks of the completion (all of it where there is none) against the row's `tests`.

    A test is Python source that raises where the answer is wrong (`assert add(1, 2) == 3`), run in a process after all
    blocks, since a second one often shows the function at work. Or it is `{"input": text, "output": text}`: the last
    block is run as a program and has to print that output, but for blanks at the ends of lines and of the text. The
    row's `limits` may hold fields of `sandbox.Limits`. The reward and the part `tests` are 1.0 if all tests pass, the
    metric `passed` is the share of them; the part `format` is 1.0 for a fenced block.
    """
    tests, limits = _tests(task), _limits(task)
    blocks = BLOCK.findall(trajectory.answer)
    answers = blocks or [trajectory.answer]
    sources = [test for test in tests if isinstance(test, str)]
    passed, reasons = _run_sources("\n".join(answers), sources, limits) if sources else (0, [])
    for test in tests:
        if not isinstance(test, str):
            result = sandbox.run_python(answers[-1], stdin=test["input"], limits=limits)
            right = result.passed and _lines(result.output) == _lines(test["output"])
            passed += right
            if not right:
                reasons.append(_why(result) or "another output than expected")
    share = passed / len(tests)
    parts = {"tests": float(passed == len(tests)), "format": float(bool(blocks))}
    reason = reasons[0] if reasons else ""
    return Score(parts["tests"], parts, reason=reason, metrics={"passed": share})


def _run_sources(answer: str, tests: list[str], limits: sandbox.Limits) -> tuple[int, list[str]]:
    """Returns how many tests passed, and why the others did not."""
    word = secrets.token_hex(16)
    result = sandbox.run_python(DRIVER, stdin=json.dumps([word, answer, tests]), limits=limits)
    told = set(result.output.split("\n"))
    passed = sum(f"{word} {number}" in told for number in range(len(tests)))
    if passed == len(tests):
        return passed, []
    return passed, [_why(result) or result.errors.strip()[-300:] or "the answer ended the process"]


def _why(result: sandbox.Result) -> str:
    """Returns what ended the program before its end, "" where nothing did."""
    if result.reason != "exit":
        return f"stopped at the limit of {result.reason}"
    if result.status != 0:
        return f"ended with status {result.status}: {result.errors.strip()[-300:]}"
    return ""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _tests(task: Task) -> list[Any]:
    """Returns the row's tests; raises ValueError where one has another form."""
    tests = task.data.get("tests")
    tests = [tests] if isinstance(tests, str | dict) else tests
    rule = 'it must be a list of Python sources or of {"input": text, "output": text}'
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"task {task.id!r}: field 'tests' is {tests!r}; {rule}")
    for test in tests:
        pair = isinstance(test, dict) and all(
            isinstance(test.get(name), str) for name in ("input", "output")
        )
        if not pair and not isinstance(test, str):
            raise ValueError(f"task {task.id!r}: field 'tests' holds {test!r}; {rule}")
    return tests


def _limits(task: Task) -> sandbox.Limits:
    given = task.data.get("limits") or {}
    try:
        return sandbox.Limits(**given)
    except TypeError as error:
        names = ", ".join(sandbox.Limits.__dataclass_fields__)
        raise ValueError(
            f"task {task.id!r}: field 'limits' is {given!r}; it may hold {names} ({error})"
        ) from error
