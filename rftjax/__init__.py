"""rftjax: reinforcement fine-tuning of language models in JAX."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Worker processes import this package for its records alone: nothing here may pull in JAX.
    if name in ("load", "Policy"):
        from rftjax import policy

        return getattr(policy, name)
    raise AttributeError(f"module 'rftjax' has no attribute {name!r}")
