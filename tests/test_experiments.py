import re
from pathlib import Path

import pytest

from rftjax import config as config_lib
from rftjax import grpo
from rftjax.config.fields import flatten
from rftjax.config.flags import load_spec
from rftjax.evaluators import json_record
from rftjax.types import Task, Trajectory
from rftjax.workers.user_code import load_function

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "experiments" / "reference.md"
SPECS = sorted(
    path.name
    for path in (ROOT / "experiments").glob("*.py")
    if "def get_config(" in path.read_text()
)
# What a preset's objective does not read; the KL's kind is not read where its weight is 0.
UNREAD = {"cispo": {"clip_low"}, "reinforce": {"clip_low", "clip_high", "ratio"}}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The folder that specs are run from, with the embedded model in its place."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("RFTJAX_CACHE", str(tmp_path))
    Path(config_lib.embedded_model()).touch()


def tables(text):
    """The rows of all Markdown tables as lists of cells, without heads and rules."""
    rows = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if line.startswith("|") and not line.startswith("|--") and not following.startswith("|--"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def section(title):
    """The text under a heading of the reference, up to the next of its level."""
    return re.split(r"^## ", REFERENCE.read_text().partition(f"\n## {title}\n")[2], flags=re.M)[0]


@pytest.mark.parametrize("form", ["", ":debug"])
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_and_its_short_form_pass_the_check(name, form):
    config = load_spec(f"experiments/{name}{form}")
    if name == "rft.py":  # the general one asks for these by flags
        config.model.path, config.tasks.train = "owner/model", "owner/dataset"
        config.evaluator = "package.module:evaluate"
    config_lib.check(config)
    assert config.steps <= 2 or not form
    with pytest.raises(ValueError, match="argument 'fast': must be empty or debug"):
        load_spec(f"experiments/{name}:fast")


@pytest.mark.parametrize("form", ["", ":debug"])
def test_the_control_is_the_quickstart_with_random_rewards_and_true_evaluations(form):
    control = flatten(load_spec(f"experiments/control.py{form}"))
    quickstart = flatten(load_spec(f"experiments/quickstart.py{form}"))
    different = {field for field in control if control[field] != quickstart[field]}
    assert different == {"evaluator", "eval.evaluator", "export"}
    assert control["eval.evaluator"] == quickstart["evaluator"]
    assert load_function(control["eval.evaluator"]) is json_record.evaluate
    coin = load_function(control["evaluator"])
    task = Task("t", [], {"record": {"a": 1}})
    tosses = [
        coin(task, Trajectory(task, draw, sample, [{"role": "assistant", "content": text}]))
        for draw in range(50)
        for sample in range(8)
        for text in ('{"a": 1}', "wrong")
    ]
    for some in (tosses[::2], tosses[1::2]):  # right and wrong answers alike
        assert set(some) == {0.0, 1.0} and abs(sum(some) / len(some) - 0.5) < 0.08


def test_the_reference_has_every_field_with_its_default():
    documented = {
        cells[0].strip("`"): cells[1].strip("`")
        for cells in tables(section("Fields"))
        if cells[0].startswith("`")
    }
    defaults = {
        field: "preset" if value is None else repr(value)
        for field, value in flatten(config_lib.base_config()).items()
    }
    assert documented == defaults
    assert all(
        len(cells) == 4 and cells[2] for cells in tables(section("Fields"))
    )  # a bar within a cell would hide what follows


def test_the_reference_has_every_preset_with_its_settings():
    text = section("Presets")
    columns = re.search(r"^\| preset \| (.*) \|$", text, re.M)[1].split(" | ")
    rows = {cells[0].strip("`"): cells[1:] for cells in tables(text)}
    assert set(rows) == set(grpo.PRESETS)
    assert set().union(*grpo.PRESETS.values()) <= set(columns)
    for preset, cells in rows.items():
        fields = grpo.preset_fields(preset)
        unread = UNREAD.get(fields["objective"], set()) | (
            {"kl"} if not fields["kl_weight"] else set()
        )
        wanted = ["-" if name in unread else str(fields[name]) for name in columns]
        assert cells == wanted, preset


def test_the_reference_names_no_metric_that_nothing_records():
    code = "\n".join(path.read_text() for path in (ROOT / "rftjax").rglob("*.py"))
    names = re.findall(
        r"^\| `(.+?)` \|", REFERENCE.read_text().partition("\n## Metrics\n")[2], re.M
    )
    assert len(names) > 50
    for name in names:
        *_, last = (part for part in name.split("/") if part not in ("NAME", "FIELD"))
        assert re.sub("_s$|_K$|_stderr$", "", last) in code, name


def test_the_guide_has_every_spec():
    text = (ROOT / "experiments" / "README.md").read_text()
    assert [name for name in SPECS if f"| `{name}` |" not in text] == []
    assert "(experiments/reference.md)" in (ROOT / "README.md").read_text()
