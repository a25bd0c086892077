"""Runs in a worker process: calls the user's agent with an address of its own for every attempt.

Worker processes import this module: standard library and records only.
"""

from __future__ import annotations

import inspect
import math
import secrets
from collections.abc import Callable
from typing import Any

from rftjax.errors import UserError
from rftjax.types import Task
from rftjax.workers.plain import FLOAT32_MAX, checked, scalar
from rftjax.workers.user_code import load_function

MAX_RESULT_BYTES = 2**18  # of what an agent returns, as JSON
_WANTED = ("task", "base_url", "api_key", "model")
# The attempt; the reward, None where there is none; and other plain data.
Outcome = tuple[str, float | None, Any]


def agent_handler(name: str, field: str) -> Callable[..., Any]:
    """Loads an agent and wraps it as a function that returns an Outcome, a coroutine function if the agent is.

    The pool may call an agent once more after another's fault: each call has another `attempt` in its address, so that
    what an attempt said stays its own. A parameter `seed` gets that of the group.
    """
    target = load_function(name, field=field)
    takes_seed = _check_signature(target)

    def arguments(
        task: Task, url: str, key: str, api_key: str, model: str, seed: int
    ) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        attempt = secrets.token_hex(8)
        base_url = f"{url}/rollouts/{key}.{attempt}/v1"
        return attempt, (task, base_url, api_key, model), {"seed": seed} if takes_seed else {}

    async def run_async(*given: Any) -> Outcome:
        attempt, positional, named = arguments(*given)
        return _outcome(attempt, await target(*positional, **named))

    def run(*given: Any) -> Any:
        attempt, positional, named = arguments(*given)
        value = target(*positional, **named)
        return _later(attempt, value) if inspect.isawaitable(value) else _outcome(attempt, value)

    called = (target, type(target).__call__)
    return run_async if any(map(inspect.iscoroutinefunction, called)) else run


def _check_signature(target: Callable[..., Any]) -> bool:
    """Returns whether an agent takes a `seed`; raises UserError where it cannot be called."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # there is none to be had
        return False
    takes_seed = "seed" in signature.parameters
    try:
        signature.bind(*_WANTED, **{"seed": 0} if takes_seed else {})
    except TypeError as error:
        wanted = ", ".join(_WANTED)
        raise UserError(f"agent: must be callable as run({wanted}), but {error}") from None
    return takes_seed


async def _later(attempt: str, value: Any) -> Outcome:
    return _outcome(attempt, await value)


def _outcome(attempt: str, value: Any) -> Outcome:
    number = scalar(value)
    if not isinstance(number, (bool, int, float)):
        return attempt, None, checked(value, "what the agent returns", MAX_RESULT_BYTES)
    if not math.isfinite(number) or abs(number) > FLOAT32_MAX:
        raise UserError(f"agent: the reward that it returns must be finite, not {number}")
    return attempt, float(number), None
