"""Runs in a worker process: loads the evaluators of a field, finds out their form, and returns what scores samples."""

from __future__ import annotations

import inspect
import json
import os
import random
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from rftjax.errors import UserError
from rftjax.evaluators.forms import (
    eval_protocol,
    native,
    openai_grader,
    trl,
    verifiers,
    verl,
    weighted,
)
from rftjax.evaluators.forms.form import Form, scores
from rftjax.types import Score, Trajectory
from rftjax.workers import named
from rftjax.workers.user_code import load_object


def evaluation(evaluator: str, field: str) -> Callable[..., Any]:
    """Returns a function of (seed, trajectories) that gives a list of checked Scores; its `about` is JSON."""
    form = load(evaluator, field)

    async def evaluate_async(seed: int, trajectories: list[Trajectory]) -> list[Score]:
        return await _timed(form.rate(trajectories), len(trajectories), time.perf_counter())

    def evaluate_sync(seed: int, trajectories: list[Trajectory]) -> Any:
        first = trajectories[0]
        _seed_generators(f"{seed} {first.task.id} {first.draw} {first.sample}")
        began = time.perf_counter()
        results = form.rate(trajectories)
        if inspect.isawaitable(results):
            return _timed(results, len(trajectories), began)
        return _stamped(scores(results, len(trajectories)), began)

    handler: Any = evaluate_async if form.concurrent else evaluate_sync
    handler.about = json.dumps(
        {"kind": form.kind, "scope": form.scope, "separable": form.separable}
    )
    return handler


def load(evaluator: str, field: str = "evaluator") -> Form:
    """Returns the form of what a field names; raises UserError where it cannot be loaded or is of no known form."""
    found = [(one, _load_one(one.source, field)) for one in named.parse(evaluator, field)]
    return weighted.form(found) if named.is_sum(evaluator) else found[0][1]


def _load_one(source: str, field: str) -> Form:
    if source.endswith(named.GRADER):
        return form_of(_read_grader(source, field), source)
    if source.startswith(named.GYM):
        source = "rftjax.evaluators.reasoning_gym:evaluate"
    return form_of(load_object(source, field=field), source)


def form_of(found: Any, source: str = "") -> Form:
    """Finds out an evaluator's form by looking at the object."""
    if isinstance(found, dict):
        return openai_grader.form(found)
    if (rubric := verifiers.rubric_of(found)) is not None:
        return verifiers.form(rubric)
    if inspect.isclass(found):
        found = _made(found)
    if not callable(found):
        raise UserError(
            f"evaluator={source!r}: is of type {type(found).__name__}, which is no evaluator; name a function "
            "evaluate(task, trajectory), or another form of docs/evaluators.md"
        )
    if eval_protocol.matches(found):
        return eval_protocol.form(found)
    if trl.matches(found):
        return trl.form(found)
    if verl.matches(found):
        return verl.form(found)
    return native.group(found) if native.is_group(found) else native.single(found)


def _read_grader(path: str, field: str) -> dict[str, Any]:
    path = os.path.abspath(os.path.expanduser(path))
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}={path!r}: must be a JSON file with a grader, and cannot be read ({error}); correct it"
        ) from None
    # A file of a fine-tuning job keeps the grader under its method.
    for key in ("method", "reinforcement", "grader"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return found if isinstance(found, dict) else {}


def _made(evaluator: type) -> Any:
    """A class with `__call__` is instantiated once, without arguments."""
    if "__call__" not in dir(evaluator) or not any(
        "__call__" in vars(one) for one in evaluator.__mro__
    ):
        raise UserError(
            f"evaluator: {evaluator.__name__} is a class whose objects cannot be called; "
            "give it __call__(self, task, trajectory), or name a function"
        )
    try:
        inspect.signature(evaluator).bind()
    except TypeError as error:
        raise UserError(
            f"evaluator: the class {evaluator.__name__} is made without arguments, but {error}; "
            "give them defaults, or name an object of the class"
        ) from None
    return evaluator()


async def _timed(results: Any, count: int, began: float) -> list[Score]:
    return _stamped(scores(await results, count), began)


def _stamped(found: list[Score], began: float) -> list[Score]:
    """Writes the time of the call into its scores."""
    for score in found:
        score.seconds = time.perf_counter() - began
    return found


def _seed_generators(text: str) -> None:
    random.seed(text)
    numpy = sys.modules.get("numpy")  # not imported for this: a worker starts quickly
    if numpy is not None:
        numpy.random.seed(zlib.crc32(text.encode()))
