"""What README shows can be pasted: its commands and files are whole, and run on the bundled model."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import SLOW, WHY, blocks

from rftjax import config as configs
from rftjax.config import specs
from rftjax.config.flags import diagnose
from rftjax.monitor import alarms
from rftjax.run.build import complete_config
from rftjax.types import Task, Trajectory
from rftjax.workers.user_code import load_function

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHELLS = [shell for shell in ("bash", "zsh") if shutil.which(shell)]


def pasted() -> list[str]:
    """The blocks that a user pastes one after the other to train on their own tasks."""
    kept = ("cat > tasks.jsonl", "sums() {")
    return [block for block in blocks(README, "bash") if any(text in block for text in kept)]


def commands() -> list[list[str]]:
    """Every call of rftjax with a spec, split as both shells split it, without what a function's caller adds."""
    text = "\n".join(blocks(README, "bash")).replace("\\\n", " ")
    found = re.findall(r"^\s*rftjax (--config.*)$", text, re.M)
    return [[one for one in shlex.split(line) if one != "$@"] for line in found]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_block_is_one_of_the_shell(shell):
    for block in blocks(README, "bash"):
        subprocess.run([shell, "-n"], input=block, text=True, check=True)
        # zsh takes [ ] for a pattern of files, and splits no variables.
        assert not re.search(r"""(?<!['"])\.?\[\w+\](?!['"])|\s\$\w+(\s|$)""", block)


def test_python_blocks_parse_and_no_block_is_left_indented():
    for block in blocks(README, "python"):
        ast.parse(block)
    prose = re.sub(r"^```.*?^```$", "", README.read_text(), flags=re.M | re.S)
    assert not re.findall(r"^    (?:python|rftjax|tensorboard|\./|import|def) .*", prose, re.M)


def test_every_command_names_a_spec_and_fields_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(commands()) >= 3
    for command in commands():
        flags = [specs.locate(one) for one in command]
        assert "--config=/" in flags[0], command
        assert not diagnose(flags), command


def test_the_files_that_are_pasted_make_a_sound_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash"], input=pasted()[0], text=True, check=True)
    assert len((tmp_path / "tasks.jsonl").read_text().splitlines()) > 4
    evaluate = load_function(f"{tmp_path}/reward.py:evaluate")
    task = Task("t", [], {"answer": "42"})
    for said, reward in (("It is 42.", 1.0), ("1420", 0.0), ("42, or 43", 0.0), ("", 0.0)):
        found = evaluate(task, Trajectory(task, 0, 0, [{"role": "assistant", "content": said}]))
        assert found == reward, said
    (command,) = [one for one in commands() if "--config=rft" in one]
    config = configs.base_config()
    given = [one.removeprefix("--config.") for one in command if one.startswith("--config.")]
    fields = dict(one.split("=", 1) for one in given)
    with config.unlocked():
        for field, value in fields.items():
            wanted = type(configs.flatten(config)[field])
            section, _, name = field.rpartition(".")
            (config[section] if section else config)[name] = wanted(value)
    config.model.path = "owner/model"  # in place of what the shell would fill in
    complete_config(config)


@pytest.mark.skipif(not SLOW, reason=WHY)
@pytest.mark.parametrize("shell", SHELLS)
def test_the_blocks_run_as_they_stand(shell, tmp_path):
    """The general spec's short form, as its own would take a CPU long."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "rftjax"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rftjax.cli "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    for block in pasted():
        short = block.replace("--config=rft ", "--config=rft:debug ").replace("steps=20", "steps=1")
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        subprocess.run([shell, "-e"], input=short, text=True, check=True, cwd=tmp_path, env=environment)  # fmt: skip
    assert (tmp_path / "runs" / "sums" / "export" / "model.safetensors").exists()


def test_the_guide_names_fields_and_alarms_that_there_are():
    text = (ROOT / "experiments" / "README.md").read_text()
    known = configs.flatten(configs.base_config())
    sections = {field.partition(".")[0] for field in known if "." in field}
    named = set(re.findall(r"`(?:--config\.)?([a-z]+\.[a-z_]+)(?:=[^`]*)?`", text))
    assert {one for one in named if one.partition(".")[0] in sections} <= set(known)
    table = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert sorted(table) == sorted(alarms.NAMES)
    for block in blocks(ROOT / "experiments" / "README.md", "python"):
        ast.parse(block)
