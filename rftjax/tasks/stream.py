"""Tasks of a dataset, and a seeded stream of them that can resume at any draw.

`sources` reads the rows, `rows` checks them. Nothing here needs a device.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rftjax.errors import UserError
from rftjax.tasks import rows, sources
from rftjax.tasks.rows import digest
from rftjax.types import Task, Trajectory
from rftjax.workers.user_code import load_function

SHOWN_BAD_ROWS = 20


def load(
    source: str,
    *,
    map: str = "",
    split: str = "train",
    limit: int = 0,
    weight: str = "",
    temperature: str = "",
    field: str = "tasks.train",
) -> list[Task]:
    """Returns the tasks of `read`; raises a plain ValueError instead of UserError, for notebooks."""
    options = {"weight": weight, "temperature": temperature, "field": field}
    try:
        return read(source, map=map, split=split, limit=limit, **options)
    except UserError as error:
        raise ValueError(str(error)) from error


def read(
    source: str,
    *,
    map: str = "",
    split: str = "train",
    limit: int = 0,
    weight: str = "",
    temperature: str = "",
    field: str = "tasks.train",
) -> list[Task]:
    """Reads the first `limit` rows of `source` (0: all) and raises one UserError for all bad ones.

    `source` is a file (JSONL, JSON, CSV, TSV, Parquet, also compressed), a directory of such files or one that
    `datasets` reads, "module:name" or "file.py:name" of a function that returns rows (called with the keyword `split`
    if it has one), or the name of a dataset on the hub, "name" or "name:config". `map` names a function that turns one
    row into a dict with `messages` or `prompt`, or into None to drop the row. A single file uses only the slice of
    `split`. `weight` and `temperature` name row fields that hold these settings of a task. Errors name the config field
    `field`.
    """
    where = f"{field}={source!r}"
    if limit < 0:
        raise UserError(f"tasks.limit={limit}: must be 0 (every row) or larger")
    mapping = rows.mapping_of(load_function(map, field="tasks.map")) if map else None
    checker = rows.Checker(weight=weight, temperature=temperature)
    tasks: list[Task] = []
    bad: list[str] = []
    seen = taken = 0
    for place, value, problem in sources.read(source, split, field):
        seen += 1
        padded = isinstance(value, sources.Padded)
        if mapping and not problem:
            value, problem = rows.mapped(mapping, value, map)
            if value is None and not problem:
                continue
        value = sources.unpadded(value) if padded else value
        task, problems = (None, [problem]) if problem else checker.task(value)
        bad += [f"{place}: {one}" for one in problems]
        if task is not None:
            tasks.append(task)
        taken += 1
        if taken == limit:
            break
    if bad:
        raise UserError(_bad_rows_message(where, bad))
    if not tasks:
        empty = "the source is empty" + (
            f", or tasks.split={split!r} takes none" if "[" in split else ""
        )
        reason = f"{map} left out all {seen} of them" if seen else empty
        raise UserError(f"{where}: holds no rows ({reason}); at least one task is needed")
    if fault := checker.unused_field():
        raise UserError(f"{fault} of {where}")
    return tasks


def _bad_rows_message(where: str, bad: list[str]) -> str:
    faults = "1 fault" if len(bad) == 1 else f"{len(bad)} faults"
    lines = [f"{where}: {faults} in its rows, to be corrected or left out:"]
    lines += [f"  {one}" for one in bad[:SHOWN_BAD_ROWS]]
    if len(bad) > SHOWN_BAD_ROWS:
        lines.append(f"  and {len(bad) - SHOWN_BAD_ROWS} more")
    return "\n".join(lines)


# ---- Comparing


def text_hash(task: Task) -> str:
    """Hash of the user, system and developer texts, ignoring case and white space."""
    texts = [m["content"] for m in task.messages if m["role"] in ("user", "system", "developer")]
    return digest([" ".join(text.split()).casefold() for text in texts])


def overlap(train: Sequence[Task], heldout: Sequence[Task]) -> list[tuple[Task, Task]]:
    """Pairs of a training and a held-out task with the same text, at most one pair a held-out task."""
    by_text: dict[str, Task] = {}
    for task in train:
        by_text.setdefault(text_hash(task), task)
    found = ((by_text.get(text_hash(task)), task) for task in heldout)
    return [(twin, task) for twin, task in found if twin is not None]


def check_overlap(
    train: Sequence[Task],
    heldout: Sequence[Task],
    allow: bool = False,
    field: str = "tasks.heldout",
) -> list[tuple[Task, Task]]:
    """Returns the pairs of `overlap`; raises UserError if there are any, unless `allow` is true."""
    pairs = overlap(train, heldout)
    if pairs and not allow:
        examples = "; ".join(
            f"{held.id!r} has the text of training task {twin.id!r}: "
            f"{held.messages[-1]['content'][:80]!r}"
            for twin, held in pairs[:3]
        )
        raise UserError(
            f"{field}: {len(pairs)} of {len(heldout)} held-out tasks are in the training set too "
            f"({examples}); remove them, or set tasks.allow_overlap=True "
            "where tasks of one text differ in their other fields"
        )
    return pairs


def split(
    tasks: Sequence[Task], heldout_count: int, seed: int, field: str = "tasks.heldout_count"
) -> tuple[list[Task], list[Task]]:
    """Splits tasks into training tasks and exactly `heldout_count` held-out ones, both in the given order.

    Tasks with the same text stay together. Which texts are held out depends on the seed and the texts, not on order.
    """
    if not 0 <= heldout_count < len(tasks):
        raise UserError(
            f"{field}={heldout_count} must be at least 0 and leave some of the {len(tasks)} tasks"
        )
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(text_hash(task), []).append(index)
    held: set[int] = set()
    for name in sorted(groups, key=lambda name: digest([seed, name])):
        if len(held) + len(groups[name]) <= heldout_count:
            held.update(groups[name])
    if len(held) < heldout_count:
        raise UserError(
            f"{field}={heldout_count}: only {len(held)} could be held out, because tasks of one "
            f"text stay together ({len(groups)} texts in {len(tasks)} tasks); choose that number, "
            "or give the held-out tasks as a dataset of their own"
        )
    train = [task for index, task in enumerate(tasks) if index not in held]
    return train, [task for index, task in enumerate(tasks) if index in held]


# ---- The stream


class TaskStream:
    """Endless stream over epochs; the task of draw n depends only on seed and n.

    Draw n is index n % len(tasks) of the permutation of epoch n // len(tasks), so an epoch has each task once; without
    `shuffle` every epoch keeps the given order. The permutation sorts raw 64-bit words of NumPy's PCG64, seeded by
    SeedSequence: NumPy guarantees that stream for all versions, but not the results of Generator's methods.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool = True) -> None:
        if not tasks:
            raise UserError("a task stream needs at least one task")
        if seed < 0:
            raise UserError(f"seed={seed} must be 0 or larger")
        self.tasks = list(tasks)
        self.seed, self.shuffle = seed, shuffle
        self.draw = 0  # the number of the next draw
        self._epoch, self._order = -1, list[int]()
        self._fingerprint = ""

    def __len__(self) -> int:
        """Number of tasks in an epoch."""
        return len(self.tasks)

    def task(self, draw: int) -> Task:
        """Task of draw number `draw`, independent of earlier draws."""
        epoch, place = divmod(draw, len(self.tasks))
        if not self.shuffle:
            return self.tasks[place]
        if epoch != self._epoch:
            bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            words = bits.random_raw(len(self.tasks))
            self._epoch, self._order = epoch, np.argsort(words, kind="stable").tolist()
        return self.tasks[self._order[place]]

    def next(self, count: int) -> list[tuple[int, Task]]:
        """The next `count` draws, each with its number."""
        draws = range(self.draw, self.draw + count)
        self.draw += count
        return [(draw, self.task(draw)) for draw in draws]

    def upcoming(self, count: int) -> list[Task]:
        """Tasks of the next `count` draws, without drawing them."""
        return [self.task(draw) for draw in range(self.draw, self.draw + count)]

    def observe(self, trajectories: Iterable[Trajectory]) -> None:
        """Receives a step's scored trajectories; this order does not depend on them."""

    def state(self) -> dict[str, Any]:
        """State for `restore`, as JSON data."""
        return {"draw": self.draw, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`; raises UserError if that has other tasks, seed or order."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"tasks: the stored stream has {name}={state.get(name)!r}, this one has "
                    f"{value!r}; a run goes on only with the tasks and the seed that it began "
                    "with, so give it the same dataset, or start in a new workdir"
                )
        self.draw = int(state["draw"])

    def _identity(self) -> dict[str, Any]:
        if not self._fingerprint:
            parts = (
                [t.id, t.messages, t.prompt, t.weight, t.temperature, t.data] for t in self.tasks
            )
            digests = itertools.chain.from_iterable((digest(row), "\n") for row in parts)
            self._fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
        return {
            "count": len(self.tasks),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self._fingerprint,
        }
