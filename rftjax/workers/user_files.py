"""A package whose modules are user files: `rftjax.workers.user_files.NAME_HEX` is the file at path HEX.

A file whose own name is taken is imported under such a name. Other processes, such as those of multiprocessing, can
then unpickle its functions and classes. Standard library only.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType

__path__: list[str] = []  # makes this module a package; the finder below finds its modules


def module_name(path: str) -> str:
    """Returns the name of the module of a file, given by its absolute path."""
    stem = re.sub(r"\W", "_", os.path.splitext(os.path.basename(path))[0])
    return f"{__name__}.{stem}_{os.fsencode(path).hex()}"


def readable(text: str) -> str:
    """Replaces the names of such modules by the stems of their files."""
    return re.sub(rf"{re.escape(__name__)}\.(\w+)_[0-9a-f]+", r"\1", text)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if parent != __name__:
            return None
        try:
            file = os.fsdecode(bytes.fromhex(name.rpartition("_")[2]))
        except ValueError:
            return None
        return importlib.util.spec_from_file_location(fullname, file)


sys.meta_path.append(_Finder())
