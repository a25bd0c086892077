"""Finds the safetensors files that hold a directory's weights, and reads their tensors."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rftjax.errors import UserError
from rftjax.weights.directories import check_content, read_json

log = logging.getLogger(__name__)

Readers = dict[str, Callable[[], np.ndarray]]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
FP8 = "F8_E4M3"
BYTES = "U8"
READ = ("F32", "F16", "BF16", FP8, BYTES)
# How names of the language model begin in a model that also sees, and alone; and those of its other parts.
TEXT = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
OTHER_TOWERS = (
    *("model.vision_tower.", "model.visual.", "model.multi_modal_projector."),
    *("vision_tower.", "visual.", "multi_modal_projector."),
)
OTHERS = ("*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.ckpt")  # weights in other formats


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of an open safetensors file; a call reads it."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    file: Any

    def __call__(self) -> np.ndarray:
        return self._bytes() if self.kind == FP8 else self.file.get_tensor(self.name)

    def part(self, index: int) -> np.ndarray:
        """Reads one entry of the first axis."""
        if self.kind == FP8:
            return self._bytes(index, index + 1)[0]
        return self.file.get_slice(self.name)[index]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads some entries of the first axis."""
        if self.kind == FP8:
            return self._bytes(start, stop)
        return self.file.get_slice(self.name)[start:stop]

    def _bytes(self, start: int = 0, stop: int = -1) -> np.ndarray:
        """Reads a tensor of a type that NumPy does not name, whole or some entries of its first axis."""
        stop = self.shape[0] if stop < 0 else stop
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            first = 8 + length + json.loads(file.read(length))[self.name]["data_offsets"][0]
            size = math.prod(self.shape[1:])
            file.seek(first + start * size)
            data = file.read((stop - start) * size)
            return np.frombuffer(data, jnp.float8_e4m3fn).reshape(stop - start, *self.shape[1:])


def open_directory(directory: Path) -> Readers:
    """Returns readers of every tensor by name.

    As in transformers, a whole file has priority over an index, and an index over files that it does not name. If two
    files of an index hold a tensor, the last file counts.
    """
    index = directory / INDEX
    if (directory / WHOLE).exists():
        if index.exists():
            log.warning("%s: %s is read, %s beside it is not", directory, WHOLE, INDEX)
        return open_file(directory / WHOLE)
    if index.exists():
        return _indexed(directory, index)
    files = _numbered(directory)
    readers: Readers = {}
    for file in files:
        found = open_file(file)
        twice = sorted(set(found) & set(readers))
        if twice:
            raise UserError(
                f"model.path={directory}: {twice[0]} is in two of the {len(files)} files, and there is no {INDEX} that"
                " says which one counts; download the model again"
            )
        readers |= found
    return readers


def text_tensors(readers: Readers) -> Readers:
    """Returns the language model's tensors of a model that also sees, under the names that it has alone, which
    Qwen2.5-VL's have from the start."""
    found: Readers = {}
    for name, read in readers.items():
        prefix = next((prefix for prefix in TEXT if name.startswith(prefix)), None)
        if prefix is not None:
            found[TEXT[prefix] + name.removeprefix(prefix)] = read
        elif not name.startswith(OTHER_TOWERS):
            found[name] = read
    return found


def _indexed(directory: Path, index: Path) -> Readers:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"model.path={index}: has no weight_map from tensors to files")
    files = sorted(set(map(str, places.values())))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise UserError(
            f"model.path={directory}: {INDEX} names {len(files)} files, {len(missing)} of them are missing"
            f" ({missing[0]}); download them too, or remove the index if it belongs to other weights"
        )
    readers: Readers = {}
    for file in files:
        readers |= open_file(directory / file)
    lost = sorted(set(places) - set(readers))
    if lost:
        raise UserError(
            f"model.path={directory}: {INDEX} puts {lost[0]} into {places[lost[0]]}, which does not hold it; download"
            " the model again"
        )
    return readers


def _numbered(directory: Path) -> list[Path]:
    """Returns the files model-00001-of-0000N.safetensors, all N of them."""
    found = {path: SHARD.match(path.name) for path in sorted(directory.glob("*.safetensors"))}
    shards = {path: match for path, match in found.items() if match and match["stem"] == "model"}
    counts = {int(match["count"]) for match in shards.values()}
    if not shards:
        raise UserError(f"model.path={directory}: {WHOLE} is missing; {_instead(directory)}")
    numbers = [int(match["number"]) for match in shards.values()]
    if len(counts) > 1 or sorted(numbers) != list(range(1, max(counts) + 1)):
        raise UserError(
            f"model.path={directory}: there is neither {WHOLE} nor {INDEX}, and the numbered files are not one whole"
            f" set ({', '.join(path.name for path in shards)}); download the others and the index"
        )
    return list(shards)


def _instead(directory: Path) -> str:
    others = sorted(file.name for pattern in OTHERS for file in directory.glob(pattern))
    if others:
        return (
            f"rftjax reads safetensors and not {others[0]}: load the model with transformers and write it again"
            " with save_pretrained"
        )
    files = sorted(file.name for file in directory.glob("*.gguf"))
    if files:
        return f"there is {files[0]}: give its own path, model.path={directory / files[0]}"
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    if files:
        return (
            f"there is {files[0]}, a name that no {INDEX} explains: if it holds the whole model in Hugging Face's"
            f" names, rename it to {WHOLE}"
        )
    return 'download the weights, or say model.init="random" to start from none'


def open_file(path: Path, field: str = "model.path") -> Readers:
    """Returns readers of one file's tensors; raises UserError for a damaged file and an unsupported dtype."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{field}={path.parent}: {path.name} is missing; download it too")
    check_content(path, field)
    try:
        file = safe_open(path, "numpy")
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{field}={path}: not a whole safetensors file ({error}); download it again"
        ) from error
    found = {
        name: Stored(path, name, one.get_dtype(), tuple(one.get_shape()), file)
        for name, one in slices.items()
    }
    for name, one in found.items():
        if one.kind not in READ:
            raise UserError(
                f"{field}={path}: tensor {name} is stored as {one.kind}; rftjax reads {', '.join(READ)}: use the"
                " checkpoint before quantisation, or load it with transformers and save it in bfloat16"
            )
    return dict(found)


def read_safetensors(path: Path, field: str = "model.path") -> dict[str, np.ndarray]:
    """Returns all tensors of one file; raises UserError for a missing or damaged file."""
    return {name: read() for name, read in open_file(path, field).items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file of contiguous tensors."""
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})
