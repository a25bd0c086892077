import subprocess
import sys
from importlib import metadata

import pytest
from absl import app

from rftjax import cli


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rftjax", *arguments])
    cli.run()


def test_without_arguments_the_command_says_what_it_takes(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert "rftjax compare RUN" in text and "quickstart" in text


@pytest.mark.parametrize("asked", ["help", "-h", "--help"])
def test_who_asks_for_help_gets_it(monkeypatch, capsys, asked):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, asked)
    assert end.value.code == 0
    assert "usage: rftjax --config=SPEC" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out.startswith(f"rftjax {metadata.version('rftjax')}, jax ")


def test_a_model_or_a_run_is_enough_to_serve_and_to_talk(monkeypatch, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    started = []
    monkeypatch.setattr(app, "run", lambda main, flags_parser: started.append([*sys.argv]))
    run(monkeypatch, "chat", str(tmp_path), "--step=3")
    run(monkeypatch, "serve", "some/model", "--config.serving.port=0")
    run(monkeypatch, "serve", f"--workdir={tmp_path}")
    assert started == [
        ["rftjax", "--mode=chat", f"--workdir={tmp_path}", "--step=3"],
        ["rftjax", "--mode=serve", "--config.model.path=some/model", "--config.serving.port=0"],
        ["rftjax", "--mode=serve", f"--workdir={tmp_path}"],
    ]
    with pytest.raises(SystemExit, match="give a model, or the workdir of a run"):
        run(monkeypatch, "serve")


def test_other_commands_go_by_their_name(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "compare", str(tmp_path))
    assert end.value.code == 1
    assert "has no file metrics.jsonl" in capsys.readouterr().err


def test_a_command_that_is_not_there_is_told_what_there_is(monkeypatch):
    with pytest.raises(SystemExit, match="rftjax train: no such command; .*--config=SPEC"):
        run(monkeypatch, "train", "--config=rft")


def test_flags_of_the_plan_are_refused_elsewhere(tmp_path):
    command = [
        sys.executable,
        "-m",
        "rftjax.main",
        "--config=rft",
        f"--workdir={tmp_path}",
        "--price=2",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "error: --price=2.0: is what --mode=plan plans with; leave it out" in ended.stderr
