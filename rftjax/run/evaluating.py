"""`--mode=eval`: a checkpoint of a run on held-out tasks, as a table, as JSON and as files of `evaluations/`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rftjax.compare import table
from rftjax.errors import UserError
from rftjax.monitor.rollouts import encode, to_json, trajectory_record
from rftjax.run import checkpoint
from rftjax.run.build import build
from rftjax.run.heldout import MAIN
from rftjax.run.results import choose_step
from rftjax.run.workdir import open_checkpoints
from rftjax.types import Trajectory


def check_run(workdir: Path) -> None:
    """Raises UserError, and creates nothing, where a workdir holds no checkpoint to evaluate."""
    if not checkpoint.exists(workdir / "checkpoints"):
        raise UserError(
            f"--workdir={workdir}: holds no checkpoint to evaluate; give the workdir of a run that has finished a step"
            " (--mode=check shows what the base model says)"
        )


def evaluate(config: ConfigDict, workdir: Path, wanted: str = "last") -> list[str]:
    """Evaluates a checkpoint on the held-out tasks and keeps the result; returns a table, and a line of JSON last.

    `wanted` is a step, "last" or "best".
    """
    with build(config, workdir) as parts:
        if not parts.heldout.sets:
            raise UserError(
                "tasks.heldout: no held-out tasks to evaluate; name some, set tasks.heldout_count or eval.sets"
            )
        checkpoints = open_checkpoints(parts, read_only=True)
        try:
            step = choose_step(checkpoints, wanted)
            state = parts.state_builder.state(checkpoints, step)
        finally:
            checkpoints.close()
        parts.sampler_weights.load(state)
        metrics, sampled = parts.heldout.evaluate()
    result = {"step": step, **metrics}
    path = keep(workdir, step, result, config, sampled)
    text = [f"step {step} of {workdir}", tabulate(metrics, list(sampled)), f"kept in {path}"]
    return [*text, json.dumps(result)]


def keep(
    workdir: Path,
    step: int,
    result: Mapping[str, Any],
    config: ConfigDict,
    sampled: Mapping[str, Sequence[Trajectory]],
) -> Path:
    """Writes an evaluation to `evaluations/`, beside earlier ones of the same step, and its samples next to it."""
    folder = workdir / "evaluations"
    folder.mkdir(exist_ok=True)
    settings = {
        "eval": config.eval.to_dict(),
        "evaluator": config.eval.evaluator or config.evaluator,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    count = 1
    while True:
        name = f"step_{step:06d}" + (f"-{count}" if count > 1 else "")
        path = folder / f"{name}.json"
        try:
            with open(path, "xb") as file:
                file.write(encode(to_json({**result, **settings})))
            break
        except FileExistsError:
            count += 1
    for stream, trajectories in sampled.items():
        lines = (encode(to_json(trajectory_record(step, one, stream))) for one in trajectories)
        with open(folder / f"{name}.{stream}.jsonl", "wb") as file:
            file.writelines(lines)
    return path


def tabulate(metrics: Mapping[str, float], sets: Sequence[str]) -> str:
    """Returns the metrics of held-out sets as a table: a row a metric, a column a set."""
    prefixes = {name: "eval/" if name == MAIN else f"eval/{name}/" for name in sets}
    others = tuple(prefix for name, prefix in prefixes.items() if name != MAIN)
    names: dict[str, dict[str, str]] = {}
    for name, prefix in prefixes.items():
        for metric, value in metrics.items():
            of_main = name == MAIN and metric.startswith(others)
            if metric.startswith(prefix) and not metric.endswith("_stderr") and not of_main:
                error = metrics.get(f"{metric}_stderr")
                shown = f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
                if metric == f"{prefix}tasks":
                    shown = f"{value:.0f}"
                names.setdefault(metric.removeprefix(prefix), {})[name] = shown
    rows = [[metric, *(cells.get(name, "-") for name in sets)] for metric, cells in names.items()]
    return table(["", *sets], rows)
