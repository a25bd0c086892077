"""Compares runs: python -m rftjax.compare RUN [RUN ...] prints what differs, what was learned and what was said.

Reads the files of workdirs alone, so it works beside a run and without a device.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rftjax.config.fields import base_config, flatten
from rftjax.errors import UserError
from rftjax.monitor import transcripts

SHOWN_ANSWERS = 5
WINDOW = 5  # steps of a mean
TRAINING = (
    "reward/mean",
    "entropy",
    "rollout/completion_tokens_mean",
    "rollout/truncated_share",
    "groups/zero_variance_share",
    "time/step_s",
)
# Inputs that a resume may change and that held-out rewards depend on.
MEASURES = ("evaluator", "environment", "tasks.heldout", "eval.evaluator", "eval.sets")


@dataclasses.dataclass
class Run:
    """The files of a workdir."""

    path: Path

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The config by dotted path, {} where none is stored; fields newer than the run have their defaults."""
        path = self.path / "config.json"
        if not path.exists():
            return {}
        return flatten(base_config()) | flatten(json.loads(path.read_text()))

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The metrics of every step."""
        found = []
        for text in (self.path / "metrics.jsonl").read_text().splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:  # the last line of a run that was killed, or that is being written
                continue
        return found

    def rewards(self, stream: str, step: int) -> dict[str, float]:
        """Returns the mean valid reward of each task at a step, {} where its rollouts are gone."""
        path = transcripts.files(self.path, stream).get(step)
        found: dict[str, list[float]] = {}
        for record in transcripts.read(path) if path else []:
            if record["valid"]:
                found.setdefault(record["task_id"], []).append(record["reward"])
        return {task: math.fsum(values) / len(values) for task, values in found.items()}

    def remeasured(self) -> str:
        """Says which inputs of the evaluation a resume changed, so that earlier rewards are of another measure."""
        own = bool(self.fields.get("eval.evaluator"))  # then the evaluator scores training only
        marks = {f"changed/{field}": field for field in MEASURES[own:]}
        found = [
            f"{marks[name]} (step {line['step']})"
            for line in self.lines
            for name in line
            if name in marks
        ]
        return f"earlier rewards are not comparable: changed {', '.join(found)}" if found else ""

    def streams(self) -> list[str]:
        """Returns the names of the held-out sets that were evaluated, the main one first."""
        names = [name for line in self.lines for name in line]
        sets = {name.split("/")[1] for name in names if name.startswith("eval/")}
        sets -= {"part", "metric"}  # what evaluators name, "reward" among others, is no set
        further = {one for one in sets if any(name == f"eval/{one}/reward" for name in names)}
        main = any(name == "eval/reward" for name in names)
        return ["heldout"] * main + sorted(further)


def main(arguments: Sequence[str]) -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rftjax compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a run")
    parser.add_argument("--stream", default="", help="train, heldout or the name of a held-out set")
    parser.add_argument(
        "--task", default="", help="the task whose answers are shown over the steps"
    )
    given = parser.parse_args(arguments)
    try:
        runs = [_open(path) for path in given.runs]
        for text in compare(runs, given.stream, given.task):
            print(text)
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(runs: Sequence[Run], stream: str = "", task: str = "") -> Iterator[str]:
    """Yields the comparison's parts as text.

    `stream` is whose answers are shown: held-out ones where there are any. `task` is the task whose answers are shown
    over the steps: by default the one whose reward changed most.
    """
    names = [f"{chr(65 + index % 26)}{index // 26 or ''}" for index in range(len(runs))]
    for name, run in zip(names, runs, strict=True):
        steps = run.lines[-1]["step"] if run.lines else 0
        yield f"{name}  {run.path}  ({steps} of {run.fields.get('steps', '?')} steps)"
    if runs[1:]:
        yield from _differing_fields(names, runs)
    yield from _gains(names, runs)
    yield from _training(names, runs)
    for name, run in zip(names, runs, strict=True):
        chosen = stream or next(iter(run.streams()), "train")
        yield from _answers(name, run, chosen, task)


def _open(path: str) -> Run:
    run = Run(Path(path).expanduser())
    if not (run.path / "metrics.jsonl").is_file():
        raise UserError(
            f"{path}: is no workdir of a run, for it has no file metrics.jsonl;"
            " give a --workdir that a run was started with"
        )
    return run


def _differing_fields(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    fields = sorted(set().union(*(run.fields for run in runs)))
    rows = [
        [field, *(repr(run.fields.get(field, "-")) for run in runs)]
        for field in fields
        if len({repr(run.fields.get(field, "-")) for run in runs}) > 1
    ]
    yield "\nfields that differ"
    yield table(["field", *names], rows) if rows else "  none"


def gain(run: Run, stream: str) -> list[str]:
    """Returns reward before, after and the gain, each with its standard error, and the tasks of the last.

    The gain's error is that of the mean of the tasks' own gains where the rollouts of both evaluations are there
    (paired), else the root of the sum of both squared errors.
    """
    prefix = "eval/" if stream == "heldout" else f"eval/{stream}/"
    evaluated = [line for line in run.lines if line.get(f"{prefix}reward") is not None]
    if not evaluated:
        return ["-"] * 5
    first, last = evaluated[0], evaluated[-1]
    cells = [
        f"{line[f'{prefix}reward']:.3f} ± {line.get(f'{prefix}reward_stderr') or 0.0:.3f} (step {line['step']})"
        for line in (first, last)
    ]
    before, after = (run.rewards(stream, line["step"]) for line in (first, last))
    value = last[f"{prefix}reward"] - first[f"{prefix}reward"]
    if first is last:
        return [*cells, "-", "", f"{last[f'{prefix}tasks']:.0f}"]
    paired = before and set(before) == set(after)
    if paired:
        _, error = mean_and_error([after[task] - before[task] for task in before])
    else:
        errors = [line.get(f"{prefix}reward_stderr") or 0.0 for line in (first, last)]
        error = math.hypot(*errors)
    kind = "paired" if paired else "unpaired"
    return [*cells, f"{value:+.3f} ± {error:.3f}", kind, f"{last[f'{prefix}tasks']:.0f}"]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of values and its standard error, 0 for one value."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def _gains(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    streams = dict.fromkeys(stream for run in runs for stream in run.streams())
    if not streams:
        yield "\nno held-out evaluations"
    for stream in streams:
        rows = [[name, *gain(run, stream)] for name, run in zip(names, runs, strict=True)]
        yield f"\nheld-out reward, set {stream} (± standard error)"
        yield table(["run", "before", "after", "gain", "error", "tasks"], rows)
        yield from _against_first(names, runs, stream)
    for name, run in zip(names, runs, strict=True):
        if note := run.remeasured():
            yield f"  {name}: {note}"


def _against_first(names: Sequence[str], runs: Sequence[Run], stream: str) -> Iterator[str]:
    """Yields how the last evaluations of further runs differ from the first run's on the tasks of both."""
    last = [run.rewards(stream, max(transcripts.files(run.path, stream), default=0)) for run in runs]  # fmt: skip
    for name, rewards in zip(names[1:], last[1:], strict=True):
        both = [task for task in last[0] if task in rewards]
        if both:
            mean, error = mean_and_error([rewards[task] - last[0][task] for task in both])
            yield f"  {name} - {names[0]}: {mean:+.3f} ± {error:.3f} at the end, paired over {len(both)} tasks"


def _training(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    rows = []
    for metric in TRAINING:
        cells = []
        for run in runs:
            values = [line[metric] for line in run.lines if line.get(metric) is not None]
            first, last = values[:WINDOW], values[-WINDOW:]
            means = [f"{math.fsum(some) / len(some):.3g}" for some in (first, last) if some]
            cells.append(" -> ".join(means) or "-")
        rows.append([metric, *cells])
    alarms = []
    for run in runs:
        fired: dict[str, int] = {}
        for line in run.lines:
            for name in line:
                if name.startswith("alarm/"):
                    fired.setdefault(name.removeprefix("alarm/"), line["step"])
        alarms.append(", ".join(f"{name} (step {step})" for name, step in fired.items()) or "none")
    yield f"\ntraining, means of the first and the last {WINDOW} steps"
    yield table(["metric", *names], [*rows, ["alarms, first at", *alarms]])


def _answers(name: str, run: Run, stream: str, task: str) -> Iterator[str]:
    """Yields the commonest answers, the best and the worst sample of the last step, and a task's answers over time."""
    files = transcripts.files(run.path, stream)
    if not files:
        yield f"\n{name}: no rollouts of {stream}"
        return
    step = max(files)
    records = transcripts.read(files[step])
    counts = collections.Counter(map(transcripts.answer, records))
    rows = []
    for text, count in counts.most_common(SHOWN_ANSWERS):
        same = [one for one in records if transcripts.answer(one) == text]
        rewards = [one["reward"] for one in same if one["valid"]]
        mean = f"{math.fsum(rewards) / len(rewards):.3f}" if rewards else "-"
        rows.append([str(count), f"{count / len(records):.0%}", mean, transcripts.short(text, 80)])
    yield f"\n{name}: the commonest of {len(records)} answers ({stream}, step {step})"
    yield table(["count", "share", "reward", "answer"], rows)
    valid = sorted((one for one in records if one["valid"]), key=lambda one: one["reward"])
    for label, found in (("best", valid[-1:]), ("worst", valid[:1])):
        for one in found:
            yield f"\n{name}: the {label} ({stream}, step {step})\n{transcripts.transcript(one, most=600)}"
    yield from _over_time(name, run, stream, task, records)


def _over_time(
    name: str, run: Run, stream: str, task: str, records: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    files = transcripts.files(run.path, stream)
    tasks = {one["task_id"] for one in records}
    if task and task not in tasks and stream != "train":
        known = ", ".join(sorted(tasks)[:5]) + ", ..." * (len(tasks) > 5)
        raise UserError(f"--task={task}: {stream} has no such task; it has {known}")
    if not task:
        first, last = run.rewards(stream, min(files)), run.rewards(stream, max(files))
        common = [one for one in last if one in first] or sorted(tasks)
        task = max(common, key=lambda one: abs(last.get(one, 0.0) - first.get(one, 0.0)))
    rows = []
    for step, path in files.items():
        found = [one for one in transcripts.read(path) if one["task_id"] == task]
        rows += [
            [
                str(step),
                f"{one['reward']:.3f}" if one["valid"] else "-",
                transcripts.short(transcripts.answer(one), 90),
            ]
            for one in found[:2]
        ]
    yield f"\n{name}: answers to task {task} over the steps ({stream}; two samples a step at most)"
    yield table(["step", "reward", "answer"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text, its columns as wide as they must be and at most 90 characters each."""
    cells = [[transcripts.short(cell, 90) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
