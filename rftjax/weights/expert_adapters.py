"""Adapters of experts as the peft package has them (0.17 and later): one module a map where a checkpoint stores experts
one by one, two parameters a layer, one around the other, where it stores them fused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rftjax.errors import UserError
from rftjax.models.config import Config
from rftjax.models.names import Name
from rftjax.types import Params
from rftjax.weights import packed

BOTH, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"  # parameters of fused experts
PARAMETERS = {BOTH, DOWN} | {
    f"mlp.{place}{part}_proj.weight"
    for place in ("", "shared_experts.")
    for part in ("gate", "up", "down")
}


def targets(config: Config, names: list[Name], rank: int, alpha: float) -> dict[str, Any]:
    """Returns the fields of adapter_config.json that say which maps are adapted.

    In a model with experts, dense and shared layers go by their parameters: with transformers 5 peft takes modules
    whose names end as an expert's for the experts alone, and leaves others of that ending out without a word.
    """
    modules: list[str] = []
    parameters: list[str] = []
    for name in names:
        place = name.hf.partition("{layer}.")[2]
        leaf = place.removesuffix(".weight").rpartition(".")[2]
        if packed.is_fused(config, name.path):
            parameters.append(DOWN if leaf == "down_proj" else BOTH)
        elif "{expert}" in name.hf:
            modules += [f"experts.{index}.{leaf}" for index in range(config.routing.experts)]
        elif config.routing.experts and name.path[1] in ("mlp", "shared"):
            parameters.append(place)
        else:
            modules.append(leaf)
    fields: dict[str, Any] = {"target_modules": list(dict.fromkeys(modules))}
    if parameters:
        fields["target_parameters"] = list(dict.fromkeys(parameters))
    return fields | (patterns(rank, alpha) if BOTH in parameters else {})


def patterns(rank: int, alpha: float) -> dict[str, dict[str, float]]:
    """Returns rank and alpha of fused gates and ups, whose adapters lie one behind the other."""
    return {"rank_pattern": {BOTH: 2 * rank}, "alpha_pattern": {BOTH: 2 * alpha}}


def completed(adapters: Params) -> Params:
    """Returns adapters that have all three maps of experts where they have gate or up, as peft wants it; absent ones
    are 0."""
    found: Params = {}
    for stack, parts in adapters.items():
        found[stack] = dict(parts)
        mlp = parts.get("mlp", {})
        one = mlp.get("experts_gate") or mlp.get("experts_up")
        if one:
            a, b = (np.zeros_like(one[letter]) for letter in "ab")
            pair, down = {"a": a, "b": b}, {"a": b.swapaxes(-1, -2), "b": a.swapaxes(-1, -2)}
            all_three = {"experts_gate": pair, "experts_up": pair, "experts_down": down}
            found[stack]["mlp"] = all_three | mlp
    return found


def fused(config: Config, adapters: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of adapters of fused experts, as peft flattens them: A (E R, inputs) and B (outputs, R E)."""
    for stack, mlp, stems in _layers(config, adapters):
        for at in range(stack.count):
            pairs = []
            if "experts_gate" in mlp:
                a_gate, b_gate, a_up, b_up = (
                    np.asarray(mlp[part][letter][at], np.float32)
                    for part in ("experts_gate", "experts_up")
                    for letter in "ab"
                )
                experts, rank, ffn = b_gate.shape
                both = np.zeros((experts, 2, rank, ffn, 2), np.float32)
                both[:, 0, :, :, 0], both[:, 1, :, :, 1] = b_gate, b_up
                a = np.concatenate([a_gate, a_up], axis=-1)
                pairs.append((a, both.reshape(experts, 2 * rank, 2 * ffn)))
            if "experts_down" in mlp:
                down = mlp["experts_down"]
                pairs.append(tuple(np.asarray(down[letter][at], np.float32) for letter in "ab"))
            for stem, (a, b) in zip(stems[at], pairs, strict=True):
                yield f"{stem}lora_A.weight", a.swapaxes(1, 2).reshape(-1, a.shape[1])
                yield f"{stem}lora_B.weight", b.transpose(2, 1, 0).reshape(b.shape[2], -1)


def _layers(config: Config, adapters: Params) -> Iterator[tuple[Any, Params, list[list[str]]]]:
    """Yields each stack of fused experts that are adapted, their adapters, and where a layer's tensors lie: what peft
    wraps second, down, lies outside, and gate and up in its base_layer."""
    for stack in config.stacks if config.routing.interleaved else ():
        mlp = adapters.get(stack.name, {}).get("mlp", {})
        depths = [""] * ("experts_gate" in mlp) + [""] * ("experts_down" in mlp)
        if len(depths) == 2:
            depths[0] = "base_layer."
        stems = [
            [
                f"base_model.model.model.layers.{stack.first + at}.mlp.experts.{depth}"
                for depth in depths
            ]
            for at in range(stack.count)
        ]
        if depths:
            yield stack, mlp, stems


def read_fused(
    path: Path, config: Config, fields: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Params:
    """Returns the adapters of fused experts, whose tensors it takes out; raises UserError for what is not `fused`'s."""
    named, tree = fields.get("target_parameters") or [], {}
    parts = ["experts_gate", "experts_up"] * (BOTH in named) + ["experts_down"] * (DOWN in named)
    wanted: Params = {stack.name: {"mlp": dict.fromkeys(parts)} for stack in config.stacks}
    rank, experts = fields["r"], config.routing.experts
    for stack, _, stems in _layers(config, wanted):
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {part: [] for part in parts}
        for layer in stems:
            for both, stem in zip([True] * (BOTH in named) + [False], layer, strict=False):
                ffn, width = config.routing.ffn, config.width
                inner, inputs, outputs = (2 * rank, width, 2 * ffn) if both else (rank, ffn, width)
                shapes = {"A": (experts * inner, inputs), "B": (outputs, inner * experts)}
                pair = []
                for letter, shape in shapes.items():
                    name = f"{stem}lora_{letter}.weight"
                    tensor = tensors.pop(name, None)
                    if tensor is None or tensor.shape != shape:
                        has = "is missing" if tensor is None else f"has shape {tensor.shape}"
                        raise UserError(
                            f"lora.path={path}: {name} {has}, the model asks for {shape}"
                        )
                    pair.append(np.asarray(tensor, np.float32))
                a = pair[0].reshape(experts, inner, inputs).swapaxes(1, 2)
                b = pair[1].reshape(outputs, inner, experts).transpose(2, 1, 0)
                if not both:
                    found["experts_down"].append((a, b))
                    continue
                halves = b.reshape(experts, 2, rank, ffn, 2)
                if halves[:, 0, :, :, 1].any() or halves[:, 1, :, :, 0].any():
                    raise UserError(
                        f"lora.path={path}: {stem}lora_B.weight mixes gate and up of experts, which rftjax adapts each"
                        " by itself: merge that adapter into its base with peft (merge_and_unload), and start from the"
                        " merged model"
                    )
                found["experts_gate"].append((a[..., :rank], halves[:, 0, :, :, 0]))
                found["experts_up"].append((a[..., rank:], halves[:, 1, :, :, 1]))
        tree[stack.name] = {
            part: {
                letter: np.stack(leaves)
                for letter, leaves in zip("ab", zip(*pairs, strict=True), strict=True)
            }
            for part, pairs in found.items()
            if any(a.any() for a, _ in pairs)  # else it was written for the others' sake
        }
    return tree
