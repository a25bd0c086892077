"""The weighted sum of several evaluators, each recorded by its name."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from rftjax.evaluators.forms.form import ALL, GROUP, PASS, SAMPLE, SCOPES, Form, invalid, scores
from rftjax.types import Score, Trajectory
from rftjax.workers.named import Named
from rftjax.workers.serving import describe


def form(parts: Sequence[tuple[Named, Form]]) -> Form:
    """Returns the form whose reward is the sum of weight times reward; `Score.parts` has each reward by its name.

    The sample is invalid where one of them is; one that says None is left out of the sum, as in TRL.
    """
    scope = max((one.scope for _, one in parts), key=SCOPES.index)
    separable = all(one.separable or one.scope == SAMPLE for _, one in parts)

    async def rate(trajectories: Sequence[Trajectory]) -> list[Score]:
        found = await asyncio.gather(*(_rated(one, trajectories) for _, one in parts))
        names = [named for named, _ in parts]
        return [_sum(names, results) for results in zip(*found, strict=True)]

    def rate_later(trajectories: Sequence[Trajectory]) -> Any:
        # A coroutine that the worker runs to its end before the next call.
        return rate(trajectories)

    concurrent = any(one.concurrent for _, one in parts)
    kind = " + ".join(f"{named.weight:g} {named.name} ({one.kind})" for named, one in parts)
    return Form(kind, rate if concurrent else rate_later, scope, concurrent, separable)


async def _rated(one: Form, trajectories: Sequence[Trajectory]) -> list[Score | None]:
    """Returns a score a trajectory, None where the evaluator says None.

    A fault in a call with one sample is raised where no other sample is in the sum's call: the worker tells more of it.
    """
    found: list[Score | None] = [None] * len(trajectories)
    for places in _calls(one, trajectories):
        call = [trajectories[at] for at in places]
        try:
            results = await _called(one, call)
        except Exception as error:
            if len(trajectories) == 1:
                raise
            if len(call) > 1 and one.separable:
                results = [result for each in call for result in await _rated_apart(one, each)]
            else:
                results = [invalid(describe(error)[0]) for _ in call]
        for at, result in zip(places, results, strict=True):
            found[at] = result
    return found


async def _rated_apart(one: Form, trajectory: Trajectory) -> list[Score | None]:
    """Returns what an evaluator says of a sample of a call that failed, in a call of its own."""
    try:
        return await _called(one, [trajectory])
    except Exception as error:
        return [invalid(describe(error)[0])]


def _calls(one: Form, trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Returns the places of each call's trajectories: one, those of a draw, or all."""
    key = {
        SAMPLE: lambda at: at,
        GROUP: lambda at: trajectories[at].draw,
        ALL: lambda at: None,
    }[one.scope]
    calls: dict[Any, list[int]] = {}
    for at in range(len(trajectories)):
        calls.setdefault(key(at), []).append(at)
    return list(calls.values())


async def _called(one: Form, call: Sequence[Trajectory]) -> list[Score | None]:
    results = one.rate(call)
    results = await results if inspect.isawaitable(results) else results
    found = scores(results, len(call))
    return [None if result is PASS else score for result, score in zip(results, found, strict=True)]


def _sum(names: Sequence[Named], results: Sequence[Score | None]) -> Score:
    found = [(named, score) for named, score in zip(names, results, strict=True) if score]
    for named, score in found:
        if not score.valid:
            return invalid(f"{named.name}: {score.reason}")
    if not found:
        return invalid("every evaluator returned None: none scores this sample")
    metrics = {
        f"{named.name}/{name}": value
        for named, score in found
        for name, value in (score.parts | score.metrics).items()
    }
    reasons = [f"{named.name}: {score.reason}" for named, score in found if score.reason]
    return Score(
        sum(named.weight * score.reward for named, score in found),
        {named.name: score.reward for named, score in found},
        reason="; ".join(reasons),
        metrics=metrics,
    )
