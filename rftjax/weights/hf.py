"""Reads and writes Hugging Face checkpoints, both with the same name table of the model family."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from rftjax.errors import NotFinite, UserError
from rftjax.models import FAMILIES, decoder
from rftjax.models.config import Config
from rftjax.models.names import Name, layers_of, tensors_of
from rftjax.types import Params
from rftjax.weights import gguf, packed, shards, streaming
from rftjax.weights.directories import locate, read_json, write_json
from rftjax.weights.exporting import NO_FACTS, replacing
from rftjax.weights.model_config import exported_fields, read_config, read_fields
from rftjax.weights.shards import Readers, read_safetensors, write_safetensors

__all__ = [
    "Model",
    "abstract_params",
    "generation_fields",
    "load",
    "locate",
    "open_model",
    "read_config",
    "read_fields",
    "read_generation",
    "read_json",
    "read_safetensors",
    "save",
    "write_json",
    "write_safetensors",
]

# From a parameter's path and shape to its dtype, and where it lies (None: the default device).
Place = Callable[[tuple[str, ...], tuple[int, ...]], tuple[Any, Sharding | None]]
Leaves = Iterator[tuple[tuple[str, ...], np.ndarray | streaming.Large]]


class Model(NamedTuple):
    """An open model: its config, its Hugging Face config, and a reader of its float32 parameters.

    `read(place)` prefetches the next leaf, or the next block of a large one, while the last one goes to devices.
    """

    config: Config
    fields: dict[str, Any]
    read: Callable[[Place | None], Params]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    init: str = "pretrained",
    seed: int = 0,
    place: Place | None = None,
) -> tuple[Config, Params, dict[str, Any]]:
    """Returns config, float32 parameters and Hugging Face fields; see `open_model`."""
    model = open_model(path, dtype=dtype, init=init, seed=seed)
    return model.config, model.read(place), model.fields


def open_model(
    path: str | os.PathLike[str], *, dtype: str = "float32", init: str = "pretrained", seed: int = 0
) -> Model:
    """Opens a directory, hub name or GGUF file; raises UserError where its tensors do not match its config.

    The model computes in `dtype`. `init="random"` needs only a config.json.
    """
    fields = read_fields(path)
    config = read_config(fields, dtype)

    def random_leaves() -> Leaves:
        fresh = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(seed))
        return ((name.path, np.asarray(_leaf(fresh, name.path))) for name in _table(config))

    def stored_leaves() -> Leaves:
        leaves = ((name.path, _read_leaf(found, config, name, readers)) for name in _table(config))
        return streaming.prefetched(leaves)

    if init == "random":
        return Model(config, fields, functools.partial(_placed, random_leaves))
    if init != "pretrained":
        raise UserError(f"model.init={init!r}: must be 'pretrained' or 'random'")
    found = locate(path)
    if found.suffix == ".gguf" and found.is_file():
        readers = gguf.tensors(gguf.read(found), fields)
    else:
        readers = shards.open_directory(found if found.is_dir() else found.parent)
    readers = packed.dequantised(shards.text_tensors(readers), fields)
    readers = packed.unfused(packed.without_predictors(readers, config, fields), config)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tied and head in readers and embedding not in readers:
        readers[embedding] = readers.pop(head)  # one tensor under its other name
    if config.tied and head in readers:
        _check_tied(found, readers)
    expected = {hf for name in _table(config) for hf in tensors_of(config, name)}
    missing, extra = sorted(expected - set(readers)), sorted(set(readers) - expected)
    extra = [name for name in extra if not name.endswith(".rotary_emb.inv_freq")]
    if missing == ["lm_head.weight"]:
        raise UserError(
            f"model.path={found}: lm_head.weight is missing, and config.json says tie_word_embeddings="
            f"{fields.get('tie_word_embeddings', 'nothing, which is false')}; if this model's head is its embedding,"
            ' write "tie_word_embeddings": true there, else download the weights again'
        )
    if missing or extra:
        raise UserError(
            f"model.path={found}: the config asks for {len(expected)} tensors;"
            f" missing: {_few(missing)}; unknown: {_few(extra)}; use the config.json that belongs to these weights"
        )
    return Model(config, fields, functools.partial(_placed, stored_leaves))


def abstract_params(config: Config) -> Params:
    """Returns the abstract parameters of a model of this config, without shardings."""
    shapes = ((name.path, _shape(config, name)) for name in _table(config))
    return _tree((path, jax.ShapeDtypeStruct(shape, np.float32)) for path, shape in shapes)


def _placed(leaves: Callable[[], Leaves], place: Place | None) -> Params:
    where = place or (lambda _path, _shape: ("float32", None))
    return _tree((path, streaming.put(leaf, *where(path, leaf.shape))) for path, leaf in leaves())


def _table(config: Config) -> list[Name]:
    return FAMILIES[config.family].names(config)


def _shape(config: Config, name: Name) -> tuple[int, ...]:
    """Returns the shape of our leaf, which holds all layers."""
    return (len(layers_of(config, name)), *name.shape) if "{layer}" in name.hf else name.shape


def _hf_shape(name: Name) -> tuple[int, ...]:
    """Returns the shape in Hugging Face's layout: (outputs, inputs) for a kernel."""
    if not name.inputs:
        return name.shape if name.path[-1] == "embedding" else (int(np.prod(name.single)),)
    inputs, outputs = name.single[: name.inputs], name.single[name.inputs :]
    return int(np.prod(outputs)), int(np.prod(inputs))


def _read_leaf(
    found: Path, config: Config, name: Name, readers: Readers
) -> np.ndarray | streaming.Large:
    """Returns a leaf in float32, or a large one to be read in blocks."""
    shape = _shape(config, name)
    if streaming.is_large(shape):
        return streaming.Large(shape, functools.partial(_blocks, found, config, name, readers))
    leaf = np.empty(shape, np.float32)
    parts = leaf.reshape(-1, *name.single)
    for index, hf in enumerate(tensors_of(config, name)):
        tensor = readers[hf]()
        _check_shape(found, hf, tensor.shape, name)
        parts[index] = (tensor.T if name.inputs else tensor).reshape(name.single)
    return leaf


def _blocks(found: Path, config: Config, name: Name, readers: Readers) -> Iterator[streaming.Block]:
    """Yields the blocks of a leaf, each some rows of one tensor in the dtype in which it is stored.

    A tensor that is not stored by rows is read whole, once, with the first block that is wanted of it.
    """
    axis = name.inputs  # of ours that the rows of Hugging Face's matrices belong to
    entries = name.single[axis]
    inner = _hf_shape(name)[0] // entries
    stacked = _shape(config, name)[: len(_shape(config, name)) - len(name.single)]
    for index, hf in enumerate(tensors_of(config, name)):
        at = tuple(slice(one, one + 1) for one in map(int, np.unravel_index(index, stacked)))
        rows = _rows(found, hf, name, readers[hf])
        for start, stop in streaming.spans(entries, 4 * math.prod(name.single) // entries):
            first, last = start * inner, stop * inner
            part = (*name.single[:axis], stop - start, *name.single[axis + 1 :])
            inside = [slice(0, size) for size in part]
            inside[axis] = slice(start, stop)
            shape = (*[1] * len(at), *part)
            read = functools.partial(_read, rows, first, last, shape, turned=bool(name.inputs))
            yield (*at, *inside), read


def _read(
    rows: Callable[[int, int], np.ndarray],
    first: int,
    last: int,
    shape: tuple[int, ...],
    *,
    turned: bool,
) -> np.ndarray:
    read = rows(first, last)
    return (read.T if turned else read).reshape(shape)


def _rows(
    found: Path, hf: str, name: Name, reader: Callable[[], np.ndarray]
) -> Callable[[int, int], np.ndarray]:
    """Returns what reads rows of a tensor, whose shape is checked before the first of them."""
    if isinstance(reader, shards.Stored | packed.Scaled):
        _check_shape(found, hf, reader.shape, name)
        return reader.rows

    @functools.cache
    def whole() -> np.ndarray:
        tensor = reader()
        _check_shape(found, hf, tensor.shape, name)
        return tensor

    return lambda first, last: whole()[first:last]


def _check_shape(found: Path, hf: str, shape: tuple[int, ...], name: Name) -> None:
    if shape != _hf_shape(name):
        raise UserError(
            f"model.path={found}: tensor {hf} has shape {shape},"
            f" the config asks for {_hf_shape(name)}; use the config.json that belongs to these weights"
        )


def _check_tied(found: Path, readers: Readers) -> None:
    if not np.array_equal(readers["lm_head.weight"](), readers["model.embed_tokens.weight"]()):
        raise UserError(
            f"model.path={found}: config.json says tie_word_embeddings=True, but lm_head.weight"
            " differs from model.embed_tokens.weight; set tie_word_embeddings to false"
        )
    del readers["lm_head.weight"]


def save(
    out: str | os.PathLike[str],
    config: Config,
    params: Params,
    fields: dict[str, Any],
    *,
    tokenizer: Any = None,
    generation: dict[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
    dtype: str = "float32",
    facts: Mapping[str, Any] = NO_FACTS,
) -> Path:
    """Writes a Hugging Face directory atomically; it may replace an earlier export.

    Raises UserError where the folder holds other files, and NotFinite for a parameter that is not finite. `facts` go
    into a file beside the weights that other programs ignore.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: an export is 'float32' or 'bfloat16'")
    with replacing(out, facts) as (work, target):
        _write_weights(work, config, params, np.dtype(dtype), max_shard_bytes)
        write_json(work / "config.json", exported_fields(fields, config, dtype))
        write_json(work / "generation_config.json", generation or generation_fields(fields))
        if tokenizer is not None:
            _write_tokenizer(work, tokenizer)
    return target


def _write_tokenizer(work: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(work))
    settings = read_json(work / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # The name of this class in both transformers 4 and 5.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        # Version 4 accepts a list only under the older name, which version 5 also reads.
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for how_it_was_read in ("is_local", "local_files_only"):
        settings.pop(how_it_was_read, None)
    write_json(work / "tokenizer_config.json", settings)


def read_generation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a model's generation config, or one from the token ids of its config."""
    found = locate(path)
    if found.is_dir() and (found / "generation_config.json").exists():
        return read_json(found / "generation_config.json")
    return generation_fields(read_fields(found))


def generation_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a generation config with the token ids of a model config."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: fields[name] for name in ids if fields.get(name) is not None}


def _hf_tensors(
    config: Config, params: Params, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    for hf, tensor in itertools.chain(_single(config, params), packed.fused(config, params)):
        written = np.ascontiguousarray(tensor, dtype)
        if not np.isfinite(written).all():
            raise NotFinite(
                f"tensor {hf} holds numbers that are not finite in {dtype}, so nothing was exported;"
                " export an earlier step, or with dtype='float32'"
            )
        yield hf, written


def _single(config: Config, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for name in _table(config):
        if packed.is_fused(config, name.path):
            continue
        parts = np.asarray(_leaf(params, name.path)).reshape(-1, *name.single)
        shape = _hf_shape(name)
        for tensor, hf in zip(parts, tensors_of(config, name), strict=True):
            yield hf, tensor.reshape(shape[::-1]).T if name.inputs else tensor.reshape(shape)


def _write_weights(
    work: Path, config: Config, params: Params, dtype: np.dtype, max_shard_bytes: float
) -> None:
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total_bytes = shard_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        write_safetensors(work / f"part-{len(shards)}", shard)
        shards.append(list(shard))
        shard, shard_bytes = {}, 0

    for hf, tensor in _hf_tensors(config, params, dtype):
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        shard[hf] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (work / "part-0").rename(work / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (work / f"part-{index}").rename(work / file)
        weight_map |= dict.fromkeys(names, file)
    index_fields = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(work / "model.safetensors.index.json", index_fields)


def _leaf(params: Params, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda tree, key: tree[key], path, params)


def _tree(leaves: Any) -> Params:
    params: dict[str, Any] = {}
    for path, leaf in leaves:
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"
