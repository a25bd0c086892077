"""Trajectories of all processes: each scores what it sampled, and every one goes on with all of them."""

from __future__ import annotations

from rftjax.devices import processes
from rftjax.evaluators.forms.form import ALL
from rftjax.scoring import Scorer
from rftjax.types import Trajectory


def scored_by_all(scorer: Scorer, sampled: list[Trajectory]) -> list[Trajectory]:
    """Scores this process's trajectories; returns those of all processes by draw and sample.

    An evaluator that takes a whole batch is called by process 0, with the trajectories of all.
    """
    if processes.count() == 1:
        scorer.gather(sampled)
        return sampled
    if scorer.scope == ALL:
        scorer.forget(sampled)  # the evaluator gets copies
        everything = _in_order(processes.gather(sampled))
        with processes.together():
            if processes.first():
                scorer.gather(everything)
        return processes.agree(everything)
    with processes.together():
        scorer.gather(sampled)
    return _in_order(processes.gather(sampled))


def _in_order(shares: list[list[Trajectory]]) -> list[Trajectory]:
    return sorted(
        (one for share in shares for one in share), key=lambda one: (one.draw, one.sample)
    )
