"""Reads rows, each with its place, from files, directories, datasets and Python functions.

JSON and CSV are parsed here, so that no value is converted. `datasets` reads saved and hub datasets and the Parquet
files that it wrote, and is imported only for those.
"""

from __future__ import annotations

import csv
import importlib.util
import inspect
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.tasks import compressed, gym
from rftjax.workers.user_code import load_function

# A row as read: its place, its value, and the problem with reading it ("" for none).
Read = tuple[str, Any, str]
JSON, CSV = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
SUFFIXES = (*JSON, *CSV, ".parquet")
KINDS = "JSONL, JSON, CSV, TSV or Parquet"
# Words in a path that name its split, as in `datasets`.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")
_ANY_CELL_BYTES = 2**31 - 1
_HUB_TIMEOUT_S = 10.0


def read(source: str, split: str, field: str) -> Iterator[Read]:
    """Yields the rows of an existing path, a Python function or a named dataset, tried in this order.

    `split` is a name with an optional slice ("train[:100]", "train[10%:]"); a single file uses the slice only.
    """
    if gym.matches(source):
        return ((place, row, "") for place, row in gym.rows(source, split, field))
    path = os.path.expanduser(source)
    if not os.path.exists(path):
        left, colon, _ = source.partition(":")
        if colon and (left.endswith(".py") or _is_module(left)):
            return _read_function(source, split, field)
        looks_like_path = path.startswith(("/", ".", "~")) or path.endswith("/")
        looks_like_path = looks_like_path or kind_of(path) in SUFFIXES
        if not source or looks_like_path:
            raise UserError(
                f"{field}={source!r}: there is no such file or directory (looked for "
                f"{os.path.abspath(path)}); give a JSONL file, a dataset or a function of rows"
            )
        return _told(_read_hub(source, split), source, split, field)
    parts = _SLICE.fullmatch(split)
    if parts is None:
        raise UserError(
            f"tasks.split={split!r}: must be a name, or a name with a slice, as 'train[:100]' or 'train[10%:]'"
        )
    rows = _read_path(path, parts["name"], field, source)
    return _sliced(_told(rows, source, split, field), parts["first"], parts["last"])


def kind_of(path: str) -> str:
    """Returns a path's suffix in lower case, without a compression suffix."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in compressed.SUFFIXES else suffix


def _sliced(rows: Iterator[Read], first: str | None, last: str | None) -> Iterator[Read]:
    if first is None and last is None:
        return rows
    found = list(rows)

    def index(text: str | None) -> int | None:
        if text is None or not text.endswith("%"):
            return None if text is None else int(text)
        return round(len(found) * int(text[:-1]) / 100)

    return iter(found[index(first) : index(last)])


def _told(rows: Iterator[Read], source: str, split: str, field: str) -> Iterator[Read]:
    """Yields the rows; turns an exception of a library into a UserError that names the source."""
    try:
        yield from rows
    except UserError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:500]
        name, _, variant = source.partition(":")
        tried = os.path.expanduser(source)
        if isinstance(error, (EOFError, zlib.error, lzma.LZMAError)):
            tried, what = f"compressed file {tried}", f"{what}; it is torn or no such file"
        elif not os.path.exists(tried):
            tried = f"split {split!r} of dataset {name!r}"
            tried += f" with configuration {variant!r}" if variant else ""
            tried += f", for there is no file {source!r}"
            tried += f" and no Python module {name!r}" if variant else ""
        elif os.path.isdir(tried):
            tried = f"split {split!r} of {tried}"
        raise UserError(
            f"{field}={source!r}: cannot be read (tried {tried}: {type(error).__name__}: {what}); "
            "give a JSONL file, a dataset or a function of rows"
        ) from error


# ---- Functions


def _is_module(name: str) -> bool:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
    # A package on the way to it fails to import, which `load_function` then tells.
    except Exception:
        return True


def _read_function(source: str, split: str, field: str) -> Iterator[Read]:
    function = load_function(source, field=field)
    try:
        takes_split = "split" in inspect.signature(function).parameters
        rows = function(split=split) if takes_split else function()
        # An environment of verifiers.
        rows = rows.get_dataset() if hasattr(rows, "get_dataset") else rows
        if isinstance(rows, (dict, str, bytes)) or hasattr(rows, "columns"):
            raise TypeError(
                f"it must return rows, an iterable of dicts, and returned a {type(rows).__name__}"
            )
        arrow = type(rows).__module__.partition(".")[0] == "datasets"
        for number, value in enumerate(rows, start=1):
            yield f"{source}[{number}]", Padded(value) if arrow else value, ""
    except Exception as error:
        raise UserError(
            f"{field}={source!r}: the function raised {type(error).__name__}: {error}"
        ) from error


# ---- Files and directories


def _read_path(path: str, split: str, field: str, source: str) -> Iterator[Read]:
    if os.path.isdir(path):
        yield from _read_directory(path, split, field, source)
        return
    kind, head = kind_of(path), compressed.head(path)
    if kind == ".parquet" or head.startswith(b"PAR1"):
        yield from _read_dataset(source, _parquet_rows(path))
    elif b"\0" in head and not head.startswith(compressed.UTF16):
        raise UserError(
            f"{field}={source!r}: is a binary file of a kind that is not read here; "
            f"convert it to {KINDS}, or give a function that reads it"
        )
    elif kind in CSV:
        yield from _read_csv(path, "\t" if kind == ".tsv" else "")
    else:
        yield from _read_json(path, split)


def _read_directory(path: str, split: str, field: str, source: str) -> Iterator[Read]:
    """Reads the Parquet files of a directory, else its JSON and CSV files; `datasets` reads every other kind."""
    if os.path.exists(parts := os.path.join(path, "dataset_dict.json")):
        names = json.loads(Path(parts).read_text())["splits"]
        if split not in names:
            raise UserError(_no_split(field, source, split, names))
        return _read_saved(source, os.path.join(path, split))
    if os.path.exists(os.path.join(path, "state.json")):
        return _read_saved(source, path)
    files = sorted(one for one in Path(path).rglob("*") if one.is_file())
    files = [
        one for one in files if not any(part[0] == "." for part in one.relative_to(path).parts)
    ]
    tables = [one for one in files if one.suffix == ".parquet"]
    texts = tables or [one for one in files if kind_of(one.name) in (*JSON, *CSV)]
    described = any(b"data_files" in one.read_bytes() for one in files if one.name == "README.md")
    if described or not texts or any(one.suffix == ".arrow" for one in files):
        import datasets

        return _read_dataset(source, datasets.load_dataset(path, split=split, streaming=True))
    by_split: dict[str, list[Path]] = {}
    for one in texts:
        words = re.split(r"[\W\d_]+", str(one.relative_to(path)).lower())
        known = (name for name, aliases in _SPLITS.items() if set(aliases) & set(words))
        name = split if split.lower() in words else next(known, "")
        by_split.setdefault(name, []).append(one)
    if list(by_split) == [""] and split == "train":
        by_split = {split: texts}
    if split not in by_split:
        raise UserError(_no_split(field, source, split, by_split))
    rows = (_read_path(str(one), split, field, str(one)) for one in by_split[split])
    return itertools.chain.from_iterable(rows)


def _no_split(field: str, source: str, split: str, names: Iterable[str]) -> str:
    there = (
        ", ".join(name for name in names if name) or "train alone, as no file's name says another"
    )
    return (
        f"{field}={source!r}: has no split {split!r}; it has {there}. Set tasks.split, or "
        "tasks.heldout_split for held-out tasks"
    )


def _read_saved(source: str, path: str) -> Iterator[Read]:
    import datasets

    # Without rows there is no file, which `datasets` fails to open.
    if json.loads(Path(path, "state.json").read_text()).get("_data_files") != []:
        yield from _read_dataset(source, datasets.load_from_disk(path))


def _read_hub(source: str, split: str) -> Iterator[Read]:
    import datasets

    name, _, variant = source.partition(":")
    away, offline = _hub_is_away(name), datasets.config.HF_HUB_OFFLINE
    # Otherwise `datasets` asks six times, with growing pauses, before it looks into its cache.
    datasets.config.HF_HUB_OFFLINE = offline or away != ""
    try:
        rows = datasets.load_dataset(name, variant or None, split=split)
    except ConnectionError as error:
        if not away:
            raise
        reason = f"the hub does not answer ({away}), and the cache has no such dataset"
        raise ConnectionError(reason) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    yield from _read_dataset(source, rows)


def _hub_is_away(name: str) -> str:
    """Returns why the hub gives no answer about a dataset, "" where it does or needs not be asked."""
    import datasets
    import huggingface_hub as hub

    try:
        hub.HfApi(datasets.config.HF_ENDPOINT).dataset_info(name, timeout=_HUB_TIMEOUT_S)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
        return ""
    except Exception as error:  # each version of its HTTP client has its own classes
        return f"{type(error).__name__}: {error}"
    return ""


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Parquet file; `datasets` decodes the columns whose kinds it wrote into the file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if not file.metadata.num_rows:
            return
        names = file.schema_arrow.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"it has more than one column {', '.join(map(repr, twice))}")
        if b"huggingface" not in (file.schema_arrow.metadata or {}):
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist(maps_as_pydicts="strict")
            return
    import datasets

    yield from datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)


def _read_dataset(source: str, rows: Iterable[Any]) -> Iterator[Read]:
    for number, value in enumerate(rows, start=1):
        yield f"{source}[{number}]", Padded(value), ""


class Padded(dict):
    """A row from Arrow, which pads every record with None for the keys that only others have."""


def unpadded(value: Any) -> Any:
    """Removes keys whose value is None, at every depth."""
    if isinstance(value, dict):
        return {key: unpadded(one) for key, one in value.items() if one is not None}
    return [unpadded(one) for one in value] if isinstance(value, list) else value


# ---- JSON


def _read_json(path: str, split: str) -> Iterator[Read]:
    """Yields the lines of a JSONL file, or the rows of a file that is one JSON array or object."""
    whole = _whole(path, split) if kind_of(path) == ".json" else None
    if whole is not None:
        yield from whole
        return
    first = True
    for number, line, problem in compressed.lines(path):
        if not line.strip() and not problem:
            continue
        value = None
        if not problem:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = f"line: is not valid JSON ({error})"
        in_lines = not problem and not (isinstance(value, list) and _are_objects(value))
        if first and not in_lines and (whole := _whole(path, split)) is not None:
            yield from whole
            return
        first = False
        yield f"{path}:{number}", value, problem


def _whole(path: str, split: str) -> Iterator[Read] | None:
    """Rows of a file that is one JSON value: an array, an object that holds one (by the split's name), or a row."""
    try:
        with compressed.open_file(path) as file:
            value = json.loads(file.read())
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and not {"messages", "prompt"} & value.keys():
        arrays = {name: one for name, one in value.items() if one and _are_objects(one)}
        value = arrays.get(split, next(iter(arrays.values())) if len(arrays) == 1 else value)
    rows = value if isinstance(value, list) else [value]
    return ((f"{path}[{number}]", row, "") for number, row in enumerate(rows, start=1))


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


# ---- CSV


def _read_csv(path: str, delimiter: str = "") -> Iterator[Read]:
    """Yields the rows of a file whose first line names the fields; every cell is the text in the file.

    The default delimiter is the most frequent of comma, semicolon, tab and bar in the first line. Columns without a
    name, such as a saved index, are dropped.
    """
    csv.field_size_limit(_ANY_CELL_BYTES)
    torn: list[Read] = []

    def texts() -> Iterator[str]:
        for number, line, problem in compressed.lines(path):
            if problem:
                torn.append((f"{path}:{number}", None, problem))
                return
            yield line

    lines = texts()
    first = next(lines, "")
    skipped = 0
    if said := re.fullmatch(r"sep=(.)\s*", first):
        delimiter, first, skipped = said[1], next(lines, ""), 1
    unquoted = re.sub(r'"[^"]*"', "", first)
    delimiter = delimiter or max(",;\t|", key=unquoted.count)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"{path}:{skipped + reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield place, None, f"line: is not valid CSV ({error}); quotes inside quotes are doubled"
            break
        if cells is None:
            break
        if not any(cells):
            continue
        if not header:
            header = [name.strip() for name in cells]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                yield place, None, f"header: names {', '.join(map(repr, twice))} more than once"
                break
            continue
        if not any(cells[len(header) :]):
            cells = cells[: len(header)]
        problem = ""
        if len(cells) != len(header):
            problem = f"line: has {len(cells)} cells, the header names {len(header)} (parted by {delimiter!r})"
        row = {name: cell for name, cell in zip(header, cells, strict=False) if name}
        yield place, row, problem
    yield from torn
