"""Runs what notebooks and README show, for the tests: cells as IPython does, blocks as a shell does."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW = bool(os.environ.get("RFTJAX_SLOW"))  # trains a small model for real, for minutes
WHY = "trains for minutes; RFTJAX_SLOW=1 runs it, after scripts/fetch_model.py"


def cells(path: Path, kind: str) -> list[str]:
    book: dict[str, Any] = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


def run_cell(source: str, names: dict[str, Any], shell: Callable[[str], None]) -> None:
    """Executes a cell in `names`; its ! lines go to `shell` with {EXPRESSION} filled in, % lines do nothing."""
    if source.startswith("%%writefile "):
        head, _, body = source.partition("\n")
        Path(head.split()[1]).write_text(body)
        return
    names["_shell"] = lambda text: shell(re.sub(r"\{([^{}]+)\}", lambda m: str(eval(m[1], names)), text))  # fmt: skip
    code = re.sub(r"^!(.*)$", lambda match: f"_shell({match[1]!r})", source, flags=re.M)
    exec(compile(re.sub(r"^%.*$", "", code, flags=re.M), "cell", "exec"), names)
