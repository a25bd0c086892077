"""The settings of advantages and losses under the names of their config fields, and the named presets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rftjax.errors import UserError

CHOICES = {
    "baseline": ("mean", "leave_one_out", "batch_mean", "none"),
    "scale": ("group", "batch", "none"),
    "objective": ("clip", "cispo", "sapo", "reinforce"),
    "ratio": ("token", "sequence"),
    "aggregate": ("token_mean", "sequence_mean", "constant"),
    "kl": ("k1", "k2", "k3"),
}

ADVANTAGE_DEFAULTS: dict[str, Any] = {"baseline": "mean", "scale": "group", "eps": 1e-4}


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The settings of `policy_loss`, under the names of their config fields; 0.0 switches a thing off."""

    objective: str = "clip"
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    aggregate: str = "token_mean"
    max_tokens: int = 0
    kl_weight: float = 0.0
    kl: str = "k3"
    kl_times_ratio: bool = False
    entropy_weight: float = 0.0
    tis_cap: float = 0.0

    def __post_init__(self) -> None:
        check_fields(dataclasses.asdict(self))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> LossSettings:
        """Returns the settings among `fields`, which may hold others (the section grpo of a config)."""
        return cls(**{name: fields[name] for name in LOSS_DEFAULTS if name in fields})


LOSS_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(LossSettings)
}

# What each preset changes of the defaults above. Sources: Shao et al. 2024 (GRPO), Liu et al. 2025
# (Dr. GRPO), Yu et al. 2025 (DAPO), Zheng et al. 2025 (GSPO), MiniMax 2025 (CISPO), Ahmadian et
# al. 2024 (RLOO), Hu 2025 (REINFORCE++).
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregate": "sequence_mean"},
    "dr_grpo": {"scale": "none", "aggregate": "constant"},
    "dapo": {"clip_high": 0.28},
    "gspo": {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregate": "sequence_mean",
    },
    "cispo": {"objective": "cispo", "clip_high": 0.28},
    "rloo": {"baseline": "leave_one_out", "scale": "none", "objective": "reinforce"},
    "reinforce_pp": {"baseline": "batch_mean", "scale": "batch"},
    "fireworks_grpo": {"kl_weight": 0.001, "kl": "k3"},
    "fireworks_dapo": {"clip_high": 0.28},
    "fireworks_gspo_token": {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregate": "sequence_mean",
    },
}


def preset_fields(preset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns every advantage and loss field of a preset with the overrides that are not None put
    in.

    `max_tokens` stays 0 unless given: with the `constant` aggregate the caller fills in its own
    limit. Raises ValueError for an unknown preset or field and for a value that its field does not
    take.
    """
    if preset not in PRESETS:
        raise UserError(f"grpo.preset={preset!r}: must be one of {', '.join(sorted(PRESETS))}")
    fields = {**ADVANTAGE_DEFAULTS, **LOSS_DEFAULTS, **PRESETS[preset]}
    for name, value in (overrides or {}).items():
        if name not in fields:
            raise UserError(
                f"grpo.{name}={value!r}: no such field; the fields are {', '.join(sorted(fields))}"
            )
        if value is not None:
            fields[name] = value
    check_fields(fields)
    return fields


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, for a value that an advantage or loss field does not
    take.
    """
    for name, value in fields.items():
        if name in CHOICES:
            own = name == "baseline" and ":" in str(value)  # a user's function
            if value not in CHOICES[name] and not own:
                choices = ", ".join(CHOICES[name])
                more = " or 'file.py:name' of a function" * (name == "baseline")
                raise UserError(f"grpo.{name}={value!r}: must be one of {choices}{more}")
        elif value is None or isinstance(value, str) or not np.isfinite(value) or value < 0:
            raise UserError(f"grpo.{name}={value!r}: must be a finite number that is not negative")
    for name in ("sapo_tau_pos", "sapo_tau_neg"):
        if fields.get(name) == 0:
            raise UserError(f"grpo.{name}=0: a temperature, must be positive")
    dual_clip = fields.get("dual_clip", 0.0)
    if 0 < dual_clip <= 1:
        raise UserError(
            f"grpo.dual_clip={dual_clip!r}: a bound on the ratio, must be above 1 (0.0 switches it off)"
        )
