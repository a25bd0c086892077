"""Reads recorded conversations as trajectories: a run's rollouts, or a JSONL file that anything wrote."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.tasks import compressed, rows
from rftjax.types import Message, Score, Task, Trajectory
from rftjax.types import Sequence as Tokens

# Fields of a conversation's line that are not the task's.
_OWN = ("messages", "prompt", "completion", "reward", "sample", "draw")


def files(place: Path) -> list[Path]:
    """Returns the files of a run's workdir, of a folder, or the file itself; UserError where there are none."""
    folder = place / "rollouts" if (place / "rollouts").is_dir() else place
    found = [place] if place.is_file() else sorted(folder.glob("*.jsonl*"))
    if not found:
        raise UserError(
            f"--rollouts={place}: must be a workdir with rollouts, a folder of them or a JSONL file, and there is"
            " nothing; give another place"
        )
    return found


def read(paths: Sequence[Path], tasks: Mapping[str, Task]) -> list[Trajectory]:
    """Returns the conversations of the files; `score` is the recorded one, None where there is none.

    Of rollouts the row is looked up in `tasks` by its id. Raises UserError listing lines that are no conversation.
    """
    found: list[Trajectory] = []
    faults: list[str] = []
    draws: dict[Any, int] = {}
    for path in paths:
        for number, record, problem in records(path):
            try:
                if problem:
                    raise ValueError(problem)
                rollout = isinstance(record, dict) and {"task_id", "sequences"} <= record.keys()
                one = _rollout(record, tasks) if rollout else _conversation(record)
            except (KeyError, TypeError, ValueError) as error:
                faults.append(f"{path}:{number}: {error}")
                continue
            # Several files have the same draws: a group is one of one file.
            key = (path, one.draw) if rollout or "draw" in record else (path, one.task.id)
            one.draw = draws.setdefault(key, len(draws))
            found.append(one)
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(
            f"{len(faults)} lines are no conversation; a line has messages, of which the last is the assistant's, or"
            " a prompt and a completion:\n  " + "\n  ".join(faults[:20]) + more
        )
    if not found:
        raise UserError(
            f"--rollouts: {', '.join(map(str, paths))} holds no conversation; give another file"
        )
    return _numbered(found)


def records(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yields (number, value, problem or "") for each line that is not empty, of a plain or compressed file."""
    try:
        for number, line, problem in compressed.lines(str(path)):
            value = None
            try:
                value = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                problem = f"is not valid JSON ({error})"
            if problem or line.strip():
                yield number, value, problem.removeprefix("line: ")
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{path}: is torn or no compressed file ({error}); remove it or write it again"
        ) from error


def _rollout(record: Mapping[str, Any], tasks: Mapping[str, Task]) -> Trajectory:
    messages, name = list(record["messages"]), str(record["task_id"])
    task = tasks.get(name) or Task(name, messages[: _last_answer(messages)])
    return Trajectory(
        task,
        int(record["draw"]),
        int(record["sample"]),
        messages,
        [
            Tokens(one["tokens"], one["sampled"], one["logprobs"], one["policy_version"])
            for one in record["sequences"]
        ],
        list(record.get("turn_rewards") or ()),
        list(record.get("infos") or ()),
        record.get("state"),
        record["finish_reason"],
        record.get("error", ""),
        score=_recorded(record) if record.get("valid") else None,
    )


def _conversation(record: Any) -> Trajectory:
    if not isinstance(record, dict):
        raise ValueError("must be an object")
    said = record.get("completion")
    if said is None:
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError("has neither messages nor a prompt and a completion")
        last = _last_answer(_listed(messages))
        if last < 0:
            raise ValueError("has no message of the assistant")
        given, answer = messages[:last], messages[last:]
    else:
        given = record.get("prompt") or record.get("messages") or []
        answer = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
    data = {key: value for key, value in record.items() if key not in _OWN}
    text = given if isinstance(given, str) else None
    prompt = _listed([{"role": "user", "content": text}] if text is not None else given)
    name = str(record.get("id") or record.get("task_id") or rows.digest([prompt, data])[:16])
    task = Task(name, prompt, data, text)
    draw, sample = _whole(record, "draw", 0), _whole(record, "sample", -1)
    return Trajectory(
        task,
        draw,
        sample,
        prompt + _listed(answer),
        turn_rewards=[0.0],
        finish_reason="stop",
        score=_recorded(record),
    )


def _whole(record: Mapping[str, Any], field: str, default: int) -> int:
    value = record.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field}: must be a whole number, is {value!r:.80}")
    return value


def _listed(messages: Any) -> list[Message]:
    if not isinstance(messages, (list, tuple)) or not all(
        isinstance(one, dict) for one in messages
    ):
        raise ValueError(
            "prompt and completion must be texts or lists of messages, messages a list of them"
        )
    return [dict(one) for one in messages]


def _last_answer(messages: Sequence[Any]) -> int:
    return max(
        (at for at, one in enumerate(messages) if one.get("role") == "assistant"), default=-1
    )


def _recorded(record: Mapping[str, Any]) -> Score | None:
    reward = record.get("reward")
    if (
        isinstance(reward, bool)
        or not isinstance(reward, (int, float))
        or not math.isfinite(reward)
    ):
        return None
    return Score(float(reward))


def _numbered(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Gives the samples of a group without numbers the next ones."""
    counts: dict[int, int] = {}
    for one in trajectories:
        count = counts.get(one.draw, 0)
        one.sample = count if one.sample < 0 else one.sample
        counts[one.draw] = count + 1
    return trajectories
