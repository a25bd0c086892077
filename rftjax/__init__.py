"""rftjax: reinforcement fine-tuning of language models in JAX."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from typing import Any

# Worker processes import this package for its records alone: names are looked up when they are asked for, so that
# nothing here pulls in JAX.
_POLICY = ("Policy", "load")


def __getattr__(name: str) -> Any:
    if name in _POLICY:
        return getattr(importlib.import_module("rftjax.policy"), name)
    if name == "__version__":
        try:
            return importlib.metadata.version("rftjax")
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    if name in _modules():
        return importlib.import_module(f"rftjax.{name}")
    raise AttributeError(f"module 'rftjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    own = [name for name in globals() if name.startswith("__")]
    return sorted({*own, *_POLICY, "__version__", *_modules()})


def _modules() -> list[str]:
    return [found.name for found in pkgutil.iter_modules(__path__)]
