"""Compares array names with shapes while the tests run: in `logits_BTV` there are three axes.

Every function of rftjax is looked at when it returns. Local names (and fields of named tuples) with a shape suffix
must have as many axes as letters, axes of the size that a digit says, and one size for one letter in one function;
all fields of a named tuple together may have one axis more in front, as stacked micro-batches do.
Needs Python 3.12 (`sys.monitoring`); on 3.11 nothing is checked.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rftjax

SUFFIX = re.compile(r"_?[a-z][A-Za-z0-9_]*?_([A-Z0-9]*[A-Z][A-Z0-9]*)")
_ROOT = str(Path(rftjax.__file__).parent)
_TOOL = 4  # an identifier that the interpreter leaves to nobody in particular


def suffix(name: str) -> str:
    """Returns the shape suffix of a name, "" where it has none (constants in capitals have none)."""
    match = SUFFIX.fullmatch(name)
    return match[1] if match else ""


def faults(names: dict[str, Any]) -> list[str]:
    """Returns what is wrong between the names and the shapes of their arrays."""
    found: list[str] = []
    sizes: dict[str, tuple[int, str]] = {}
    for name, shape in _arrays(names):
        letters = suffix(name)
        if len(letters) != len(shape):
            found.append(f"{name} has shape {shape}")
            continue
        for letter, size in zip(letters, shape, strict=True):
            if letter.isdigit() and size != int(letter):
                found.append(f"{name} has shape {shape}")
            elif not letter.isdigit():
                first, other = sizes.setdefault(letter, (size, name))
                if first != size:
                    found.append(f"{letter} is {size} in {name} and {first} in {other}")
    return found


def _arrays(names: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes; of a named tuple whose arrays are all stacked, without the leading axis."""
    for name, value in names.items():
        if suffix(name) and isinstance(getattr(value, "shape", None), tuple):
            yield name, tuple(value.shape)
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = list(_arrays(value._asdict()))
            stacked = all(len(shape) == len(suffix(field)) + 1 for field, shape in fields)
            yield from ((field, shape[stacked:]) for field, shape in fields)


class Watch:
    """Collects the faults of rftjax's functions as they return, from `start` to `stop`."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.checked = 0

    def start(self) -> None:
        if sys.version_info >= (3, 12):
            events = sys.monitoring.events
            sys.monitoring.use_tool_id(_TOOL, "array names")
            sys.monitoring.register_callback(_TOOL, events.PY_START, self._started)
            sys.monitoring.register_callback(_TOOL, events.PY_RETURN, self._returned)
            sys.monitoring.set_events(_TOOL, events.PY_START)

    def stop(self) -> None:
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(_TOOL, 0)
            sys.monitoring.free_tool_id(_TOOL)

    def take(self) -> list[str]:
        """Returns the faults since the last call, each once."""
        found, self.faults = list(dict.fromkeys(self.faults)), []
        return found

    def _started(self, code: types.CodeType, offset: int) -> Any:
        # Asked once for every function of the whole program; only ours with array names are watched further.
        names = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        if code.co_filename.startswith(_ROOT) and any(suffix(name) for name in names):
            sys.monitoring.set_local_events(_TOOL, code, sys.monitoring.events.PY_RETURN)
        return sys.monitoring.DISABLE

    def _returned(self, code: types.CodeType, offset: int, value: Any) -> None:
        self.checked += 1
        place = f"{Path(code.co_filename).relative_to(_ROOT)}, {code.co_qualname}"
        self.faults += [f"{place}: {fault}" for fault in faults(sys._getframe(1).f_locals)]
