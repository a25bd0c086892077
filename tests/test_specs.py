import os
import sys
import tomllib
from pathlib import Path

import pytest
from absl import flags

from rftjax.config import specs
from rftjax.config.flags import load_spec, parse_flags

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_every_folder_of_the_package_and_the_specs():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "rftjax").rglob("*.py")}
    named = {folder.replace(os.sep, ".") for folder in folders}
    assert {*setup["packages"]} == named | {specs.PACKAGE}
    assert setup["package-dir"][specs.PACKAGE] == "experiments"


def test_a_spec_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = specs.locate("--config=quickstart:debug").partition("=")[2]
    assert path == f"{ROOT}/experiments/quickstart.py:debug"
    for name in specs.names():
        config = load_spec(f"{ROOT}/experiments/{name}.py:debug")
        for field in (config.tasks.train, config.environment):
            file = field.partition(":")[0]
            assert not file or Path(file).is_file()
    for other in ("--config=own.py", "--config=no_such", "--workdir=quickstart", "quickstart"):
        assert specs.locate(other) == other


def test_the_specs_of_a_checkout_are_found_where_the_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(specs, "PACKAGE", "no_such_package")
    assert specs.folder() == ROOT / "experiments"


def test_specs_in_a_wheel_are_found_under_their_own_name(tmp_path, monkeypatch):
    (tmp_path / specs.PACKAGE).mkdir()
    (tmp_path / specs.PACKAGE / "one.py").write_text("def get_config(): ...")
    (tmp_path / specs.PACKAGE / "two.py").write_text("def rows(): ...")
    monkeypatch.setattr(specs, "__file__", str(tmp_path / "rftjax" / "config" / "specs.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert specs.folder() == tmp_path / specs.PACKAGE and specs.names() == ["one"]


def test_a_file_without_get_config_is_told_what_it_lacks(tmp_path):
    (tmp_path / "rows.py").write_text("ROWS = []")
    with pytest.raises(ValueError, match=r"rows.py: must define get_config\(arg=''\)"):
        load_spec(f"{tmp_path / 'rows.py'}")


def test_a_name_may_stand_in_an_argument_of_its_own(monkeypatch):
    parsed = []
    monkeypatch.setattr(flags, "FLAGS", lambda argv: parsed.append(argv))
    parse_flags(["rftjax", "--config", "quickstart:debug", "--workdir", "runs/x"])
    assert parsed == [
        [
            "rftjax",
            f"--config={ROOT / 'experiments' / 'quickstart.py'}:debug",
            "--workdir",
            "runs/x",
        ]
    ]


@pytest.mark.parametrize("value, told", [
    ("quikstart", "did you mean quickstart?"),
    ("job", "and the names are agent, "),
    ("experiments/quickstart.py", "--config=quickstart is the one in "),
])  # fmt: skip
def test_a_spec_that_is_not_there_is_told_by_the_name_that_works(
    value, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse_flags(["rftjax", f"--config={value}"])
    assert told in capsys.readouterr().err


def test_a_spec_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_the_spec.py").write_text("STEPS = 7")
    (tmp_path / "spec.py").write_text(
        "from beside_the_spec import STEPS\nfrom rftjax.config import base_config\n"
        "def get_config():\n    config = base_config()\n    config.steps = STEPS\n    return config\n"
    )
    assert load_spec(str(tmp_path / "spec.py")).steps == 7
