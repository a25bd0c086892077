"""Finds user code by name: "package.module:name" or "path/to/file.py:name".

Worker processes import this module: standard library only.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from rftjax.errors import UserError
from rftjax.workers import stand_ins, user_files


def load_function(spec: str, *, field: str = "") -> Callable[..., Any]:
    """Imports the callable that `spec` names, as `load_object` does; raises UserError for what cannot be called."""
    value = load_object(spec, field=field)
    if not callable(value):
        place, name = f"{field}={spec!r}" if field else repr(spec), spec.rpartition(":")[2]
        raise UserError(
            f"{place}: must name something that can be called (a function, class or callable object), "
            f"and {name} is of type {type(value).__name__}; name a function or class instead"
        )
    return value


def check_arguments(function: Callable[..., Any], arguments: str, place: str) -> None:
    """Raises UserError where a function cannot be called as `arguments` say ("hook(step, metrics)"), or is a coroutine
    function; `place` is the field with its value."""
    wanted = f"{place}: must be callable as {arguments}"
    if inspect.iscoroutinefunction(function):
        raise UserError(f"{wanted} and not be async; write it with def")
    names = arguments.partition("(")[2].rstrip(")").split(", ")
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise UserError(f"{wanted}, but {error}; change its parameters") from None
    except ValueError:  # it has no signature to be had
        return


def load_object(spec: str, *, field: str = "") -> Any:
    """Imports what `spec` names; a relative path starts at the current directory.

    A file's folder goes to the front of sys.path, as when Python runs the file. Raises UserError, which names the
    config field `field`, for a wrong form, a missing file, a failed import and a missing name.
    """
    place = f"{field}={spec!r}" if field else repr(spec)
    module_name, colon, name = spec.rpartition(":")
    if not (colon and module_name and name):
        raise UserError(
            f"{place}: must be 'package.module:name' or 'path/to/file.py:name'; "
            "write the module or file, a colon, and the name of the function or class"
        )
    stand_ins.offer()
    try:
        if module_name.endswith(".py"):
            module = _load_file(module_name, place)
        else:
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, _MissingFile):
            raise UserError(str(error)) from None
        raise UserError(
            f"{place}: {module_name} must import, but importing it raised this; correct it and start again\n"
            + traceback_text(error)
        ) from error
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [
                word for word, found in vars(module).items() if callable(found) and word[0] != "_"
            ]
            raise UserError(
                f"{place}: {module_name} must define {name!r} and does not; it defines "
                f"{', '.join(sorted(public)) or 'nothing that can be called'}"
            )
        value = getattr(value, part)
    return value


def traceback_text(error: BaseException) -> str:
    """Formats an exception as Python prints it, without the frames of the import system."""
    frames = traceback.extract_tb(error.__traceback__)
    kept = [
        frame
        for frame in frames
        if not frame.filename.startswith("<frozen importlib")
        and frame.filename not in (__file__, importlib.__file__)
    ]
    head = ["Traceback (most recent call last):\n"] if kept else []
    lines = traceback.format_list(kept) + traceback.format_exception_only(error)
    return user_files.readable("".join(head + lines)).rstrip()


class _MissingFile(Exception):
    pass


def _load_file(path: str, place: str) -> types.ModuleType:
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise _MissingFile(
            f"{place}: the file must exist, and there is none at {path}; "
            "correct the path (a relative one is looked up from the current directory)"
        )
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: str) -> str:
    """Returns a module name by which every process with this sys.path can import the file.

    It is the file's stem, unless that is taken: a file must not replace an installed package of the same name.
    """
    name, folder = os.path.splitext(os.path.basename(path))[0], os.path.dirname(path)
    loaded = sys.modules.get(name)
    if loaded is not None:
        ours = os.path.realpath(getattr(loaded, "__file__", None) or "") == os.path.realpath(path)
        return name if ours else user_files.module_name(path)
    others = [entry for entry in sys.path if os.path.abspath(entry) != folder]
    free = (
        name.isidentifier()
        and name not in sys.stdlib_module_names
        and not os.path.isdir(os.path.join(folder, name))
        and importlib.machinery.PathFinder.find_spec(name, others) is None
    )
    return name if free else user_files.module_name(path)
