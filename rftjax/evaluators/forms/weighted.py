"""The weighted sum of several evaluators, each recorded by its name."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from rftjax.evaluators.forms.form import PASS, SAMPLE, SCOPES, Form, invalid, scores
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
        return rate(
            trajectories
        )  # a coroutine that the worker runs to its end before the next call

    concurrent = any(one.concurrent for _, one in parts)
    kind = " + ".join(f"{named.weight:g} {named.name} ({one.kind})" for named, one in parts)
    return Form(kind, rate if concurrent else rate_later, scope, concurrent, separable)


async def _rated(one: Form, trajectories: Sequence[Trajectory]) -> list[Score | None]:
    """Returns a score a trajectory, None where the evaluator says None.

    A fault in a call with one sample is raised where no other sample is in the sum's call: the worker tells more of it.
    """
    alone = [[each] for each in trajectories]
    for calls in [alone] if one.scope == SAMPLE else [[trajectories], alone]:
        found: list[Score | None] = []
        for call in calls:
            try:
                found += await _called(one, call)
            except Exception as error:
                if len(trajectories) == 1:
                    raise
                if calls is not alone and one.separable:
                    break
                found += [invalid(describe(error)[0]) for _ in call]
        else:
            return found
    raise AssertionError("the calls of single samples end in scores")


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
