"""Reads a Hugging Face config's rotary settings (`rope_scaling`, newer `rope_parameters`)."""

from __future__ import annotations

from typing import Any

from rftjax.errors import UserError
from rftjax.models.config import Config, Rope

TEXTS = ("rope_type", "type")
FIELDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
# Fields that `Rope` calls otherwise.
ATTRIBUTES = {"original_max_position_embeddings": "original_max_positions"}


def read_rope(fields: dict[str, Any], default_theta: float = 10000.0) -> Rope:
    """Returns the rotary settings; refuses what is not implemented, and fields that contradict each other.

    transformers 4 reads `rope_scaling` and `rope_theta`, version 5 `rope_parameters` too, so a config may have all.
    """
    given = {
        name: fields[name]
        for name in ("rope_theta", "rope_scaling", "rope_parameters")
        if fields.get(name)
    }
    sections = [value for name, value in given.items() if name != "rope_theta"]
    for section in sections:
        if not isinstance(section, dict):
            raise UserError(f"config.json: rope settings {section!r} must be an object")
        for name, value in section.items():
            if name not in TEXTS and (
                value is not None and not isinstance(value, int | float | dict)
            ):
                raise UserError(
                    f"config.json: rope setting {name}={value!r}: must be a number; correct it there"
                )
    thetas = {section["rope_theta"] for section in sections if section.get("rope_theta")}
    thetas |= {given["rope_theta"]} if "rope_theta" in given else set()
    theta = float(min(thetas, default=default_theta))
    ropes = {_read_section(fields, section, theta) for section in sections or [{}]}
    if len(thetas) > 1 or len(ropes) > 1:
        raise UserError(
            f"config.json: {', '.join(f'{name}={value}' for name, value in given.items())} contradict each other;"
            " keep what the model was trained with and remove the rest"
        )
    return ropes.pop()


def _read_section(fields: dict[str, Any], section: dict[str, Any], theta: float) -> Rope:
    found = {name: value for name, value in section.items() if name != "rope_theta"}
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    partial = found.pop("partial_rotary_factor", None)
    if kind not in FIELDS:
        raise UserError(
            f"config.json: rope type {kind!r} is not implemented; rftjax knows {', '.join(FIELDS)}"
        )
    unknown = {name for name, value in found.items() if value is not None} - FIELDS[kind]
    if partial not in (None, 1, 1.0):
        unknown.add("partial_rotary_factor")
    nested = any(isinstance(value, dict) for value in found.values())
    if unknown and (kind != "default" or nested):
        raise UserError(
            f"config.json: rope settings {sorted(unknown)} of type {kind!r} are not implemented;"
            f" rftjax knows {sorted(FIELDS[kind])}"
        )
    if partial not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor={partial} is not implemented, only 1")
    if kind == "default":
        return Rope(theta=theta)  # which has no use for the others
    if not found.get("factor"):
        raise UserError(f"config.json: rope settings of type {kind!r} need a factor")
    original = found.get("original_max_position_embeddings")
    return Rope(
        theta=theta,
        kind=kind,
        factor=float(found.get("factor") or 1.0),
        low_freq_factor=float(found.get("low_freq_factor") or 1.0),
        high_freq_factor=float(found.get("high_freq_factor") or 4.0),
        original_max_positions=int(original or fields.get("max_position_embeddings") or 8192),
        beta_fast=float(found.get("beta_fast") or 32.0),
        beta_slow=float(found.get("beta_slow") or 1.0),
        attention_factor=float(found.get("attention_factor") or 0.0),
        mscale=float(found.get("mscale") or 0.0),
        mscale_all_dim=float(found.get("mscale_all_dim") or 0.0),
        truncate=bool(found.get("truncate", True)),
    )


def rope_fields(fields: dict[str, Any], config: Config) -> dict[str, Any]:
    """Returns the rotary settings of an export, for both transformers 4 (`rope_theta`, `rope_scaling`) and 5
    (`rope_parameters`)."""
    given = fields.get("rope_parameters") or {}
    by_kind = len({rope for rope in config.ropes if rope.kind != "none"}) > 1
    if by_kind:
        local = next(rope for rope in config.ropes if rope != config.rope)
        full = _section(
            given.get("full_attention") or fields.get("rope_scaling") or {}, config.rope
        )
        sliding = _section(given.get("sliding_attention") or {}, local)
        sections = {"full_attention": full, "sliding_attention": sliding}
        kept = {"rope_local_base_freq": local.theta, "rope_parameters": sections}
    else:
        full = _section(given or fields.get("rope_scaling") or {}, config.rope)
        kept = {"rope_parameters": full}
    scaling = {name: value for name, value in full.items() if name != "rope_theta"}
    return kept | {
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else scaling,
    }


def _section(given: dict[str, Any], rope: Rope) -> dict[str, Any]:
    """Returns settings in new names, as they were given; where none were, those that the family takes then."""
    own = {name: value for name, value in given.items() if name not in ("rope_theta", *TEXTS)}
    if not own and rope.kind in FIELDS:
        found = {
            name: getattr(rope, ATTRIBUTES.get(name, name)) for name in sorted(FIELDS[rope.kind])
        }
        own = {name: value for name, value in found.items() if value or value is False}
    if rope.kind in ("llama3", "yarn"):  # which transformers 4 asks for
        own.setdefault("original_max_position_embeddings", rope.original_max_positions)
    return {"rope_type": rope.kind} | own | {"rope_theta": rope.theta}
