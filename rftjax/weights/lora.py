"""Low-rank adapters (Hu et al. 2021): made, read and written; the model applies them, `device.merge` adds them in.

The adapter of a linear layer is a (L, inputs, rank) and b (L, rank, outputs), of experts with an axis E behind L; it
adds a @ b * alpha / rank to the kernel. Directories of the peft package hold the matrices transposed, one pair a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rftjax.errors import NotFinite, UserError
from rftjax.models import FAMILIES
from rftjax.models.config import Config
from rftjax.models.names import Name, layers_of, tensors_of
from rftjax.types import Params
from rftjax.weights import expert_adapters, hf, packed
from rftjax.weights.exporting import NO_FACTS, replacing

TARGETS = (
    *("query", "key", "value", "output", "gate", "up", "down"),
    *("query_down", "query_up", "latent", "expand"),  # of latent attention
    *("experts_gate", "experts_up", "experts_down"),
)
PREFIX = "base_model.model."  # of tensor names in peft
# Fields of adapter_config.json that are read, and fields without effect on a trained adapter.
READ = {"lora_alpha", "r", "use_rslora"}
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
}
# Fields that hold what `expert_adapters.targets` writes, or nothing.
OF_EXPERTS = {"alpha_pattern", "rank_pattern", "target_parameters"}
# Fields with the values that are implemented. Every other field must be empty: None, False, {} or [].
EXACT = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
}
MERGE = (
    "merge that adapter into its base with peft (merge_and_unload), and start from the merged model"
)
WAY_OUT = {
    "init_lora_weights": (
        "that start also changes the base's weights: let peft write the adapter as plain LoRA (save_pretrained with"
        f" path_initial_model_for_weight_conversion), or {MERGE}"
    ),
    "peft_type": f"rftjax reads LORA; {MERGE}",
}


def parse_targets(targets: str) -> tuple[str, ...]:
    """Parses "all" or a comma list into names of linear layers; raises UserError for unknown names."""
    names = TARGETS if targets == "all" else tuple(name.strip() for name in targets.split(","))
    wrong = [name for name in names if name not in TARGETS]
    if wrong:
        raise UserError(
            f"lora.targets={targets!r}: {wrong[0]!r} is no linear layer; write 'all' or a comma list of"
            f" {', '.join(TARGETS)}"
        )
    return tuple(name for name in TARGETS if name in names)


def scale(rank: int, alpha: float) -> float:
    """Returns the factor alpha / rank on a @ b, 0 in full fine-tuning."""
    return alpha / rank if rank else 0.0


def init(config: Config, *, rank: int, targets: str = "all", seed: int = 0) -> Params:
    """Returns float32 adapters: a uniform within 1 / sqrt(inputs), as in peft, and b zero, so that they add nothing."""
    tree: Params = {}
    key = jax.random.key(seed)
    for index, name in enumerate(_kernels(config, parse_targets(targets))):
        inputs, outputs = _sides(name)
        bound = 1 / math.sqrt(inputs)
        stacked = _stacked(config, name)
        shape = (*stacked, inputs, rank)
        first = jax.random.uniform(
            jax.random.fold_in(key, index), shape, minval=-bound, maxval=bound
        )
        pair = {"a": first, "b": jnp.zeros((*stacked, rank, outputs))}
        _put(tree, name, pair)
    return tree


def save_peft(
    out: str | Path,
    config: Config,
    adapters: Params,
    *,
    alpha: float,
    base: str = "",
    facts: Mapping[str, Any] = NO_FACTS,
) -> Path:
    """Writes a directory that the peft package loads; it may replace an earlier export.

    `base` is the name of the base model, "" for one that peft cannot load; `facts` go into a file beside the weights.
    """
    adapters = expert_adapters.completed(adapters)
    tensors = dict(expert_adapters.fused(config, adapters))
    used = []
    rank = 0
    for name in _kernels(config, TARGETS):
        stack, part, linear, _ = name.path
        pair = adapters.get(stack, {}).get(part, {}).get(linear)
        if pair is None:
            continue
        used.append(name)
        rank = pair["a"].shape[-1]
        if packed.is_fused(config, name.path):
            continue
        for letter, stacked in (("A", pair["a"]), ("B", pair["b"])):
            matrices = np.asarray(stacked, np.float32).reshape(-1, *stacked.shape[-2:])
            for one, matrix in zip(_peft_names(config, name, letter), matrices, strict=True):
                tensors[one] = np.ascontiguousarray(matrix.T)
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise NotFinite(
            f"tensor {broken[0]} holds numbers that are not finite, so nothing was exported; export an earlier step"
        )
    fields = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    } | expert_adapters.targets(config, used, rank, alpha)
    with replacing(out, facts) as (work, target):
        hf.write_safetensors(work / "adapter_model.safetensors", tensors)
        hf.write_json(work / "adapter_config.json", fields)
    return target


def load_peft(path: str | Path, config: Config, *, alpha: float) -> Params:
    """Reads a directory of peft and rescales b, so that `alpha` gives the same product as the directory's own alpha.

    Raises UserError for settings that are not implemented and for tensors that do not fit the model.
    """
    path = Path(path).expanduser()
    fields = hf.read_json(path / "adapter_config.json", "lora.path")
    _check_fields(path, fields)
    rank = fields["r"]
    own = fields["lora_alpha"] / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    file = path / "adapter_model.safetensors"
    if not file.exists() and (path / "adapter_model.bin").exists():
        raise UserError(
            f"lora.path={path}: rftjax reads adapter_model.safetensors and not adapter_model.bin; load the adapter with"
            " peft and write it again with save_pretrained"
        )
    tensors = hf.read_safetensors(file, "lora.path")
    tree: Params = {}
    factor = np.float32(own / scale(rank, alpha))
    fused = expert_adapters.read_fused(path, config, fields, tensors)
    for name in _kernels(config, TARGETS):
        names = {letter: _peft_names(config, name, letter) for letter in "AB"}
        if pair := fused.get(name.path[0], {}).get(name.path[2]):
            _put(tree, name, pair | {"b": pair["b"] * factor})
        if not any(one in tensors for one in names["A"]):
            continue
        inputs, outputs = _sides(name)
        shapes = {"A": (rank, inputs), "B": (outputs, rank)}
        found: dict[str, list[np.ndarray]] = {"A": [], "B": []}
        for letter, shape in shapes.items():
            for one in names[letter]:
                tensor = tensors.pop(one, None)
                if tensor is None or tensor.shape != shape:
                    has = "is missing" if tensor is None else f"has shape {tensor.shape}"
                    raise UserError(f"lora.path={path}: {one} {has}, the model asks for {shape}")
                found[letter].append(np.asarray(tensor, np.float32).T)
        if name.path[2].startswith("experts_") and not any(map(np.any, found["A"])):
            continue  # was written for the others' sake
        a, b = (
            np.stack(found[letter]).reshape(*_stacked(config, name), *shapes[letter][::-1])
            for letter in "AB"
        )
        _put(tree, name, {"a": a, "b": b * factor})
    if tensors or not tree:
        unknown = sorted(tensors)[0] if tensors else "no adapter of a linear layer"
        raise UserError(
            f"lora.path={path}: {unknown} does not belong to a {config.family} model, or is of a layer that has no"
            " adapter here (embedding, head, router); merge such an adapter into its base with peft (merge_and_unload),"
            " and start from the merged model"
        )
    return tree


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for a setting of peft that is not implemented."""
    for name, value in fields.items():
        if name in READ | HARMLESS | OF_EXPERTS:
            continue
        if name in EXACT:
            exact = any(
                value is one or (isinstance(one, str) and value == one) for one in EXACT[name]
            )
        else:
            exact = value is None or value is False or value in ({}, [], "")
        if not exact:
            raise _not_implemented(path, name, value)
    if "peft_type" not in fields:
        raise UserError(
            f"lora.path={path}: adapter_config.json has no peft_type; rftjax reads LORA"
        )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(
            f"lora.path={path}: adapter_config.json: r={rank!r}: must be a rank of at least 1"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(
            f"lora.path={path}: adapter_config.json: lora_alpha={alpha!r}: must be a number above 0"
        )
    parameters = fields.get("target_parameters") or []
    if not set(parameters) <= expert_adapters.PARAMETERS:
        raise _not_implemented(path, "target_parameters", parameters)
    both = expert_adapters.BOTH in parameters
    for name, value in expert_adapters.patterns(rank, alpha).items():
        if fields.get(name) not in ((value,) if both else (None, {})):
            raise _not_implemented(path, name, fields.get(name))
    if both and fields.get("use_rslora"):
        raise _not_implemented(path, "use_rslora", True)


def _not_implemented(path: Path, name: str, value: Any) -> UserError:
    return UserError(
        f"lora.path={path}: adapter_config.json: {name}={value!r} is not implemented;"
        f" {WAY_OUT.get(name, MERGE)}"
    )


def instead_of_adapter(path: Path) -> str:
    """Returns what a path without adapter_config.json is, and what to give instead."""
    expected = "give a directory that peft wrote (adapter_config.json), or the workdir of a run with adapters"
    if not path.exists():
        return f"no such directory; {expected} (an adapter of the hub: hf download OWNER/NAME --local-dir DIR)"
    if path.is_file():
        return f"is a file; {expected}"
    if (path / "config.json").exists():
        return f"holds a whole model and no adapter, which model.path takes; {expected}"
    return f"holds neither adapter_config.json nor a run's config.json and checkpoints; {expected}"


def check_like(path: str, found: Params, wanted: Params) -> None:
    """Raises UserError where the adapters to start from differ from the config in layers or rank."""

    def describe(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {"/".join(key.key for key in at): leaf.shape for at, leaf in leaves}

    one, two = describe(found), describe(wanted)
    for name in sorted({*one, *two}):
        if one.get(name) != two.get(name):
            raise UserError(
                f"lora.path={path}: {name} is {one.get(name, 'absent')} there and {two.get(name, 'absent')} by"
                " lora.rank and lora.targets; give the ones that it was made with"
            )


def _kernels(config: Config, targets: tuple[str, ...]) -> list[Name]:
    table = FAMILIES[config.family].names(config)
    return [name for name in table if name.path[-1] == "kernel" and name.path[-2] in targets]


def _sides(name: Name) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of a kernel."""
    return math.prod(name.single[: name.inputs]), math.prod(name.single[name.inputs :])


def _stacked(config: Config, name: Name) -> tuple[int, ...]:
    """Returns the leading axes of a kernel: layers, and experts where there are any."""
    experts = name.shape[:1] if "{expert}" in name.hf else ()
    return len(layers_of(config, name)), *experts


def _put(tree: Params, name: Name, pair: dict[str, Any]) -> None:
    stack, part, linear, _ = name.path
    tree.setdefault(stack, {}).setdefault(part, {})[linear] = pair


def _peft_names(config: Config, name: Name, letter: str) -> list[str]:
    pattern = PREFIX + name.hf.replace(".weight", f".lora_{letter}.weight")
    return tensors_of(config, name, pattern)
