"""Folders of results: written whole or not at all, and only in place of what an export wrote.

Each holds `rftjax_export.json`, which lists the files of the export and says which run and step they are of. Other
programs ignore it.
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
    """Returns the absolute path of a folder to write; raises UserError where it holds what no export wrote."""
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
    """Returns what the export in a folder says of itself (run, step, ...), {} where there is none."""
    try:
        found = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def replacing(
    out: str | os.PathLike[str], facts: Mapping[str, Any] = NO_FACTS
) -> Iterator[tuple[Path, Path]]:
    """Yields an empty folder to write into and the one whose place it takes once the body has ended without an error.

    `facts` are stored beside the files. The folder and its files get the permissions of the umask.
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
        permissions = (
            work.stat().st_mode & 0o666
        )  # libraries write some files for their owner alone
        for path in work.iterdir():
            path.chmod(permissions)
        check_replaceable(out)  # minutes have passed
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
    """Returns the names of the files that the export in a folder wrote, none without a marker."""
    files = facts_of(out).get("files", [])
    return [name for name in files if isinstance(name, str) and not (out / name).is_dir()]
