"""What ties a workdir to the run in it: its config and the fingerprints of its inputs, from its first step on.

A workdir without a checkpoint binds nothing, whatever files a failed start has left there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rftjax import config as configs
from rftjax.config.fields import flatten
from rftjax.config.stored import CODE, RECORDED
from rftjax.errors import UserError
from rftjax.run.checkpoint import Checkpoints, step_directories
from rftjax.run.inputs import Fingerprint

log = logging.getLogger(__name__)

CONFIG = "config.json"
RUN = "run.json"  # fingerprints of the inputs, and what was changed after which step
# Inputs whose change an option accepts; training tasks and the base model must stay.
ACCEPTABLE = (
    "evaluator",
    "environment",
    "agent",
    "tasks.heldout",
    "lora.path",
    "eval.evaluator",
    "eval.sets",
    *CODE,
)
_ROLLOUTS = re.compile(r"(?:step|heldout(?:-.+)?)_(\d+)\.jsonl(?:\.gz)?")


def stored_config(workdir: Path) -> ConfigDict | None:
    """Returns the config that the workdir is bound to, None before the first checkpoint."""
    if not step_directories(workdir / "checkpoints"):
        return None
    path = workdir / CONFIG
    if not path.exists():
        raise UserError(
            f"--workdir={workdir}: has checkpoints but no {CONFIG}, which says how they were made; "
            "put it back, or give another --workdir"
        )
    return configs.from_json(path.read_text(encoding="utf-8"), str(path))


class Binding:
    """A run's tie to its workdir; construction raises UserError where inputs are not those that the run began with.

    `accepted` names inputs whose change is let through. Only a `primary` process writes and prints.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        inputs: Mapping[str, Fingerprint],
        *,
        accepted: Sequence[str] = (),
        primary: bool = True,
    ) -> None:
        self.workdir, self.config, self.inputs = workdir, config, dict(inputs)
        self._primary = primary
        self._changes: dict[str, tuple[Any, Any]] = {}
        self._stored = False
        stored = stored_config(workdir)
        record = _read(workdir / RUN) if stored is not None else {}
        self._history: list[dict[str, Any]] = record.get("changes", [])
        unknown = sorted(set(accepted) - {*ACCEPTABLE})
        if unknown:
            raise UserError(
                f"--accept_changed={','.join(unknown)}: must be of {', '.join(ACCEPTABLE)}"
            )
        if stored is not None:
            before, now = flatten(stored), flatten(config)
            self._changes = {
                field: (before.get(field), value)
                for field, value in now.items()
                if before.get(field) != value
            }
            self._compare(record.get("inputs", {}), accepted)

    def _compare(self, before: Mapping[str, Fingerprint], accepted: Sequence[str]) -> None:
        problems = []
        for name, old in before.items():
            new = self.inputs.get(name, {})
            field = name.partition("[")[0]
            different = [part for part in {**old, **new} if old.get(part) != new.get(part)]
            # What is evaluated may change by its own fields; its files may not change unseen.
            chosen = name.startswith("eval.") and (
                name not in self.inputs or field in self._changes
            )
            cut = field in ("tasks.heldout", "eval.sets") and "eval.max_tasks" in self._changes
            if not different or cut or not old or (name in self.inputs and not new):
                continue
            if chosen or field in accepted:
                self._changes[name] = (old, new)
            else:
                problems.append(_problem(name, field, different))
        if problems:
            raise UserError("\n".join(problems))

    def start(self, checkpoints: Checkpoints, restart_from: int = -1) -> int:
        """Returns the step to go on from, 0 for none; an earlier one is gone back to, telling what is deleted.

        From a checkpoint on the config of this run is the workdir's.
        """
        steps = checkpoints.steps()
        start = max(steps, default=0)
        if restart_from >= 0:
            if restart_from not in steps:
                found = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
                way_out = "give one of them" if steps else "leave the flag out"
                raise UserError(
                    f"--restart_from={restart_from}: must be a step with a checkpoint, of which {found}; {way_out}"
                )
            start = restart_from
            dropped = _dropped(self.workdir, start, steps)
            log.warning("--restart_from=%d: dropped are %s", start, dropped or "no files")
            checkpoints.delete_after(start)
        if start:
            self._store(start)
        return start

    def bind(self, step: int) -> dict[str, float]:
        """Stores config and inputs in the workdir; returns metrics that mark what was changed, the first time.

        A checkpoint needs what it stores: call it before each save. Where it raises, the next call tries again.
        """
        self._store(step)
        marked = {
            field: after
            for field, (_, after) in self._changes.items()
            if field in RECORDED or isinstance(after, dict)  # another fingerprint
        }
        self._changes = {}
        return {
            f"changed/{field}": float(after) if isinstance(after, (int, float)) else 1.0
            for field, after in marked.items()
        }

    def _store(self, step: int) -> None:
        if self._stored or not self._primary:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        changes = [
            {"after_step": step, "time": now, "field": field, "before": before, "after": after}
            for field, (before, after) in self._changes.items()
        ]
        record = {"inputs": self.inputs, "changes": self._history + changes}
        _write(self.workdir / RUN, json.dumps(record, indent=2) + "\n")
        _write(self.workdir / CONFIG, configs.to_json(self.config))
        self._stored = True


def _problem(name: str, field: str, different: Iterable[str]) -> str:
    parts = ", ".join(different)
    if field == "tasks.train":
        return (
            f"tasks.train: these are not the tasks that the run began with ({parts} differ); "
            "give it the same ones, or start in a new workdir"
        )
    if field == "model.path":
        return (
            f"model.path: this is not the model that the run began with ({parts} differ); give it that one, or "
            "start in a new workdir (from what was trained: scripts/export_hf.py makes a model of a checkpoint)"
        )
    return (
        f"{name}: differs from what the run began with ({parts}), so that what comes would not compare with "
        f"what was; put it back, accept it with --accept_changed={field} (metrics.jsonl then has "
        f"changed/{name}), or start in a new workdir"
    )


def _dropped(workdir: Path, step: int, steps: Iterable[int]) -> str:
    """Says what of a workdir lies beyond a step, "" for nothing."""
    found = []
    if later := [one for one in steps if one > step]:
        found.append(f"the checkpoints of steps {', '.join(map(str, later))}")
    metrics = workdir / "metrics.jsonl"
    texts = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    numbers = [int(match[1]) for text in texts if (match := re.match(r'\{"step": (\d+)', text))]
    if lines := [number for number in numbers if number > step]:
        found.append(f"the metrics of steps {min(lines)} to {max(lines)}")
    names = [path.name for path in (workdir / "rollouts").glob("*")]
    matches = [match for name in names if (match := _ROLLOUTS.fullmatch(name))]
    if count := sum(int(match[1]) > step for match in matches):
        found.append(f"{count} files of rollouts")
    return ", ".join(found)


def _read(path: Path) -> dict[str, Any]:
    """Returns what `run.json` holds, {} where a workdir of an earlier version has none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: is not valid JSON ({error}); delete it, and the inputs are taken as they are"
        ) from error


def _write(path: Path, text: str) -> None:
    """Replaces a file at once, so that a kill leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
