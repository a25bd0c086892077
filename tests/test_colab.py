"""The notebooks are whole: format, code, and the files and fields that they name."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rftjax.config import base_config, flatten

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("colab/*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    book: dict[str, Any] = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def plain(source: str) -> str:
    """Code without the notebook's own commands."""
    lines = source.splitlines()
    return "\n".join(line for line in lines if not line.startswith(("!", "%")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_of_the_format_and_carries_no_output(path: Path):
    book = json.loads(path.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in book["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in book["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_parses(path: Path):
    assert len(cells(path, "code")) > 4
    for source in cells(path, "code"):
        ast.parse(plain(source))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_and_fields_that_a_notebook_names_exist(path: Path):
    text = "\n".join(cells(path, "code") + cells(path, "markdown"))
    files = set(re.findall(r"\b(?:experiments|scripts|rftjax)/\w+\.(?:py|sh)", text))
    assert files
    assert not [name for name in files if not (ROOT / name).is_file()]
    fields = set(re.findall(r"--config\.([\w.]+)=", text))
    assert fields and fields <= set(flatten(base_config()))
