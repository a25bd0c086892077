"""Rows of a dataset become tasks, and tasks a seeded stream that can be resumed at any draw.

Nothing here needs a device; `datasets` is imported only for the sources that it reads.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rftjax.errors import UserError
from rftjax.resolve import resolve
from rftjax.types import Message, Task

ROLES = ("system", "developer", "user", "assistant", "tool")
OWN_FIELDS = ("id", "messages", "prompt", "weight")
SHOWN_BAD_ROWS = 20
_READERS = {".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}), ".parquet": ("parquet", {})}
_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json")

# A row as read: where it stands, its value, and what was wrong with reading it ("" for nothing).
_Read = tuple[str, Any, str]


def load(
    source: str, *, map: str = "", split: str = "train", limit: int = 0, field: str = "tasks.train"
) -> list[Task]:
    """Reads the rows of `source` (the first `limit`) and raises one ValueError for all bad ones.

    `source` is a file (JSONL, JSON, CSV, TSV, Parquet), a directory that `datasets` reads,
    "module:name" or "file.py:name" of a function that returns rows (called with the keyword `split`
    if it has one), or the name of a dataset on the hub, "name" or "name:config". `map` names a
    function that turns one row into a dict with `messages` or `prompt`, or into None to leave the
    row out. `split` does not apply to single files. `field` is the config field that errors name.
    """
    where = f"{field}={source!r}"
    if limit < 0:
        raise UserError(f"{field}: limit={limit} must be 0 (every row) or larger")
    map_field = f"{field.rpartition('.')[0]}.map".lstrip(".")
    mapping = resolve(map, field=map_field) if map else None
    tasks: list[Task] = []
    bad: list[str] = []
    repeats: collections.Counter[str] = collections.Counter()
    seen = taken = 0
    for place, value, problem in _read(source, split, field):
        seen += 1
        if mapping and not problem:
            value, problem = _mapped(mapping, value, map)
            if value is None and not problem:
                continue
        task, problems = (None, [problem]) if problem else _task(value, repeats)
        bad += [f"{place}: {one}" for one in problems]
        if task is not None:
            tasks.append(task)
        taken += 1
        if taken == limit:
            break
    if bad:
        raise UserError(_bad_rows_message(where, bad))
    if not tasks:
        reason = f"{map} left out all {seen} of them" if seen else "the source is empty"
        raise UserError(f"{where}: holds no rows ({reason}); at least one task is needed")
    return tasks


def _bad_rows_message(where: str, bad: list[str]) -> str:
    lines = [f"{where}: {len(bad)} faults in its rows, which must be corrected or left out:"]
    lines += [f"  {one}" for one in bad[:SHOWN_BAD_ROWS]]
    if len(bad) > SHOWN_BAD_ROWS:
        lines.append(f"  and {len(bad) - SHOWN_BAD_ROWS} more")
    return "\n".join(lines)


def _mapped(mapping: Callable[[Any], Any], row: Any, name: str) -> tuple[Any, str]:
    """Row after the user's mapping function, and what went wrong in it."""
    try:
        value = mapping(row)
    except Exception as error:  # any fault of user code is a fault of this row, told with its place
        return None, f"map: {name} raised {type(error).__name__}: {error}"
    if value is not None and not isinstance(value, dict):
        return None, f"map: {name} returned a {type(value).__name__}; it must be a dict or None"
    return value, ""


# ---- Reading


def _read(source: str, split: str, field: str) -> Iterator[_Read]:
    """Chooses the reader for an existing path, a Python function, or else a dataset's name."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _read_datasets(path, split, field, source)
    if os.path.isfile(path):
        suffix = os.path.splitext(path)[1].lower()
        return (
            _read_datasets(path, "train", field, source) if suffix in _READERS else _read_json(path)
        )
    left, colon, _ = source.partition(":")
    if colon and (left.endswith(".py") or _is_module(left)):
        return _read_function(source, split, field)
    looks_like_path = path.startswith(("/", ".", "~")) or path.endswith(
        (*_READERS, *_TEXT_SUFFIXES)
    )
    if not source or looks_like_path:
        raise UserError(
            f"{field}={source!r}: there is no such file or directory (looked for "
            f"{os.path.abspath(path)}); give a JSONL file, a dataset or a function of rows"
        )
    return _read_datasets("", split, field, source)


def _is_module(name: str) -> bool:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
    except Exception:  # a package on the way to it fails to import, which `resolve` then tells
        return True


def _read_json(path: str) -> Iterator[_Read]:
    """Yields the lines of a JSONL file; a .json file may be one array, or one object, instead."""
    with open(path, "rb") as file:
        if path.endswith(".json"):
            try:
                whole = json.load(file)
            except ValueError:
                whole = None
            if isinstance(whole, (list, dict)):
                whole = whole if isinstance(whole, list) else [whole]
                for number, value in enumerate(whole, start=1):
                    yield f"{path}[{number}]", value, ""
                return
            file.seek(0)
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            value, problem = None, ""
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                problem = f"line: is not UTF-8 ({error})"
            except (ValueError, RecursionError) as error:
                problem = f"line: is not valid JSON ({error})"
            yield f"{path}:{number}", value, problem


def _read_function(source: str, split: str, field: str) -> Iterator[_Read]:
    function = resolve(source, field=field)
    try:
        takes_split = "split" in inspect.signature(function).parameters
        for number, value in enumerate(function(split=split) if takes_split else function()):
            yield f"{source}[{number + 1}]", value, ""
    except Exception as error:
        raise UserError(
            f"{field}={source!r}: the function raised {type(error).__name__}: {error}"
        ) from error


def _read_datasets(path: str, split: str, field: str, source: str) -> Iterator[_Read]:
    """Yields rows of a local `path` or, where that is empty, of the dataset named `source`."""
    try:
        for number, value in enumerate(_open_dataset(path, split, source), start=1):
            yield f"{source}[{number}]", value, ""
    except Exception as error:
        name, _, variant = source.partition(":")
        tried = path
        if not path:
            tried = f"dataset {name!r}" + (f" with configuration {variant!r}" if variant else "")
            tried += f", for there is no file {source!r}"
            tried += f" and no Python module {name!r}" if variant else ""
        raise UserError(
            f"{field}={source!r}: cannot be read (tried split {split!r} of {tried}: "
            f"{type(error).__name__}: {error}); give a JSONL file, a dataset or a function of rows"
        ) from error


def _open_dataset(path: str, split: str, source: str) -> Iterable[Any]:
    import datasets

    if not path:
        name, _, variant = source.partition(":")
        return datasets.load_dataset(name, variant or None, split=split)
    # Local files are streamed, for they need no second copy in a cache.
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isfile(path):
        kind, options = _READERS[suffix]
        return datasets.load_dataset(kind, data_files=path, split=split, streaming=True, **options)
    if os.path.exists(os.path.join(path, "dataset_dict.json")):
        return datasets.load_from_disk(os.path.join(path, split))
    if os.path.exists(os.path.join(path, "state.json")):
        return datasets.load_from_disk(path)
    return datasets.load_dataset(path, split=split, streaming=True)


# ---- Checking


def _task(row: Any, repeats: collections.Counter[str]) -> tuple[Task | None, list[str]]:
    """Task of one row, or its faults as "field: rule"; `repeats` counts the ids made so far."""
    if not isinstance(row, dict):
        return None, [f"row: must be an object with messages or prompt, is a {_kind(row)}"]
    problems = [
        f"{key!r}: a field's name must be a text" for key in row if not isinstance(key, str)
    ]
    messages, prompt, weight = row.get("messages"), row.get("prompt"), row.get("weight")
    if messages is None and prompt is None:
        problems.append("messages: is missing; a row has messages or prompt")
    elif messages is not None and prompt is not None:
        problems.append("prompt: stands beside messages; a row has one of the two")
    elif prompt is not None:
        problems += _prompt_problems(prompt)
    else:
        problems += _messages_problems(messages)
    if weight is None:
        weight = 1.0
    elif isinstance(weight, bool) or not isinstance(weight, (int, float, np.integer)):
        problems.append(f"weight: must be a number, is a {_kind(weight)}")
    elif not (math.isfinite(weight) and weight >= 0):
        problems.append(f"weight: must be finite and at least 0, is {weight}")
    given = row.get("id")
    if isinstance(given, bool) or not isinstance(given, (str, numbers.Integral, type(None))):
        problems.append(f"id: must be a text or a whole number, is a {_kind(given)}")
    elif given == "":
        problems.append("id: must not be empty; leave it out to have one made")
    if problems:
        return None, problems
    data = {key: value for key, value in row.items() if key not in OWN_FIELDS}
    if messages is None:
        messages = [{"role": "user", "content": prompt}]
    else:
        # Arrow gives every message of a column the keys of all, with None where there was none.
        messages = [{k: v for k, v in one.items() if v is not None} for one in messages]
        messages = [one if "content" in one else {**one, "content": ""} for one in messages]
    name = str(given) if given is not None else _made_id(messages, prompt, data, repeats)
    return Task(name, messages, data, prompt, float(weight)), []


def _made_id(
    messages: list[Message], prompt: str | None, data: dict, repeats: collections.Counter[str]
) -> str:
    name = _digest([messages, prompt is None, data])[:16]
    repeats[name] += 1
    return name if repeats[name] == 1 else f"{name}-{repeats[name]}"


def _prompt_problems(prompt: Any) -> list[str]:
    if not isinstance(prompt, str):
        way_out = "; messages go under messages" if isinstance(prompt, (list, tuple)) else ""
        return [f"prompt: must be a text, is a {_kind(prompt)}{way_out}"]
    return ["prompt: must not be empty"] if not prompt else _text_problems("prompt", prompt)


def _messages_problems(messages: Any) -> list[str]:
    if not isinstance(messages, (list, tuple)):
        return [f"messages: must be a list of messages, is a {_kind(messages)}"]
    if not messages:
        return ["messages: must not be empty"]
    problems = []
    for index, message in enumerate(messages):
        problems += _message_problems(f"messages[{index}]", message)
    last = messages[-1]
    if not problems and last["role"] == "assistant":
        problems.append(
            f"messages[{len(messages) - 1}].role: the last must not be the assistant's, for "
            "the model answers it; a reference answer goes into a field of its own"
        )
    elif not problems and not last["content"].strip():
        problems.append(f"messages[{len(messages) - 1}].content: the last must not be empty")
    return problems


def _message_problems(name: str, message: Any) -> list[str]:
    if not isinstance(message, dict):
        return [f"{name}: must be an object with role and content, is a {_kind(message)}"]
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    problems = []
    if role not in ROLES:
        problems.append(f"{name}.role: must be one of {', '.join(ROLES)}, is {role!r}")
    if calls is not None and role != "assistant":
        problems.append(f"{name}.tool_calls: only the assistant calls tools, the role is {role!r}")
    elif calls is not None and not (
        isinstance(calls, (list, tuple)) and all(isinstance(one, dict) for one in calls)
    ):
        problems.append(f"{name}.tool_calls: must be a list of objects")
    if isinstance(content, str):
        problems += _text_problems(f"{name}.content", content)
    elif content is not None or not (role == "assistant" and calls):
        problems.append(f"{name}.content: must be a text, is a {_kind(content)}")
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key), (str, type(None))):
            problems.append(f"{name}.{key}: must be a text, is a {_kind(message[key])}")
    return problems


def _text_problems(name: str, text: str) -> list[str]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return [f"{name}: holds half of a surrogate pair at character {error.start}"]
    return []


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# ---- Comparing


def text_hash(task: Task) -> str:
    """Hash of the user's and system's texts without regard to case and white space."""
    texts = [m["content"] for m in task.messages if m["role"] in ("user", "system", "developer")]
    return _digest([" ".join(text.split()).casefold() for text in texts])


def overlap(train: Sequence[Task], heldout: Sequence[Task]) -> list[tuple[Task, Task]]:
    """Pairs of a training and a held-out task of the same text, at most one a held-out task."""
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
    """Returns the pairs of `overlap`, which raise ValueError unless `allow` is true."""
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
    """Parts tasks into training and exactly `heldout_count` held-out ones, both in their old order.

    Tasks of one text stay together. Which texts are held out depends on the seed and the texts
    alone, not on their order.
    """
    if not 0 <= heldout_count < len(tasks):
        raise UserError(
            f"{field}={heldout_count} must be at least 0 and leave some of the {len(tasks)} tasks"
        )
    groups: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        groups.setdefault(text_hash(task), []).append(index)
    held: set[int] = set()
    for name in sorted(groups, key=lambda name: _digest([seed, name])):
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


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> str:
    """Text that is equal for equal values in every process, whatever the order of keys."""
    if value is None or isinstance(value, (str, int, float)):
        return json.dumps(value)
    if isinstance(value, dict):
        items = sorted(f"{_canonical(key)}:{_canonical(one)}" for key, one in value.items())
        return "{" + ",".join(items) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(map(_canonical, value))) + "}"
    if isinstance(value, (np.ndarray, np.generic)):
        return _canonical(value.tolist())
    # An object without its own repr shows its address, which differs from process to process.
    plain = type(value).__repr__ is object.__repr__
    return type(value).__qualname__ if plain else repr(value)


# ---- The stream


class TaskStream:
    """Endless stream over epochs, in which the task of draw n depends on seed and n alone.

    Draw n is place n % len(tasks) of the permutation of epoch n // len(tasks), so that an epoch has
    each task once; without `shuffle` every epoch is in the order given. The permutation sorts raw
    64-bit words of NumPy's PCG64 seeded by SeedSequence, which NumPy promises never to change; of
    Generator's methods it does not promise that.
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
        """Task of draw number `draw`, whatever has been drawn before."""
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

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here, as JSON-able values."""
        return {"draw": self.draw, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; raises ValueError if that is of other tasks, seed or order."""
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
            rows = ([t.id, t.messages, t.prompt, t.weight, t.data] for t in self.tasks)
            digests = itertools.chain.from_iterable((_digest(row), "\n") for row in rows)
            self._fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
        return {
            "count": len(self.tasks),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self._fingerprint,
        }
