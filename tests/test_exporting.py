"""An export takes the place of nothing but an export."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import rftjax
from rftjax.errors import NotFinite, UserError
from rftjax.weights import exporting, hf, lora

TINY = Path(__file__).parent / "data" / "tiny"


@pytest.fixture(scope="module")
def model():
    return rftjax.load(str(TINY))


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def exports(model, out):
    adapters = lora.init(model.config, rank=2)
    yield lambda: model.export(out)
    yield lambda: lora.save_peft(out, model.config, adapters, alpha=8.0)


def test_a_folder_with_files_of_others_is_refused_and_stays_as_it_is(model, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "3").mkdir(parents=True)
    (run / "checkpoints" / "3" / "data").write_text("weights")
    (run / "config.json").write_text("{}")
    before = files(run)
    for export in exports(model, run):
        with pytest.raises(
            UserError, match="holds checkpoints, config.json, which no export wrote"
        ):
            export()
        assert files(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_that_holds_files_of_its_user_is_refused(model, tmp_path):
    for index, export in enumerate([*exports(model, tmp_path / "out")]):
        if index == 0:
            export()
        (tmp_path / "out" / "README.md").write_text("my model")
        with pytest.raises(UserError, match="holds README.md, which no export wrote"):
            export()
        assert (tmp_path / "out" / "README.md").read_text() == "my model"


def test_a_folder_of_the_same_file_names_that_no_export_wrote_is_refused(model, tmp_path):
    out = tmp_path / "downloaded"
    model.export(out)
    (out / exporting.MARKER).unlink()
    with pytest.raises(UserError, match="config.json, generation_config.json"):
        model.export(out)


def test_a_folder_that_replaced_a_file_of_an_export_is_not_deleted(model, tmp_path):
    out = model.export(tmp_path / "out")
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    (out / "config.json" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds config.json, which no export wrote"):
        model.export(out)


def test_an_empty_folder_and_an_export_are_replaced(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for export in exports(model, out):
        export()
        assert set(json.loads((out / exporting.MARKER).read_text())["files"]) == {
            path.name for path in out.iterdir()
        } - {exporting.MARKER}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_no_place_for_an_export_and_a_link_leads_to_one(model, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file, an export is a folder"):
        model.export(tmp_path / "file")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        model.export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()


def test_files_have_the_permissions_of_the_umask(model, tmp_path):
    for umask, file, folder in [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]:
        before = os.umask(umask)
        try:
            out = model.export(tmp_path / f"out{umask}")
        finally:
            os.umask(before)
        assert out.stat().st_mode & 0o777 == folder
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {file}


def test_what_an_export_says_of_itself_is_read_back(model, tmp_path):
    facts = {"run": "runs/a", "step": 7}
    out = hf.save(tmp_path / "out", model.config, model.params, model.fields, facts=facts)
    assert exporting.facts_of(out).items() >= facts.items()
    assert exporting.facts_of(tmp_path) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_exported(model, tmp_path, value):
    params = jax.tree.map(np.array, model.params)
    params["layers"]["mlp"]["down"]["kernel"][1, 0, 0] = value
    with pytest.raises(NotFinite, match="model.layers.1.mlp.down_proj.weight"):
        hf.save(tmp_path / "out", model.config, params, model.fields)
    adapters = jax.tree.map(np.array, lora.init(model.config, rank=2))
    adapters["layers"]["mlp"]["down"]["b"][1, 0, 0] = value
    with pytest.raises(NotFinite, match="layers.1.mlp.down_proj.lora_B"):
        lora.save_peft(tmp_path / "out", model.config, adapters, alpha=8.0)
    assert not [*tmp_path.iterdir()]
