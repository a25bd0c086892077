"""`--mode=score`: an evaluator over recorded conversations, without a model, as a report and as files of `scores/`."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rftjax.compare import table
from rftjax.config.fields import assign, expand_value, flatten
from rftjax.monitor import reasons
from rftjax.monitor.rollouts import (
    by_draw,
    encode,
    is_valid,
    mean_by_name,
    reward_of,
    to_json,
    trajectory_record,
)
from rftjax.monitor.transcripts import short
from rftjax.run import judging, recorded
from rftjax.run.binding import stored_config
from rftjax.run.build import complete_config, load_tasks
from rftjax.scoring import Scorer
from rftjax.types import Task, Trajectory

BINS = 10
SHOWN = 3  # samples on which the rewards differ most


def score_config(
    given: ConfigDict, flags: Mapping[str, Any], workdir: Path, place: Path
) -> ConfigDict:
    """Returns the config: a run's own, where the workdir is one, with the flags on top, else the given one.

    A given one without tasks gets those of the run that `place` is of.
    """
    stored = stored_config(workdir)
    if stored is not None:
        with stored.unlocked():
            for field, value in flatten(flags).items():
                assign(stored, field, expand_value(field, value))
        given = stored
    elif not given.tasks.train:
        runs = (stored_config(folder) for folder in (place, *place.parents[:2]))
        if run := next(filter(None, runs), None):
            with given.unlocked():
                given.tasks, given.seed = run.tasks, run.seed
    return complete_config(given, needs=("evaluator",))


def score(config: ConfigDict, workdir: Path, place: Path) -> list[str]:
    """Scores the conversations of `place`; keeps them and a report in `scores/`, and returns the report's lines."""
    paths = recorded.files(place)
    trajectories = recorded.read(paths, _tasks(config, paths))
    before = [one.score for one in trajectories]
    with Scorer(config.evaluator, seed=config.seed, **config.scoring) as scorer:
        scorer.gather(trajectories)
        given = [score.reward if score else None for score in before]
        report = measure(trajectories, given)
        suspicions = list(
            judging.findings(
                scorer, trajectories, conversations=bool(config.environment or config.agent)
            )
        )
        form = scorer.form
    report |= {"evaluator": config.evaluator, "form": form, "suspicions": suspicions}
    path = _keep(workdir, place, trajectories, given, report)
    lines = [f"{len(trajectories)} samples in {len(by_draw(trajectories))} groups of {place}"]
    lines += [f"evaluator   {form}: {config.evaluator}", *_shown(report, trajectories, given)]
    lines += [f"WARNING     {text}" for text in suspicions]
    return [*lines, f"kept        {path}"]


def _tasks(config: ConfigDict, paths: Sequence[Path]) -> dict[str, Task]:
    """Returns the config's rows by id, for rollouts, which hold the ids alone."""
    first = next((record for path in paths[:1] for _, record, _ in recorded.records(path)), {})
    if not (isinstance(first, dict) and "sequences" in first and config.tasks.train):
        return {}
    train, heldout = load_tasks(config)
    return {task.id: task for found in (train, *heldout.values()) for task in found}


def measure(trajectories: Sequence[Trajectory], given: Sequence[float | None]) -> dict[str, Any]:
    """Returns what scores are like: distribution, spread in groups, time, faults, agreement with `given` rewards."""
    valid = [one for one in trajectories if is_valid(one)]
    rewards = np.asarray([reward_of(one) for one in valid])
    scores = [one.score for one in trajectories if one.score]
    report: dict[str, Any] = {
        "samples": len(trajectories),
        "groups": len(by_draw(trajectories)),
        "failures": len(trajectories) - len(valid),
        "reasons": reasons.commonest(one.reason for one in scores if not one.valid),
    }
    if len(valid):
        counts, edges = np.histogram(rewards, BINS if np.ptp(rewards) else 1)
        quantiles = np.quantile(rewards, [0, 0.25, 0.5, 0.75, 1])
        report["reward"] = {"mean": float(rewards.mean()), "std": float(rewards.std())} | dict(
            zip(("min", "q25", "median", "q75", "max"), map(float, quantiles), strict=True)
        )
        report["histogram"] = {"counts": counts.tolist(), "edges": edges.tolist()}
        groups = [[reward_of(one) for one in group] for group in by_draw(valid)]
        spreads = [float(np.std(group)) for group in groups if len(group) > 1]
        if spreads:
            report["spread"] = {
                "mean_std": float(np.mean(spreads)),
                "zero_variance_share": float(np.mean([one < judging.SAME for one in spreads])),
            }
        report["parts"] = mean_by_name("", [one.parts for one in scores if one.valid])
        report["metrics"] = mean_by_name("", [one.metrics for one in scores if one.valid])
        costs = {name: value * len(valid) for name, value in report["metrics"].items()}
        report["judge"] = {name: round(value) for name, value in costs.items() if "judge_" in name}
    times = np.asarray([one.seconds for one in scores if one.seconds])
    if len(times):
        p50, p95 = map(float, np.quantile(times, [0.5, 0.95]))
        report["seconds_a_call"] = {
            "mean": float(times.mean()),
            "median": p50,
            "p95": p95,
            "max": float(times.max()),
        }
    report["agreement"] = _agreement(trajectories, given)
    return report


def _agreement(trajectories: Sequence[Trajectory], given: Sequence[float | None]) -> dict[str, Any]:
    """Returns how the scores go with recorded rewards, {} where there are none.

    `order_share`: of the pairs within a group that both put in an order, the share that they put in the same one.
    """
    pairs = [
        (one.draw, before, reward_of(one))
        for one, before in zip(trajectories, given, strict=True)
        if before is not None and is_valid(one)
    ]
    if not pairs:
        return {}
    old, new = (np.asarray([pair[at] for pair in pairs]) for at in (1, 2))
    groups: dict[int, list[tuple[float, float]]] = collections.defaultdict(list)
    for draw, before, after in pairs:
        groups[draw].append((before, after))
    signs = [
        math.copysign(1, (one[0] - other[0]) * (one[1] - other[1]))
        for group in groups.values()
        for at, one in enumerate(group)
        for other in group[:at]
        if one[0] != other[0] and one[1] != other[1]
    ]
    found: dict[str, Any] = {
        "samples": len(pairs),
        "equal_share": float(np.mean(np.abs(old - new) <= judging.SAME)),
        "mean_difference": float(np.mean(new - old)),
    }
    if np.ptp(old) and np.ptp(new):
        found["correlation"] = float(np.corrcoef(old, new)[0, 1])
    if signs:
        found["order_share"] = float(np.mean([sign > 0 for sign in signs]))
    return found


def _keep(
    workdir: Path,
    place: Path,
    trajectories: Sequence[Trajectory],
    given: Sequence[float | None],
    report: Mapping[str, Any],
) -> Path:
    """Writes the rollouts with their new scores beside earlier ones; another score can be compared with them."""
    folder = workdir / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    name, count = place.name.split(".")[0] or "rollouts", 1
    while True:
        path = folder / (f"{name}-{count}.jsonl" if count > 1 else f"{name}.jsonl")
        try:
            with open(path, "xb") as file:
                for one, before in zip(trajectories, given, strict=True):
                    record = trajectory_record(0, one) | {"recorded_reward": before}
                    file.write(encode(to_json(record | {"data": one.task.data})))
            break
        except FileExistsError:
            count += 1
    stamped = {**report, "rollouts": str(place), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    path.with_suffix(".json").write_bytes(encode(to_json(stamped)))
    return path


def _shown(
    report: Mapping[str, Any], trajectories: Sequence[Trajectory], given: Sequence[float | None]
) -> Iterator[str]:
    def numbers(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in values.items())

    named = {
        "reward": "reward",
        "spread": "in groups",
        "parts": "parts",
        "metrics": "metrics",
        "judge": "judge's sum",
        "seconds_a_call": "s a call",
        "agreement": "recorded",
    }
    for key, name in named.items():
        if report.get(key):
            yield f"{name:11s} {numbers(report[key])}"
        if key == "reward" and "histogram" in report:
            yield from _bars(**report["histogram"])
    yield f"failures    {report['failures']} of {report['samples']}"
    yield from (f"            {line}" for line in report["reasons"])
    both = [
        (abs(reward_of(one) - before), one, before)
        for one, before in zip(trajectories, given, strict=True)
        if before is not None and is_valid(one)
    ]
    far = sorted(both, key=lambda one: -one[0])[:SHOWN]
    rows = [
        [one.task.id, f"{before:.3g}", f"{reward_of(one):.3g}", short(one.completion, 60)]
        for difference, one, before in far
        if difference > judging.SAME
    ]
    if rows:
        yield "where it differs most from what was recorded"
        yield table(["task", "recorded", "now", "answer"], rows)


def _bars(counts: Sequence[int], edges: Sequence[float]) -> Iterator[str]:
    most = max(counts)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        yield f"            {low:8.3g} to {high:8.3g} {'#' * round(40 * count / most)} {count}"
