"""Reads a Hugging Face config's rotary settings (`rope_scaling`, newer `rope_parameters`)."""

from __future__ import annotations

from typing import Any

from rftjax.errors import UserError
from rftjax.models.decoder import Rope

FIELDS = {
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
        "truncate",
    },
}


def read_rope(fields: dict[str, Any]) -> Rope:
    """Returns the rotary settings; refuses a kind or a field that is not implemented."""
    found = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    theta = float(found.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0)
    partial = found.pop("partial_rotary_factor", None)
    if kind not in FIELDS:
        raise UserError(
            f"config.json: rope type {kind!r} is not implemented; rftjax knows {', '.join(FIELDS)}"
        )
    unknown = {name for name, value in found.items() if value is not None} - FIELDS[kind]
    if partial not in (None, 1, 1.0):
        unknown.add("partial_rotary_factor")
    if unknown and kind != "default":
        raise UserError(
            f"config.json: rope settings {sorted(unknown)} of type {kind!r} are not implemented;"
            f" rftjax knows {sorted(FIELDS[kind])}"
        )
    if partial not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor={partial} is not implemented, only 1")
    if kind != "default" and not found.get("factor"):
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
        truncate=bool(found.get("truncate", True)),
    )
