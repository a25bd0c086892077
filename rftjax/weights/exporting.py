"""Writes export folders atomically, and replaces only empty folders and earlier exports.

Each holds `rftjax_export.json`, which lists the files of the export, its run and its step. Other programs ignore it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rftjax.errors import UserError

MARKER = "rftjax_export.json"
NO_FACTS: Mapping[str, Any] = MappingProxyType({})


def check_replaceable(out: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a folder to write; raises UserError if it holds files that no export wrote."""
    out = Path(out).expanduser().resolve()
    if not out.exists():
        return out
    if not out.is_dir():
        raise UserError(f"{out}: is a file, an export is a folder; give another folder")
    found = {path.name for path in out.iterdir()}
    foreign = sorted(found - set(_files_of(out)) - {MARKER})
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UserError(
            f"{out}: holds {', '.join(foreign[:3])}{more}, which no export wrote; an export replaces an empty folder"
            " or an earlier export only: move these files away, or give another folder"
        )
    return out


def facts_of(out: Path) -> dict[str, Any]:
    """Returns the facts of the export in a folder (run, step, ...), {} without one."""
    try:
        found = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def replacing(
    out: str | os.PathLike[str], facts: Mapping[str, Any] = NO_FACTS
) -> Iterator[tuple[Path, Path]]:
    """Yields an empty folder to write into and the target, which it replaces if the body ends without an error.

    `facts` go into the marker file. Folder and files get the permissions of the umask.
    """
    out = check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    work.mkdir()
    try:
        yield work, out
        files = sorted(path.name for path in work.iterdir())
        text = json.dumps({**facts, "files": files}, indent=2, ensure_ascii=False) + "\n"
        (work / MARKER).write_text(text, encoding="utf-8")
        # Some libraries write files that only the owner can read.
        permissions = work.stat().st_mode & 0o666
        for path in work.iterdir():
            path.chmod(permissions)
        check_replaceable(out)  # it may have changed meanwhile
        if out.exists():
            old = work.with_name(work.name + ".old")
            out.rename(old)
            work.rename(out)
            shutil.rmtree(old)
        else:
            work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _files_of(out: Path) -> list[str]:
    """Returns the names of the files that the export in a folder wrote, [] without a marker."""
    files = facts_of(out).get("files", [])
    return [name for name in files if isinstance(name, str) and not (out / name).is_dir()]
