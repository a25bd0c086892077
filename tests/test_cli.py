import sys

import pytest

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


def test_other_commands_go_by_their_name(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "compare", str(tmp_path))
    assert end.value.code == 1
    assert "has no file metrics.jsonl" in capsys.readouterr().err
