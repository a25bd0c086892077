"""Finds a model's directory, reads its JSON files, and detects files that are not what their names say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from rftjax.errors import UserError

PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
]  # files to download from a hub repository
SPLIT_GGUF = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# First bytes of files that are not what their names say.
LFS_POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype", b"<html")


def locate(path: str | os.PathLike[str]) -> Path:
    """Returns the local file or directory of a path or hub name; downloads the latter if necessary."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = str(path)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model.path={name}: no such directory or file, and not a hub name (OWNER/NAME)"
        )
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # no network, no such name, no permission: each has its own class
        raise UserError(
            f"model.path={name}: no such directory, and the hub did not serve it"
            f" ({type(error).__name__}: {error}); give a local directory or a .gguf file"
        ) from error
    if not any((found / file).exists() for file in ("config.json", "adapter_config.json")):
        raise UserError(
            f"model.path={name}: this hub repository has no config.json; if it holds .gguf files, download one"
            " (hf download OWNER/NAME FILE.gguf) and give its path, else give the repository that it was made from"
        )
    return found


def config_file(path: Path) -> Path:
    """Returns the config.json that `path` is or holds; raises a UserError that says what the path is instead."""
    if path.is_dir():
        config = path / "config.json"
        if not config.exists():
            raise UserError(f"model.path={path}: {_instead_of_config(path)}")
        return config
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            raise UserError(
                f"model.path={path}: is a GGUF file; rename it so that its name ends in .gguf"
            )
    if path.suffix != ".json" or path.name.endswith(".index.json"):
        raise UserError(
            f"model.path={path}: is one file of a model; give the directory that holds it and its config.json"
            f" ({path.parent}), or a .gguf file"
        )
    return path


def _instead_of_config(directory: Path) -> str:
    adapter = directory / "adapter_config.json"
    if adapter.exists():
        base = (
            read_json(adapter).get("base_model_name_or_path") or "the model that it was trained on"
        )
        return (
            "is a LoRA adapter (adapter_config.json) and no model: give its base as model.path"
            f" ({base}) and this directory as lora.path"
        )
    files = sorted(file.name for file in directory.glob("*.gguf"))
    if files:
        return (
            f"config.json is missing, but there is a GGUF file: give its own path,"
            f" model.path={directory / files[0]}"
        )
    inner = sorted(file.parent for file in directory.glob("*/config.json"))
    if inner:
        return f"config.json is missing; there is one in {inner[0]}: give that directory"
    return "config.json is missing; give the directory of a Hugging Face model, a .gguf file or a hub name"


def check_content(path: Path, field: str = "model.path") -> None:
    """Raises UserError where a file's first bytes are those of a Git LFS pointer or of a web page."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(LFS_POINTER):
        raise UserError(
            f"{field}={path}: a Git LFS pointer stands in place of the file; run `git lfs pull` in"
            f" {path.parent}, or download it again (hf download)"
        )
    if start.startswith(PAGES):
        raise UserError(
            f"{field}={path}: is a web page and not the file; download it again (hf download)"
        )


def check_split(path: Path) -> None:
    """Raises UserError for one part of a split GGUF file."""
    split = SPLIT_GGUF.search(path.name)
    if split and int(split[2]) > 1:
        whole = SPLIT_GGUF.sub(".gguf", path.name)
        raise UserError(
            f"model.path={path}: is part {int(split[1])} of {int(split[2])} of a split GGUF file, rftjax reads whole"
            f" ones; join the parts with llama.cpp: llama-gguf-split --merge FIRST_PART {whole}"
        )


def read_json(path: Path, field: str = "model.path") -> dict[str, Any]:
    """Returns the object in a JSON file, with or without a byte order mark; raises UserError for anything else."""
    try:
        check_content(path, field)
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{field}={path.parent}: {path.name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{field}={path}: not readable as JSON in UTF-8 ({error}); download it again or mend it"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{field}={path}: must hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an indented JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
