"""The notebooks are whole: format, code, and the files and fields that they name."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from snippets import SLOW, WHY, cells, run_cell

from rftjax import config as configs
from rftjax.config import base_config, flatten, specs
from rftjax.config.flags import diagnose, load_spec

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("colab/*.ipynb"))


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
def test_what_a_notebook_imports_of_the_package_is_there(path: Path):
    nodes = [node for source in cells(path, "code") for node in ast.walk(ast.parse(plain(source)))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [(node.module, one.name) for node in froms for one in node.names]
    ours = [(module, name) for module, name in names if module and module.startswith("rftjax")]
    assert ours
    for module, name in ours:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_and_fields_that_a_notebook_names_exist(path: Path):
    text = "\n".join(cells(path, "code") + cells(path, "markdown"))
    files = set(re.findall(r"\b(?:experiments|scripts|rftjax)/\w+\.(?:py|sh)", text))
    assert files
    assert not [name for name in files if not (ROOT / name).is_file()]
    fields = set(re.findall(r"--config\.([\w.]+)=", text))
    assert fields <= set(flatten(base_config()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_tensorboard_and_links_from_the_readme(path: Path):
    code = "\n".join(cells(path, "code"))
    assert re.search(r"^%load_ext tensorboard\n%tensorboard --logdir \{WORKDIR\}", code, re.M)
    assert f"(colab/{path.name})" in (ROOT / "README.md").read_text()
    assert "pip" in code and "rftjax[{EXTRAS}]" in code


def trained(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, shell) -> list[str]:
    """Runs the cells up to the last that trains; returns the rest."""
    monkeypatch.chdir(folder)
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: None if "pip" in a[0] else run(*a, **k))
    code = cells(path, "code")
    last = max(index for index, cell in enumerate(code) if "rftjax.main" in cell)
    names: dict = {}
    for cell in code[: last + 1]:
        run_cell(cell, names, lambda command: shell(shlex.split(command)))
    return [(cell, names) for cell in code[last + 1 :]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_commands_of_a_notebook_are_ones_and_its_text_says_their_steps(
    path: Path, tmp_path, monkeypatch
):
    commands: list[list[str]] = []
    (tmp_path / "workdir" / "colab-words").mkdir(parents=True)
    trained(path, tmp_path, monkeypatch, commands.append)
    steps = set()
    for command in commands:
        if command[1:] == ["-m", "rftjax.cli", "fetch-model"]:
            continue
        assert command[1:3] == ["-m", "rftjax.main"]
        flags = [specs.locate(one) for one in command[3:]]
        assert not diagnose(flags)
        given = dict(flag.partition("=")[::2] for flag in flags)
        spec = given["--config"]
        steps |= {load_spec(spec).steps, load_spec(f"{spec}:debug").steps}
        if "--config.steps" in given:
            steps = {int(given["--config.steps"])}
    told = {int(n) for n in re.findall(r"(\d+)\s+steps", "\n".join(cells(path, "markdown")))}
    assert told and told <= steps


@pytest.mark.skipif(not SLOW, reason=WHY)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path, tmp_path, monkeypatch):
    def short(command: list[str]) -> None:
        names = {f"--config={name}": f"--config={name}:debug" for name in ("rft", "quickstart")}
        long = ("--config.steps=", "--config.eval.")
        kept = [names.get(one, one) for one in command if not one.startswith(long)]
        subprocess.run(kept, check=True)

    assert Path(configs.embedded_model()).exists(), "scripts/fetch_model.py fetches the model"
    for cell, names in trained(path, tmp_path, monkeypatch, short):
        run_cell(cell, names, lambda command: None)
