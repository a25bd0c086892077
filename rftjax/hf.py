"""Hugging Face checkpoints in and out; one name table a family serves both directions."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rftjax import gguf
from rftjax.errors import NotFinite, UserError
from rftjax.exporting import NO_FACTS, replacing
from rftjax.models import FAMILIES, decoder
from rftjax.models.decoder import Config
from rftjax.models.names import Name
from rftjax.types import Params

Place = Callable[[tuple[str, ...], np.ndarray], Any]
Leaves = Iterator[tuple[tuple[str, ...], np.ndarray]]
Readers = dict[str, Callable[[], np.ndarray]]


class Model(NamedTuple):
    """A model whose files are open: its shape, its Hugging Face config, and what reads its float32 parameters.

    `read(place)` reads leaf after leaf, the next one while `place(path, array)` puts the last on devices.
    """

    config: Config
    fields: dict[str, Any]
    read: Callable[[Place | None], Params]


# Fields that never change what a decoder computes, whatever their value.
HARMLESS = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "model_type",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "_attn_implementation_autoset",
    "_from_model_config",
    "_name_or_path",
}
# Fields of every family, each with the values under which the port is exact.
EXACT = {
    "add_cross_attention": (False, None),
    "auto_map": (None,),
    "chunk_size_feed_forward": (0, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "tie_encoder_decoder": (False, None),
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
WAY_OUT = {
    "quantization_config": "use the unquantised checkpoint of this model",
    "auto_map": "code that comes with a checkpoint is never run",
}


def locate(path: str | os.PathLike[str]) -> Path:
    """Returns the local file or directory of a path or hub name, which is downloaded if need be."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    name = str(path)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model.path={name}: no such directory or file, and not a hub name (OWNER/NAME)"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, no such name, no permission: each has its own class
        raise UserError(
            f"model.path={name}: no such directory, and the hub did not serve it"
            f" ({type(error).__name__}: {error}); give a local directory or a .gguf file"
        ) from error


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the Hugging Face config of a directory, a config.json or a GGUF file as a dict."""
    found = locate(path)
    if found.suffix == ".gguf":
        return gguf.hf_fields(gguf.read(found))
    return read_json(found / "config.json" if found.is_dir() else found)


def read_config(fields: dict[str, Any], dtype: str = "float32") -> Config:
    """Returns the shape of the model; refuses every field whose effect is not implemented."""
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type={kind!r} is not implemented;"
            f" rftjax knows {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    exact = EXACT | family.EXACT
    for name, value in fields.items():
        if name in exact and value not in exact[name]:
            way_out = WAY_OUT.get(name, f"only {' or '.join(map(repr, exact[name]))} is")
            raise UserError(f"config.json: {name}={value!r} is not implemented; {way_out}")
    unknown = sorted(set(fields) - set(exact) - HARMLESS - family.READ)
    if unknown:
        named = ", ".join(f"{name}={fields[name]!r}" for name in unknown)
        raise UserError(
            f"config.json: rftjax does not know what {named} does to a {kind} model, so it refuses"
            " to guess; remove the field if it has no effect on what the model computes"
        )
    for name in REQUIRED:
        if not isinstance(fields.get(name), int) or fields[name] < 1:
            raise UserError(
                f"config.json: {name}={fields.get(name)!r}; a {kind} model needs a positive integer"
            )
    config = family.config(fields, dtype)
    if config.heads % config.kv_heads:
        raise UserError(
            f"config.json: num_attention_heads={config.heads} is no multiple of"
            f" num_key_value_heads={config.kv_heads}"
        )
    return config


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    init: str = "pretrained",
    seed: int = 0,
    place: Place | None = None,
) -> tuple[Config, Params, dict[str, Any]]:
    """Returns config, float32 parameters and Hugging Face fields of what `open_model` opens."""
    model = open_model(path, dtype=dtype, init=init, seed=seed)
    return model.config, model.read(place), model.fields


def open_model(
    path: str | os.PathLike[str], *, dtype: str = "float32", init: str = "pretrained", seed: int = 0
) -> Model:
    """Opens a directory, hub name or GGUF; raises ValueError where its tensors are not those of its config.

    `dtype` is what the model computes in. `init="random"` needs a config.json alone.
    """
    fields = read_fields(path)
    config = read_config(fields, dtype)

    def random_leaves() -> Leaves:
        fresh = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(seed))
        return ((name.path, np.asarray(_leaf(fresh, name.path))) for name in _table(config))

    def stored_leaves() -> Leaves:
        leaves = ((name.path, _read_leaf(found, config, name, readers)) for name in _table(config))
        return _prefetched(leaves)

    if init == "random":
        return Model(config, fields, functools.partial(_placed, random_leaves))
    if init != "pretrained":
        raise UserError(f"model.init={init!r}: must be 'pretrained' or 'random'")
    found = locate(path)
    if found.suffix == ".gguf":
        readers = gguf.tensors(gguf.read(found), fields)
    else:
        readers = _safetensors(found if found.is_dir() else found.parent)
    if config.tied and "lm_head.weight" in readers:
        _check_tied(found, readers)
    expected = {hf for name in _table(config) for hf in _hf_names(config, name)}
    missing, extra = sorted(expected - set(readers)), sorted(set(readers) - expected)
    extra = [name for name in extra if not name.endswith(".rotary_emb.inv_freq")]
    if missing or extra:
        raise UserError(
            f"model.path={found}: the config asks for {len(expected)} tensors;"
            f" missing: {_few(missing)}; unknown: {_few(extra)}"
        )
    return Model(config, fields, functools.partial(_placed, stored_leaves))


def outline(config: Config) -> Params:
    """Returns the shapes of the parameters that a model of this config has."""
    shapes = ((name.path, _shape(config, name)) for name in _table(config))
    return _tree((path, jax.ShapeDtypeStruct(shape, np.float32)) for path, shape in shapes)


def _placed(leaves: Callable[[], Leaves], place: Place | None) -> Params:
    put = place or (lambda _, leaf: jnp.asarray(leaf))
    return _tree((path, put(path, leaf)) for path, leaf in leaves())


def _prefetched(leaves: Leaves) -> Leaves:
    """Yields the same; one more is read while the caller works on the last."""
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, leaves, None)
        while (leaf := pending.result()) is not None:
            pending = reader.submit(next, leaves, None)
            yield leaf


def _table(config: Config) -> list[Name]:
    return FAMILIES[config.family].names(config)


def _hf_names(config: Config, name: Name) -> list[str]:
    if "{layer}" not in name.hf:
        return [name.hf]
    return [name.hf.format(layer=layer) for layer in range(config.layers)]


def _shape(config: Config, name: Name) -> tuple[int, ...]:
    """Returns the shape of our leaf, which holds all layers."""
    return (config.layers, *name.shape) if "{layer}" in name.hf else name.shape


def _hf_shape(name: Name) -> tuple[int, ...]:
    """Returns the shape in Hugging Face's layout: (outputs, inputs) for a kernel."""
    if not name.inputs:
        return name.shape if name.path[-1] == "embedding" else (int(np.prod(name.shape)),)
    inputs, outputs = name.shape[: name.inputs], name.shape[name.inputs :]
    return int(np.prod(outputs)), int(np.prod(inputs))


def _read_leaf(found: Path, config: Config, name: Name, readers: Readers) -> np.ndarray:
    parts = _hf_names(config, name)
    leaf = np.empty(_shape(config, name), np.float32)
    for index, hf in enumerate(parts):
        tensor = readers[hf]()
        if tensor.shape != _hf_shape(name):
            raise UserError(
                f"model.path={found}: tensor {hf} has shape {tensor.shape},"
                f" the config asks for {_hf_shape(name)}"
            )
        ours = (tensor.T if name.inputs else tensor).reshape(name.shape)
        leaf[index if "{layer}" in name.hf else ...] = ours
    return leaf


def _check_tied(found: Path, readers: Readers) -> None:
    if not np.array_equal(readers["lm_head.weight"](), readers["model.embed_tokens.weight"]()):
        raise UserError(
            f"model.path={found}: config.json says tie_word_embeddings=True, but lm_head.weight"
            " differs from model.embed_tokens.weight; set tie_word_embeddings to false"
        )
    del readers["lm_head.weight"]


def _safetensors(directory: Path) -> Readers:
    """Returns readers of every tensor of a directory's safetensors files, by their names."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        files = ["model.safetensors"]
    readers: Readers = {}
    for file in files:
        readers |= _open_safetensors(directory / file)
    return readers


def _open_safetensors(path: Path) -> Readers:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(
            f"model.path={path.parent}: {path.name} is missing; rftjax reads safetensors"
            " (convert other weight files with transformers' save_pretrained)"
        )
    try:
        file = safe_open(path, "numpy")
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.path={path}: not a whole safetensors file ({error})") from error

    def read(name: str) -> np.ndarray:
        tensor = file.get_tensor(name)
        if tensor.dtype not in (np.float32, np.float16, jnp.bfloat16):
            raise UserError(
                f"model.path={path}: tensor {name} is {tensor.dtype}; rftjax reads float32,"
                " float16 and bfloat16"
            )
        return tensor

    return {name: functools.partial(read, name) for name in names}


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
    """Writes a Hugging Face directory, whole or not at all, in place of an earlier export.

    Raises UserError where the folder holds anything else, and NotFinite where a parameter is no finite number. `facts`
    are stored beside the weights, in a file that other programs ignore.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: an export is 'float32' or 'bfloat16'")
    with replacing(out, facts) as (work, target):
        _write_weights(work, config, params, np.dtype(dtype), max_shard_bytes)
        kept = {key: value for key, value in fields.items() if key not in ("torch_dtype", "dtype")}
        write_json(work / "config.json", kept | {"dtype": dtype})
        write_json(work / "generation_config.json", generation or generation_fields(fields))
        if tokenizer is not None:
            _write_tokenizer(work, tokenizer)
    return target


def _write_tokenizer(work: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(work))
    settings = read_json(work / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # The name that transformers 4 and 5 both know for the same class.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(work / "tokenizer_config.json", settings)


def read_generation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a model's generation config, or one made of its config's token ids."""
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
    for name in _table(config):
        leaf = np.asarray(_leaf(params, name.path))
        for index, hf in enumerate(_hf_names(config, name)):
            tensor = leaf[index] if "{layer}" in name.hf else leaf
            shape = _hf_shape(name)
            flat = tensor.reshape(shape[::-1]).T if name.inputs else tensor.reshape(shape)
            written = np.ascontiguousarray(flat, dtype)
            if not np.isfinite(written).all():
                raise NotFinite(
                    f"tensor {hf} holds numbers that are not finite in {dtype}, so nothing was exported;"
                    " export an earlier step, or with dtype='float32'"
                )
            yield hf, written


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


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON file's object; raises ValueError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model.path={path.parent}: {path.name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of one file; raises ValueError where it is missing or damaged."""
    return {name: read() for name, read in _open_safetensors(path).items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file of contiguous tensors."""
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
