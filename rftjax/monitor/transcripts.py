"""Reads the files of `rollouts/` and formats conversations as plain text."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.types import THINKS, answer_of

STREAMS = {"train": "step", "heldout": "heldout"}  # other streams are heldout-NAME
NAME = re.compile(r"(step|heldout(?:-.+)?)_(\d+)\.jsonl(?:\.gz)?")


def stem(stream: str) -> str:
    """Returns the prefix of the names of a stream's files."""
    return STREAMS.get(stream, f"heldout-{stream}")


def files(workdir: Path, stream: str) -> dict[int, Path]:
    """Returns the rollout files of a stream by step, in order."""
    found = {}
    for path in (workdir / "rollouts").glob("*.jsonl*"):
        match = NAME.fullmatch(path.name)
        if match and match[1] == stem(stream):
            found[int(match[2])] = path
    return dict(sorted(found.items()))


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a rollout file, compressed or not; raises UserError where it is damaged."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is no file of rollouts ({error}); remove it") from error


def completion(record: Mapping[str, Any]) -> str:
    """Returns the text of the last assistant message."""
    said = [one for one in record["messages"] if one.get("role") == "assistant"]
    return text_of(said[-1]) if said else ""


def answer(record: Mapping[str, Any]) -> str:
    """Returns what `completion` says after its thinking, all of it where it ended in that."""
    said = [one for one in record["messages"] if one.get("role") == "assistant"]
    whole = completion(record).strip()
    return answer_of(whole, begun=bool(said and said[-1].get(THINKS))).strip() or whole


def text_of(message: Mapping[str, Any]) -> str:
    """Returns a message's text, followed by its tool calls as JSON."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    calls = message.get("tool_calls")
    return f"{text}\n{json.dumps(calls, ensure_ascii=False)}".strip() if calls else text


def heading(record: Mapping[str, Any]) -> str:
    """Returns a line with the sample's task, reward, parts, length and finish reason."""
    earned = f"reward {record['reward']:.3g}" if record.get("valid") else "no valid reward"
    parts = [f"{name} {value:.3g}" for name, value in (record.get("parts") or {}).items()]
    tokens = sum(sum(one["sampled"]) for one in record.get("sequences") or ())
    facts = [earned, *parts, f"{tokens} tokens", f"finish {record['finish_reason'] or 'unknown'}"]
    return f"task {record['task_id']}, sample {record['sample']}: {', '.join(facts)}"


def transcript(record: Mapping[str, Any], most: int = 4000) -> str:
    """Returns a conversation as indented text, with at most `most` characters of each message."""
    lines = [heading(record)]
    lines += [f"  ! {one}" for one in (record.get("reason"), record.get("error")) if one]
    for message in record["messages"]:
        lines += [f"  {message.get('role', '?')}:", *indented(text_of(message), most)]
    return "\n".join(lines)


def indented(text: str, most: int = 4000, by: int = 4) -> list[str]:
    """Returns a text's lines, indented by `by`, cut after `most` characters, control characters escaped."""
    more = f"\n... ({len(text) - most} more characters)" if len(text) > most else ""
    return [" " * by + printable(line) for line in f"{text[:most]}{more}".split("\n")]


def printable(text: str) -> str:
    """Escapes characters that would move the cursor or that a terminal cannot show."""
    return "".join(one if one.isprintable() or one == "\t" else ascii(one)[1:-1] for one in text)


def short(text: str, width: int = 60) -> str:
    """Returns a text on one line of at most `width` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def series(
    workdir: Path, stream: str, steps: Sequence[int] = ()
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yields (step, records) of a stream, for all steps or those in `steps`."""
    for step, path in files(workdir, stream).items():
        if not steps or step in steps:
            yield step, read(path)
