"""Opens what a run keeps in its workdir: checkpoints, metrics and rollouts, and the binding to its inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rftjax import config as configs
from rftjax.devices import processes
from rftjax.monitor import alarms
from rftjax.monitor.loggers import open_loggers
from rftjax.monitor.recorder import Recorder
from rftjax.run.binding import Binding
from rftjax.run.build import Parts
from rftjax.run.checkpoint import Checkpoints
from rftjax.run.heldout import set_field
from rftjax.run.inputs import fingerprints
from rftjax.tasks import TaskStream


def open_checkpoints(parts: Parts, *, read_only: bool = False) -> Checkpoints:
    """Returns the checkpoints; what never changes in training is left out of them."""
    config = parts.config
    # The reference of adapters is written: those of lora.path may be others by the time of a resume.
    still = config.grpo.kl_refresh_steps == 0 and not config.lora.rank
    return Checkpoints(
        parts.workdir / "checkpoints",
        read_only=read_only,
        fixed=["frozen"] + ["reference"] * still,
        **config.checkpoint,
    )


def open_binding(parts: Parts, stream: TaskStream, accepted: Sequence[str]) -> Binding:
    """Returns the run's tie to its workdir; UserError where inputs have changed and that is not `accepted`."""
    named = {set_field(name): found for name, found in parts.heldout.sets.items()}
    primary = processes.first()
    with processes.together():
        found = fingerprints(parts.config, stream, named)
        binding = Binding(parts.workdir, parts.given, found, accepted=accepted, primary=primary)
    processes.same(
        {
            f"{field} ({part})": value[:12]
            for field, of in found.items()
            for part, value in of.items()
        },
        "Give all of them the same files",
    )
    return binding


def open_recorder(parts: Parts, resume_step: int) -> Recorder:
    """Returns the recorder, which keeps the metrics and rollouts up to `resume_step`, 0 for none."""
    section = parts.config.logging.to_dict()
    fields = configs.flatten(parts.config)
    primary = processes.first()
    settings = {name: section.pop(name) for name in ("project", "name")}
    services = section.pop("to")
    loggers = open_loggers(services, parts.workdir, fields, **settings) if primary else None
    return Recorder(
        parts.workdir,
        steps=parts.config.steps,
        # Without a checkpoint all that lies there is another run's.
        resume_step=resume_step or -1,
        primary=primary,
        alarms=functools.partial(alarms.find, **parts.config.alarms),
        config=fields,
        loggers=loggers,
        agree=processes.agree,
        **section,
    )
