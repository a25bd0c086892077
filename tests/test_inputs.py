import os
import shutil
import sys

import pytest

from rftjax.run import inputs
from rftjax.run.inputs import SELF, of_adapters, of_callable, of_model


@pytest.fixture
def reward(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "reward", raising=False)  # of a test before
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "reward.py").write_text("import math\n\ndef evaluate(t, x):\n    import judge\n")
    (folder / "judge.py").write_text("from parts import words\n")
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("from . import words\n")
    (folder / "parts" / "words.py").write_text("x = 1\n")
    (folder / "unrelated.py").write_text("x = 1\n")
    return folder / "reward.py"


def test_the_source_of_a_file_is_its_own_and_that_of_the_files_beside_it_that_it_imports(reward):
    found = of_callable(f"{reward}:evaluate")
    assert set(found) == {"name", SELF, "judge.py", "parts/__init__.py", "parts/words.py"}
    (reward.parent / "parts" / "words.py").write_text("x = 2\n")
    changed = of_callable(f"{reward}:evaluate")
    assert {part for part in found if found[part] != changed[part]} == {"parts/words.py"}
    assert of_callable(f"{reward}:strict")["name"] != found["name"]


def test_moved_source_has_the_same_fingerprint_as_file_and_as_module(reward, tmp_path, monkeypatch):
    before = of_callable(f"{reward}:evaluate")
    shutil.move(reward.parent, tmp_path / "second")
    assert of_callable(f"{tmp_path / 'second' / 'reward.py'}:evaluate") == before
    monkeypatch.syspath_prepend(tmp_path / "second")
    assert of_callable("reward:evaluate") == before


def test_a_module_of_a_package_brings_the_package_s_files_without_importing_them(
    tmp_path, monkeypatch
):
    package = tmp_path / "mine_for_inputs"
    (package / "rewards").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError\n")
    (package / "rewards" / "__init__.py").touch()
    (package / "rewards" / "first.py").write_text("from mine_for_inputs import words\nimport os\n")
    (package / "words.py").write_text("from .rewards import second\n")
    (package / "rewards" / "second.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = of_callable("mine_for_inputs.rewards.first:evaluate")
    assert {"words.py", "rewards/second.py", "__init__.py", SELF} <= set(found)


def test_a_ready_made_reward_depends_on_no_other_module_of_rftjax():
    assert set(of_callable("rftjax.evaluators.number:evaluate")) == {"name", SELF}


@pytest.mark.parametrize("spec", ["nowhere_to_be_found:f", "nowhere.to.be.found:f", "math:sqrt"])
def test_what_has_no_source_has_no_fingerprint(spec):
    assert of_callable(spec) == {}


def test_a_model_is_known_by_its_files_wherever_they_lie(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "copy")
    before = of_model(tiny_dir)
    assert "config.json" in before and "tokenizer.json" in before
    (tmp_path / "copy" / "README.md").write_text("new")
    assert of_model(tmp_path / "copy") == before
    weights = next((tmp_path / "copy").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = of_model(tmp_path / "copy")
    assert {part for part in before if found[part] != before[part]} == {weights.name}


def test_of_a_large_file_its_size_and_samples_of_its_bytes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(inputs, "_SAMPLE_BYTES", 10)
    path = tmp_path / "model.gguf"
    content = bytearray(os.urandom(5000))

    def digest():
        path.write_bytes(content)
        return of_model(path)

    before = digest()
    for place in (0, 5, 4999):
        content[place] ^= 1
        assert digest() != before, place
        content[place] ^= 1
    assert digest() == before
    content.append(0)
    assert digest() != before


def test_adapters_of_a_run_are_those_of_its_newest_checkpoint(tmp_path):
    for step in (2, 10):
        folder = tmp_path / "checkpoints" / str(step) / "trainable"
        folder.mkdir(parents=True)
        (folder / "data").write_text(f"step {step}")
    before = of_adapters(tmp_path)
    (tmp_path / "checkpoints" / "2" / "trainable" / "data").write_text("changed")
    assert of_adapters(tmp_path) == before
    (tmp_path / "checkpoints" / "10" / "trainable" / "data").write_text("changed")
    assert of_adapters(tmp_path) != before


def test_two_checkouts_of_this_package_are_told_apart_by_their_code(tmp_path):
    assert inputs.of_package() == inputs.of_package(inputs.PACKAGE)
    first, second = (
        shutil.copytree(inputs.PACKAGE / "devices", tmp_path / name) for name in ("a", "b")
    )
    (second / "notes.txt").write_text("no code")
    assert inputs.of_package(first) == inputs.of_package(second)
    with open(second / "memories.py", "a") as file:
        file.write("# another line\n")
    assert inputs.of_package(first) != inputs.of_package(second)
