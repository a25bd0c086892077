"""Finds the specs of the package by name: `--config=quickstart` is experiments/quickstart.py, wherever that lies."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

PACKAGE = "rftjax_experiments"  # the name of the folder experiments/ in a wheel


def folder() -> Path:
    """Returns where the specs lie: beside the package in a checkout, else where the wheel put them."""
    beside = Path(__file__).parents[2] / "experiments"
    if beside.is_dir():
        return beside
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) if places else beside


def names() -> list[str]:
    """Returns the names of the specs."""
    files = sorted(folder().glob("*.py"))
    return [path.stem for path in files if "def get_config(" in path.read_text()]


def on_path(path: str) -> None:
    """Puts a spec's folder on sys.path, as when Python runs the file: it may import what lies beside it."""
    beside = str(Path(path).absolute().parent)
    if beside not in sys.path:
        sys.path.insert(0, beside)


def locate(argument: str) -> str:
    """Returns a command-line argument with the file of a spec in place of its name; others stay as they are."""
    match = re.fullmatch(r"(--?config=)(\w+)(:.*)?", argument, re.DOTALL)
    if match is None or not (path := folder() / f"{match[2]}.py").is_file():
        return argument
    return f"{match[1]}{path}{match[3] or ''}"
