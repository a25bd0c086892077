"""Reward 1.0 for a mathematically equal answer, by the package math-verify, an optional extra of this project."""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from typing import Any

from rftjax.types import Score, Task, Trajectory

LIMIT_S = 2  # for parsing one text and for one comparison; a timeout counts as not equal


def evaluate(task: Task, trajectory: Trajectory) -> Score:
    r"""Compares expressions, sets, intervals, equations and numbers with the row's `answer`.

    The answer is LaTeX or plain text, or marks its last part by "####" or "\boxed{...}". A completion's answer is its
    last "\boxed{...}", else its last formula or number. The part `format` is 1.0 where one was found.
    """
    gold = _gold(str(task.data.get("answer", "")))
    if not gold:
        raise ValueError(
            f"task {task.id!r}: field 'answer' is {task.data.get('answer')!r}; it must be a mathematical expression"
        )
    got = _parsed(trajectory.answer)
    equal = bool(got) and _package().verify(list(gold), got, timeout_seconds=_limit_s())
    reason = "" if got else "no mathematical expression found"
    return Score(float(equal), {"format": float(bool(got))}, reason=reason)


@functools.lru_cache(4096)
def _gold(answer: str) -> tuple[Any, ...]:
    text = answer.rpartition("####")[2].strip()
    if not any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")):
        text = f"${text}$"
    return tuple(_parsed(text)) if text != "$$" else ()


def _parsed(text: str) -> list[Any]:
    return _package().parse(text, parsing_timeout=_limit_s())


def _limit_s() -> int | None:
    """Seconds of math-verify's own limit, a signal that only the main thread gets; else the worker's limit holds."""
    return LIMIT_S if threading.current_thread() is threading.main_thread() else None


@functools.cache
def _package() -> Any:
    try:
        package = importlib.import_module("math_verify")
    except ImportError as error:
        raise ValueError(
            "evaluator='rftjax.evaluators.math:evaluate' needs the package math-verify: "
            f"pip install 'rftjax[math]' ({error})"
        ) from error
    # It logs a line for every answer it cannot parse.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return package
