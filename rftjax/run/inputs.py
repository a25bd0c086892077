"""Fingerprints of what a run reads: a moved file has the same one, changed contents have another."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from rftjax.config.fields import flatten
from rftjax.config.stored import CODE
from rftjax.run.checkpoint import step_directories
from rftjax.tasks import TaskStream
from rftjax.types import Task
from rftjax.weights import directories
from rftjax.workers import named

# Part of an input -> its digest; empty where nothing is known, and then never compared.
Fingerprint = dict[str, str]
SELF = "the file itself"
PACKAGE = Path(__file__).parents[1]
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
)
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")
_WHOLE_BYTES = 2**25  # files up to this size are hashed whole
_SAMPLES, _SAMPLE_BYTES = 32, 2**16  # of larger ones


def fingerprints(
    config: ConfigDict, train: TaskStream, heldout: Mapping[str, Sequence[Task]]
) -> dict[str, Fingerprint]:
    """Returns the fingerprint of every input by its field; `heldout` names its sets by their fields."""
    found = {"model.path": of_model(directories.locate(config.model.path))}
    if config.lora.path:
        found["lora.path"] = of_adapters(Path(config.lora.path))
    found["tasks.train"] = _of_stream(train)
    for field, tasks in heldout.items():
        found[field] = _of_stream(TaskStream(tasks, seed=0))
    evaluators = {"evaluator": config.evaluator, "eval.evaluator": config.eval.evaluator}
    found |= {field: of_evaluator(text) for field, text in evaluators.items() if text}
    callables = {"environment": config.environment}
    if not config.agent.startswith(("http://", "https://")):
        callables["agent"] = config.agent
    callables |= {field: flatten(config)[field] for field in CODE}
    return found | {field: of_callable(text) for field, text in callables.items() if ":" in text}


def _of_stream(stream: TaskStream) -> Fingerprint:
    return {"rows": stream.state()["fingerprint"], "number of rows": str(len(stream))}


def of_model(path: Path) -> Fingerprint:
    """Fingerprints a GGUF file, a config.json or a directory; of large files their size and samples of their bytes."""
    if path.is_file():
        return {SELF: _digest(path)}
    return {
        one.name: _digest(one)
        for one in sorted(path.iterdir())
        if one.is_file() and (one.name in _MODEL_FILES or one.name.endswith(_WEIGHTS))
    }


def of_adapters(path: Path) -> Fingerprint:
    """Fingerprints a PEFT directory, or the newest checkpoint's adapters in a run's workdir."""
    if (path / "adapter_config.json").exists():
        return of_model(path)
    folders = step_directories(path / "checkpoints")
    trainable = folders[-1] / "trainable" if folders else path / "checkpoints"
    return {
        str(one.relative_to(trainable)): _digest(one)
        for one in sorted(trainable.rglob("*"))
        if one.is_file()
    }


def of_package(folder: Path = PACKAGE) -> str:
    """Returns one digest of the code in a folder: rftjax's own, of which two checkouts may have the same version."""
    found = {str(one.relative_to(folder)): _digest(one) for one in sorted(folder.rglob("*.py"))}
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]


def of_evaluator(text: str) -> Fingerprint:
    """Fingerprints one evaluator, or each of a sum with its name and weight."""
    parts = {one: _of_source(one.source) for one in named.parse(text)}
    if not named.is_sum(text):
        (found,) = parts.values()
        return found
    each = {
        f"{one.name}: {part}": value
        for one, found in parts.items()
        for part, value in found.items()
    }
    return each | {f"{one.name}: weight": repr(one.weight) for one in parts}


def _of_source(source: str) -> Fingerprint:
    if not source.endswith(named.GRADER):
        return of_callable(source)
    path = Path(os.path.abspath(source))
    return {SELF: _digest(path)} if path.is_file() else {}


def of_callable(spec: str) -> Fingerprint:
    """Fingerprints the source of "module:name" or "file.py:name" with the files of its folder that it imports.

    Nothing is imported. A module of a package brings the files of that package. A module without a source file has no
    fingerprint.
    """
    module, _, name = spec.rpartition(":")
    file = Path(os.path.abspath(module)) if module.endswith(".py") else _find(module)
    if file is None or not file.is_file():
        return {}
    top, dot, _ = module.partition(".")
    scope = start = file.parent
    if dot and not module.endswith(".py") and top != "rftjax":
        scope = next(folder for folder in file.parents if folder.name == top)
        start = scope.parent
    files = [file]
    for one in files:  # the list grows
        found = _imported(one, start)
        files += [path for path in found if path.is_relative_to(scope) and path not in files]
    parts = {str(one.relative_to(scope)): _digest(one) for one in files[1:]}
    return {"name": name, SELF: _digest(file)} | parts


def _find(module: str) -> Path | None:
    """Finds a module's source file; packages on the way to it are not imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return next((found for folder in folders if (found := _module_file(folder, rest))), None)


def _module_file(folder: Path, names: Sequence[str]) -> Path | None:
    path = folder.joinpath(*names)
    candidates = [path.with_name(f"{path.name}.py")] * bool(names) + [path / "__init__.py"]
    return next((one for one in candidates if one.is_file()), None)


def _imported(file: Path, start: Path) -> list[Path]:
    """Returns the files that a file imports, wherever the statement stands; absolute names begin at `start`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    places: list[tuple[Path, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            places += [(start, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else start
            module = node.module.split(".") if node.module else []
            places += [(folder, module), *((folder, [*module, one.name]) for one in node.names)]
    found = [_module_file(folder, names) for folder, names in places]
    return list(dict.fromkeys(path for path in found if path))


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            for index in range(_SAMPLES):
                file.seek(index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
