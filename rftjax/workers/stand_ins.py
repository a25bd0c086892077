"""Offers light modules to user code in place of a package that is not installed.

An evaluator written against such a package then runs unchanged. The installed package, if there is one, always wins.
Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# Package -> the package of its stand-in, whose modules have the same names.
STAND_INS = {"eval_protocol": "rftjax.evaluators.forms.stand_in"}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top, dot, rest = fullname.partition(".")
        if top not in STAND_INS:
            return None
        try:
            found = importlib.util.find_spec(f"{STAND_INS[top]}{dot}{rest}")
        except ModuleNotFoundError:
            found = None
        if found is None:
            name = top.replace("_", "-")
            raise ModuleNotFoundError(
                f"the stand-in for {top} has no module {fullname}; install the package: pip install {name}",
                name=fullname,
            )
        package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Returns a module of its own name that has the names of the stand-in's."""
        top, dot, rest = spec.name.partition(".")
        module = ModuleType(spec.name)
        module.__dict__["_stand_in"] = importlib.import_module(f"{STAND_INS[top]}{dot}{rest}")
        return module

    def exec_module(self, module: ModuleType) -> None:
        names = vars(module)["_stand_in"].__dict__
        vars(module).update({k: v for k, v in names.items() if not k.startswith("__")})


_FINDER = _Finder()


def offer() -> None:
    """Puts the stand-ins behind whatever is installed; a second call does nothing."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
