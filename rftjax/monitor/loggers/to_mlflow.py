"""MLflow; MLFLOW_TRACKING_URI names the server or folder, which is the workdir's own where it is not set."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import Any

# An optional package, whose types a checkout without it does not have.
mlflow: Any = importlib.import_module("mlflow")
entities: Any = importlib.import_module("mlflow.entities")

MOST = 100  # entries of one request


class Service:
    """One run of an experiment, which has the project's name."""

    def __init__(
        self, workdir: Path, fields: dict[str, Any], project: str, name: str, identity: str
    ) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"file://{workdir / 'mlflow'}"
        if uri.startswith("file:"):  # the library wants this said
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = mlflow.MlflowClient(uri)
        if identity:
            self.identity = identity
            self._client.update_run(identity, status="RUNNING")
            known = self._client.get_run(identity).data.params
        else:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            self.identity = self._client.create_run(experiment, run_name=name).info.run_id
            known = {}
        # Parameters cannot change; what a resume changed is a tag.
        given = {field: str(value)[:500] for field, value in fields.items()}
        new = [entities.Param(field, value) for field, value in given.items() if field not in known]
        changed = [
            entities.RunTag(f"changed.{f}", v) for f, v in given.items() if known.get(f, v) != v
        ]
        for start in range(0, len(new), MOST):
            self._client.log_batch(self.identity, params=new[start : start + MOST])
        if changed:
            self._client.log_batch(self.identity, tags=changed[:MOST])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a step's metrics."""
        now_ms = int(1000 * time.time())
        found = [entities.Metric(name, value, now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self.identity, metrics=found)

    def close(self) -> None:
        """Marks the run as ended."""
        self._client.set_terminated(self.identity)
