"""Reads what the Hugging Face configs of most families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rftjax.errors import UserError
from rftjax.models.config import FULL, Config, Routing, Stack
from rftjax.models.rope import read_rope

# Fields that `read_shared` reads.
SHARED = {
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}
# Fields of these families that change what a model computes, each with the values under which the port is exact.
EXACT = {
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
}
# Hugging Face's names of the activations that `layers.ACTIVATIONS` has.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
KINDS = ("full_attention", "sliding_attention")


def read_shared(
    family: str, fields: dict[str, Any], dtype: str, *, theta: float = 10000.0, **others: Any
) -> Config:
    """Returns the config of a family, `others` given by it; `theta` is its default rotary base."""
    heads, act = fields["num_attention_heads"], fields.get("hidden_act", "silu")
    settings = {
        "family": family,
        "vocab": fields["vocab_size"],
        "width": fields["hidden_size"],
        "layers": fields["num_hidden_layers"],
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads") or heads,
        "channels": fields.get("head_dim") or fields["hidden_size"] // heads,
        "ffn": fields["intermediate_size"],
        "max_positions": fields.get("max_position_embeddings", 2048),
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "tied": bool(fields.get("tie_word_embeddings", False)),
        "windows": (FULL,) * fields["num_hidden_layers"],
        "init_std": fields.get("initializer_range", 0.02),
        "activation": read_activation("hidden_act", act),
        "dtype": dtype,
    }
    if "rope" not in others:
        settings["rope"] = read_rope(fields, theta)
    return Config(**(settings | others))


def read_activation(field: str, value: Any) -> str:
    """Returns our name of an activation; raises UserError for one that is not implemented."""
    if value not in ACTIVATIONS:
        raise UserError(
            f"config.json: {field}={value!r} is not implemented; rftjax knows {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[value]


def read_kinds(fields: dict[str, Any], default: Sequence[str]) -> list[str]:
    """Returns the kind of each layer, `default` where `layer_types` says nothing; refuses kinds beyond KINDS."""
    found = fields.get("layer_types")
    kinds = list(default if found is None else found)
    unknown = sorted({str(kind) for kind in kinds} - set(KINDS))
    if unknown or len(kinds) != fields["num_hidden_layers"]:
        raise UserError(
            f"config.json: layer_types={kinds}: must name one of {', '.join(KINDS)} for each of the"
            f" {fields['num_hidden_layers']} layers; correct it there"
        )
    return kinds


def windows_of(kinds: Sequence[str], window: int | None) -> tuple[int, ...]:
    """Returns the window of each layer, one of those with sliding attention having `window` (None: no limit)."""
    limit = FULL if window is None else window
    return tuple(limit if kind == "sliding_attention" else FULL for kind in kinds)


def same(fields: dict[str, Any], one: str, other: str, default: int) -> int:
    """Returns what two names of a field say, `default` where neither is given; refuses a contradiction."""
    found = {fields[name] for name in (one, other) if fields.get(name) is not None} or {default}
    if len(found) > 1:
        raise UserError(
            f"config.json: {one}={fields[one]} and {other}={fields[other]} contradict each other; remove the wrong one"
        )
    return found.pop()


def split(sparse: Sequence[bool]) -> tuple[Stack, ...]:
    """Returns the stacks of layers of which some have experts: layers of one kind that follow each other."""
    starts = [at for at, one in enumerate(sparse) if at == 0 or one != sparse[at - 1]]
    ends = [*starts[1:], len(sparse)]
    return tuple(
        Stack(f"{'experts' if sparse[at] else 'dense'}_{at}", at, end - at, sparse[at])
        for at, end in zip(starts, ends, strict=True)
    )


def check_routing(routing: Routing) -> Routing:
    """Returns it; raises UserError where a token cannot have so many experts."""
    r = routing
    if r.experts % r.groups or not 1 <= r.open_groups <= r.groups:
        raise UserError(
            f"config.json: {r.experts} experts in n_group={r.groups} groups of which topk_group={r.open_groups} are"
            " open: the groups must be equal, and some of them open; correct it there"
        )
    if r.groups > 1 and r.experts == r.groups:
        raise UserError(
            f"config.json: n_group={r.groups}: a group needs two experts or more; correct it there"
        )
    most = r.experts // r.groups * r.open_groups
    if not 1 <= r.chosen <= most:
        raise UserError(
            f"config.json: num_experts_per_tok={r.chosen}: must be from 1 to {most}, the experts that a token may"
            " have; correct it there"
        )
    return routing


def without_image_positions(fields: dict[str, Any], theta: float) -> dict[str, Any]:
    """Returns the fields without rotary settings of images, whose three positions are one on text alone; `theta` is the
    rotary base where they give none."""
    found = dict(fields)
    bases = [found.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        section = {
            key: one
            for key, one in (found.pop(name, None) or {}).items()
            if key not in ("mrope_section", "mrope_interleaved") and one != "mrope"
        }
        bases.append(section.get("rope_theta"))
        if section:
            found[name] = section
    return found if any(bases) else found | {"rope_theta": theta}
