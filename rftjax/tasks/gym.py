"""Rows of the package reasoning-gym by name, an optional extra of this project: "reasoning_gym:NAME?OPTION=VALUE&...".

Options are the package's own of that dataset, `size` (500) and `seed` (0, and another one for each further split).
"""

from __future__ import annotations

import difflib
import importlib
import json
import urllib.parse
import zlib
from collections.abc import Iterator
from typing import Any

from rftjax.errors import UserError
from rftjax.workers.named import GYM
from rftjax.workers.plain import plain

ASK = "Give the final answer between <answer> and </answer>."
SIZE = 500


def matches(source: str) -> bool:
    """Says whether a source names a dataset of the package."""
    return source.startswith(GYM)


def rows(source: str, split: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row with its place: the question with a request for tags, `answer`, and the package's `entry`."""
    name, _, options = source.removeprefix(GYM).partition("?")
    seed = 0 if split == "train" else zlib.crc32(split.encode())
    given: dict[str, Any] = {"size": SIZE, "seed": seed}
    given |= {key: _value(text) for key, text in urllib.parse.parse_qsl(options)}
    dataset = _dataset(name, given, f"{field}={source!r}")
    for number, entry in enumerate(dataset):
        entry = plain(dict(entry))
        yield (
            f"{source}[{number + 1}]",
            {
                "id": f"{name}-{given['seed']}-{number}",
                "messages": [{"role": "user", "content": f"{entry['question']}\n\n{ASK}"}],
                "answer": entry["answer"],
                "entry": entry,
            },
        )


def _dataset(name: str, options: dict[str, Any], place: str) -> Any:
    try:
        package = importlib.import_module("reasoning_gym")
        known = importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise UserError(
            f"{place}: needs the package reasoning-gym: pip install 'rftjax[reasoning-gym]' ({error})"
        ) from error
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise UserError(
            f"{place}: reasoning-gym has no dataset {name!r}"
            + (
                f"; did you mean {' or '.join(near)}?"
                if near
                else "; see its gallery for their names"
            )
        )
    try:
        return package.create_dataset(name, **options)
    except Exception as error:  # whatever its own checks of the options raise
        raise UserError(
            f"{place}: reasoning-gym refuses these options ({type(error).__name__}: {error}); correct them"
        ) from error


def _value(text: str) -> Any:
    """Reads a number, true or false, a list, or else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
