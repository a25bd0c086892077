"""Trackio; metrics stay on this machine (`trackio show`) unless TRACKIO_SPACE_ID names a Space."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# An optional package, whose types a checkout without it does not have.
trackio: Any = importlib.import_module("trackio")


class Service:
    """One run of a project, which a resume finds by its name."""

    def __init__(
        self, workdir: Path, fields: dict[str, Any], project: str, name: str, identity: str
    ) -> None:
        self.identity = identity or name
        plain = {
            field: list(value) if isinstance(value, tuple) else value
            for field, value in fields.items()
        }
        self._run = trackio.init(
            project=project, name=self.identity, config=plain, resume="allow", embed=False
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a step's metrics."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
