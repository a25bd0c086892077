"""Writes TensorBoard's files with only the `tensorboard` package: no TensorFlow, no PyTorch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rftjax.config.fields import base_config, flatten
from rftjax.monitor.rollouts import encode
from rftjax.presets import preset_fields

# TensorBoard opens on the first group by name: show the main metrics there as well.
OVERVIEW = {"eval/reward": "_overview/heldout_reward", "reward/mean": "_overview/training_reward"}
ALWAYS = (
    "seed",
    "steps",
    "grpo.preset",
    "optim.lr",
    "batch.prompts",
    "batch.group_size",
    "lora.rank",
)
NEVER = ("alarms.", "logging.", "checkpoint.", "scoring.", "environments.")


def hyperparameters(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Returns the fields in ALWAYS, and all others that differ from the defaults of the general spec."""
    defaults = flatten(base_config())
    preset = preset_fields(str(values.get("grpo.preset", "grpo")))
    defaults |= {f"grpo.{name}": value for name, value in preset.items()}
    found = {
        field: value
        for field, value in values.items()
        if field in ALWAYS or (value != defaults.get(field) and not field.startswith(NEVER))
    }
    return {
        field: value if isinstance(value, bool | int | float) else encode(str(value)).decode()
        for field, value in found.items()
        if value is not None and value != ()
    }


class Events:
    """One file in TensorBoard's format, written in the caller's thread so that a full disk raises.

    TensorBoard hides points of earlier files from `purge_step` on.
    """

    def __init__(self, directory: Path, *, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event_pb2: Any = event_pb2  # protocol buffers have no types that a checker sees
        self._summary_pb2: Any = summary_pb2
        directory.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        count = len(list(directory.glob(f"{stem}.*")))
        self._file = (directory / f"{stem}.{count:03d}").open("xb")
        self._writer: Any = RecordWriter(self._file)
        session = self._event_pb2.SessionLog
        start = session(status=session.START)
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=start)
        self._file.flush()

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        make = self._summary_pb2.Summary.Value
        first = {OVERVIEW[tag]: value for tag, value in metrics.items() if tag in OVERVIEW}
        found = [make(tag=tag, simple_value=x) for tag, x in {**metrics, **first}.items()]
        self._write_values(step, found)
        self._file.flush()

    def config(self, step: int, name: str, values: Mapping[str, Any]) -> None:
        """Shows all fields as a table in the text tab, and those of `hyperparameters` in the hparams tab.

        `values` are the fields by path, `name` is the run's.
        """
        from tensorboard.plugins.hparams import summary_v2 as hparams

        cell = {"|": "\\|", "\n": " "}
        rows = [
            f"| {field} | {str(value).translate(str.maketrans(cell))} |"
            for field, value in sorted(values.items())
        ]
        self.text(step, "config", "\n".join(["| field | value |", "|---|---|", *rows]))
        chosen = hyperparameters(values)
        metrics = [hparams.Metric(tag, display_name=tag) for tag in OVERVIEW]
        experiment = hparams.hparams_config_pb([hparams.HParam(field) for field in chosen], metrics)
        session = hparams.hparams_pb(chosen, trial_id=name)
        for summary in (experiment, session):
            self._write(step=step, summary=summary)
        self._file.flush()

    def text(self, step: int, tag: str, markdown: str) -> None:
        from tensorboard.plugins.text import metadata

        encoded = np.array(encode(markdown), dtype=object)
        self._tensor(step, tag, encoded, metadata.create_summary_metadata(None, None))

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Writes thirty equal buckets, each (left edge, right edge, count); nothing without a finite value."""
        from tensorboard.plugins.histogram import metadata

        flat = np.asarray(values, np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if flat.size:
            counts, edges = np.histogram(flat, bins=30)
            buckets = np.stack([edges[:-1], edges[1:], counts], axis=1)
            self._tensor(step, tag, buckets, metadata.create_summary_metadata(None, None))

    def close(self) -> None:
        self._file.close()

    def _tensor(self, step: int, tag: str, tensor: np.ndarray, metadata: Any) -> None:
        from tensorboard.util import tensor_util

        proto = tensor_util.make_tensor_proto(tensor)
        make = self._summary_pb2.Summary.Value
        self._write_values(step, [make(tag=tag, metadata=metadata, tensor=proto)])

    def _write_values(self, step: int, values: list[Any]) -> None:
        self._write(step=step, summary=self._summary_pb2.Summary(value=values))

    def _write(self, **fields: Any) -> None:
        event = self._event_pb2.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
