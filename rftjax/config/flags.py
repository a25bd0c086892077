"""Parses the command line with errors that say which field, what is wrong with it and what to write instead."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from rftjax.config.fields import field_type, flatten, suggest
from rftjax.config.specs import folder, locate, names, on_path
from rftjax.errors import UserError

WITHOUT_SPEC = ("serve", "chat", "score")  # modes that a workdir or a model is enough for
_BOOLEANS = ("true", "t", "1", "false", "f", "0")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses `argv` as absl does (give it to `app.run` as `flags_parser`) and returns what is no flag.

    Bad flags are listed on stderr, all of them, and the program ends with exit code 2.
    """
    argv = [locate(_expand_home(argument)) for argument in _joined(argv)]
    if not _spec_argument(argv) and {f"--mode={mode}" for mode in WITHOUT_SPEC} & {*argv}:
        argv.insert(1, f"--config={folder() / 'rft.py'}")
    if not any(re.fullmatch(r"--?help\w*", argument) for argument in argv):
        value = _spec_argument(argv)
        given = [one.partition("=")[2] for one in argv if re.match(r"--?config(=|$)", one)]
        if len(given) > 1:
            _fail(
                [
                    f"--config: is given {len(given)} times ({', '.join(given)}); give one spec, and change its"
                    " fields by --config.section.field=value"
                ]
            )
        if not value:
            _fail(
                [f"--config: must be given: the spec to run, a file or one of {', '.join(names())}"]
            )
        if not Path(_split(value)[0]).is_file():
            _fail([_missing_spec(value)])
        on_path(_split(value)[0])
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # ml_collections raises whatever the spec and its own look-ups raise
        _fail(diagnose(argv) or [f"{error}"])


def diagnose(argv: Sequence[str]) -> list[str]:
    """Returns what is wrong with --config and its overrides, [] where nothing is; runs the spec."""
    value = _spec_argument(argv)
    if not value:
        return []
    try:
        config = load_spec(value)
    except ValueError as error:
        return [str(error)]
    known = flatten(config)
    problems = []
    for field, text in _overrides(argv):
        name = f"--config.{field}"
        found = _look_up(config, field)
        if isinstance(found, ConfigDict):
            problems.append(
                f"{name}: is a section; set its fields one by one: {', '.join(f'{field}.{key}' for key in found)}"
            )
        elif field not in known:
            problems.append(f"{name}: the spec has no such field{suggest(field, known)}")
        elif text is not None and (rule := _type_problem(field_type(config, field), text)):
            problems.append(f"{name}={text!r}: {rule} (the spec has {known[field]!r})")
    return problems


def load_spec(value: str) -> ConfigDict:
    """Runs `get_config` of a spec given as FILE or FILE:ARGUMENT; ValueError says where in the file it failed."""
    path, argument = _split(value)
    name = f"--config={value}"
    module_spec = importlib.util.spec_from_file_location("spec", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{name}: must be a Python file")
    module = importlib.util.module_from_spec(module_spec)
    on_path(path)
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ValueError(
                "must define get_config(arg=''), which returns the config, as rftjax.config.base_config() makes one"
            )
        config = module.get_config(*argument)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(path)]
        place = f", line {frames[-1].lineno}" if frames else ""
        # A ValueError is the spec's own word to its user; anything else is a fault in the spec.
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{name}: {path}{place}: {kind}{error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{name}: get_config() must return a ConfigDict, returned {type(config).__name__}"
        )
    return config


def _fail(problems: Sequence[str]) -> NoReturn:
    sys.stderr.write("".join(f"error: {problem}\n" for problem in problems))
    sys.exit(2)


def _joined(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with `--config SPEC` as one, `--config=SPEC`."""
    found: list[str] = []
    for argument in argv:
        if found and found[-1] in ("-config", "--config") and argument[:1] != "-":
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def _expand_home(argument: str) -> str:
    """Expands the `~` of --config=~/spec.py, which shells leave as it is."""
    match = re.fullmatch(r"(--?config=)(~.*)", argument, re.DOTALL)
    return match[1] + os.path.expanduser(match[2]) if match else argument


def _split(value: str) -> tuple[str, list[str]]:
    path, colon, argument = value.partition(":")
    return path, [argument] if colon else []


def _missing_spec(value: str) -> str:
    path = Path(_split(value)[0])
    if path.is_dir():
        return f"--config={value}: is a folder; give a spec, a Python file with get_config"
    specs = (
        [str(other) for other in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
    )
    specs += names()
    if path.parent.name == "experiments" and path.stem in names():
        return f"--config={value}: there is no file {path}; --config={path.stem} is the one in {folder()}"
    near = difflib.get_close_matches(str(path), specs, n=3, cutoff=0.6)
    way_out = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"the path is looked up from the current directory, and the names are {', '.join(names())}"
    )
    return f"--config={value}: there is no file {path}; {way_out}"


def _spec_argument(argv: Sequence[str]) -> str:
    for index, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(=(.*))?", argument, re.DOTALL):
            return match[2] or "" if match[1] else "".join(argv[index + 1 : index + 2])
    return ""


def _overrides(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Returns the fields set in `argv` with their texts; None where the text may be the next argument or absent."""
    found = []
    for argument in argv:
        if match := re.fullmatch(r"--?(no)?config\.([^=]+)(=(.*))?", argument, re.DOTALL):
            found.append((match[2], match[4] if match[3] else None))
    return found


def _look_up(config: ConfigDict, field: str) -> Any:
    found: Any = config
    for name in field.split("."):
        found = found[name] if isinstance(found, ConfigDict) and name in found else None
    return found


def _type_problem(wanted: type, text: str) -> str:
    try:
        if wanted is bool and text.lower() not in _BOOLEANS:
            return "must be true or false"
        if wanted in (int, float):
            wanted(text)
    except ValueError:
        return "must be a whole number" if wanted is int else "must be a number"
    return ""
