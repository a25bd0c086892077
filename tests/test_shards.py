"""Which files of a directory hold the weights, and what is said where none do."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rftjax.weights import hf

SOURCE = Path(__file__).parent / "data" / "reference" / "llama_linear"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(SOURCE, tmp_path / "copy"))


def split(directory: Path, count: int = 2, indexed: bool = True, change: float = 0.0) -> list[Path]:
    """Writes the tensors, `change` added, as numbered files."""
    tensors = load_file(directory / "model.safetensors")
    names, places, files = sorted(tensors), {}, []
    for number in range(count):
        file = directory / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {
            name: tensors[name] + np.asarray(change, tensors[name].dtype)
            for name in names[number::count]
        }
        save_file(part, file)
        places |= dict.fromkeys(part, file.name)
        files.append(file)
    if indexed:
        (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return files


def embedding(directory: Path) -> np.ndarray:
    return np.asarray(hf.load(directory)[1]["embed"]["embedding"])


def test_one_whole_file_goes_before_an_index_of_other_weights_and_that_is_said(copy: Path, caplog):
    expected = embedding(copy)
    split(copy, change=1.0)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(embedding(copy), expected)
    assert f"{INDEX} beside it is not" in caplog.text


@pytest.mark.parametrize("indexed", [True, False])
def test_numbered_files_are_read_with_and_without_an_index(copy: Path, indexed: bool):
    expected = embedding(copy)
    split(copy, 3, indexed)
    (copy / "model.safetensors").unlink()
    np.testing.assert_array_equal(embedding(copy), expected)


def test_an_index_beside_one_whole_file_may_name_files_that_are_gone(copy: Path):
    expected = embedding(copy)
    for file in split(copy):
        file.unlink()
    np.testing.assert_array_equal(embedding(copy), expected)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_numbered_file_that_is_missing_is_asked_for(copy: Path, indexed: bool):
    split(copy, 3, indexed)[1].unlink()
    (copy / "model.safetensors").unlink()
    words = "model-00002-of-00003" if indexed else "not one whole set"
    with pytest.raises(ValueError, match=rf"model\.path=.*{words}"):
        hf.load(copy)


def test_a_tensor_that_is_not_where_the_index_says_is_named(copy: Path):
    split(copy)
    (copy / "model.safetensors").unlink()
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"puts model\.extra\.weight into .*00001-of-00002"):
        hf.load(copy)


def test_a_tensor_in_two_files_without_an_index_is_refused(copy: Path):
    first, second = split(copy, indexed=False)
    save_file(load_file(second) | load_file(first), second)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is in two of the 2 files, and there is no .*index"):
        hf.load(copy)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "reads safetensors and not pytorch_model.bin.*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "reads safetensors and not pytorch_model-00001"),
        ("model-q4.gguf", "give its own path, model.path=.*model-q4.gguf"),
        ("consolidated.safetensors", "there is consolidated.safetensors.*rename it"),
    ],
)
def test_a_directory_without_weights_that_are_read_names_those_that_are_there(copy, file, words):
    (copy / "model.safetensors").rename(copy / file)
    with pytest.raises(ValueError, match=f"model.safetensors is missing; .*{words}"):
        hf.load(copy)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git LFS pointer.*lfs pull"),
        ("<!DOCTYPE html><html>", "is a web page.*download it again"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "m.gguf"])
def test_a_file_that_stands_in_place_of_another_is_recognised(copy: Path, file, start, words):
    (copy / file).write_text(start)
    with pytest.raises(ValueError, match=f"model.path=.*{file}: .*{words}"):
        hf.load(copy / file if file.endswith("gguf") else copy)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
def test_a_tensor_of_a_dtype_that_is_not_read_is_named_before_any_is_read(copy: Path, kind: str):
    tensors = load_file(copy / "model.safetensors")
    header, data, at = {}, b"", 0
    for name, tensor in tensors.items():
        code, array = {2: "BF16", 4: "F32"}[tensor.itemsize], tensor
        if name == "model.norm.weight":
            code = {
                "float8_e4m3fn": "F8_E4M3",
                "float8_e5m2": "F8_E5M2",
                "int8": "I8",
                "uint8": "U8",
            }[kind]
            array = np.zeros(tensor.shape, np.uint8)
        header[name] = {
            "dtype": code,
            "shape": array.shape,
            "data_offsets": [at, at + array.nbytes],
        }
        data, at = data + array.tobytes(), at + array.nbytes
    text = json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight is stored as .*8.*before quantisation"
    ):
        hf.load(copy)  # fmt: skip


def test_a_path_that_is_no_model_says_what_it_is(copy: Path, tmp_path: Path):
    (copy / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no config\.json .*give the directory"):
        hf.load(copy / "generation_config.json")
    for file in ("model.safetensors", INDEX):
        (copy / file).touch()
        with pytest.raises(ValueError, match="is one file of a model; give the directory"):
            hf.load(copy / file)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    with pytest.raises(
        ValueError, match=r"is a LoRA adapter .*model\.path \(a/base\).* lora\.path"
    ):
        hf.load(adapter)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m-f16.gguf").touch()
    with pytest.raises(ValueError, match=r"give its own path, model\.path=.*m-f16\.gguf"):
        hf.load(folder)
    with pytest.raises(ValueError, match=r"there is one in .*copy: give that directory"):
        hf.load(tmp_path)


def test_a_tied_model_may_hold_its_one_tensor_under_the_heads_name(copy: Path):
    expected = embedding(copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, copy / "model.safetensors")
    np.testing.assert_array_equal(embedding(copy), expected)


def test_a_head_that_is_missing_says_what_to_write_if_it_is_tied(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    for value in (False, None):
        config["tie_word_embeddings"] = value
        (copy / "config.json").write_text(
            json.dumps({name: field for name, field in config.items() if field is not None})
        )
        with pytest.raises(ValueError, match='lm_head.*"tie_word_embeddings": true'):
            hf.load(copy)


def test_a_byte_order_mark_before_the_config_is_no_fault(copy: Path):
    path = copy / "config.json"
    expected = embedding(copy)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    np.testing.assert_array_equal(embedding(copy), expected)
    path.write_text(path.read_text(encoding="utf-8-sig"), encoding="utf-16")
    with pytest.raises(ValueError, match="not readable as JSON in UTF-8"):
        hf.load(copy)
