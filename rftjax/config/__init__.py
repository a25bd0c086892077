"""The fields of a spec: their defaults and rules, the command line, and what a resume may change."""

from rftjax.config.fields import base_config, embedded_model, flatten
from rftjax.config.rules import REQUIRED, check, heldout_set
from rftjax.config.stored import from_json, to_json

__all__ = [
    "REQUIRED",
    "base_config",
    "check",
    "embedded_model",
    "flatten",
    "from_json",
    "heldout_set",
    "to_json",
]
