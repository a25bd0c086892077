"""Weights & Biases; WANDB_MODE=offline keeps a run on disk, WANDB_API_KEY and `wandb login` are the service's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# An optional package, whose types a checkout without it does not have.
wandb: Any = importlib.import_module("wandb")


class Service:
    """One run of a project."""

    def __init__(
        self, workdir: Path, fields: dict[str, Any], project: str, name: str, identity: str
    ) -> None:
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity or None,
            resume="allow",
            dir=str(workdir),
            config=fields,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.identity = str(self._run.id)
        # Steps are a metric of their own: the service's count cannot go back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a step's metrics."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Ends the run and uploads what waits."""
        self._run.finish()
