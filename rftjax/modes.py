"""What `--mode` chooses: a run with its export and summary, an evaluation, check, plan, server, talk or scores."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rftjax import train
from rftjax.config.fields import flatten
from rftjax.devices import processes
from rftjax.errors import UserError
from rftjax.monitor import recorder as metrics
from rftjax.run import build as job
from rftjax.run import (
    checkpoint,
    evaluating,
    failures,
    inputs,
    lock,
    preflight,
    recorded,
    rescoring,
    results,
    serving,
)
from rftjax.run import plan as planning

EXPORT_S = 24 * 3600  # that the other processes wait for the first one's export


def run(
    mode: str,
    given: ConfigDict,
    overrides: dict[str, Any],
    workdir: Path | None,
    stop_after: int = 0,
    step: str = "",
    *,
    restart_from: int = -1,
    accepted: Sequence[str] = (),
    device: str = "",
    devices: int = 0,
    price: float = 0.0,
    compiles: bool = False,
    rollouts: str = "",
) -> None:
    """Runs a mode; raises what `train.train` raises and ValueError for bad input. `step` is what eval evaluates,
    serve serves and chat talks to; `device`, `devices` and `price` are what plan plans for, `compiles` has it ask the
    compiler; `rollouts` is what score scores, by default the workdir's own.

    Only a run writes a config and takes a lock: the others may run beside it. Plan, serve and chat need no workdir.
    """
    if mode == "plan":
        print("\n".join(planning.report(given, device, devices, price, compiles=compiles)))
        return
    if mode in ("serve", "chat"):
        config = serving.served_config(given, overrides, workdir)
        if mode == "chat":
            config.sampler.slots = 1
        (serving.serve if mode == "serve" else serving.chat)(config, workdir, step)
        return
    if workdir is None:
        raise UserError("--workdir: must be given, a directory for the files of this mode")
    if mode == "score":
        place = Path(rollouts).expanduser().absolute() if rollouts else workdir
        recorded.files(place)  # a mistyped path is told before what its config would lack
        metrics.check_workdir(workdir)
        config = rescoring.score_config(given, overrides, workdir, place)
        print("\n".join(rescoring.score(config, workdir, place)))
        return
    if mode == "check":
        metrics.check_workdir(workdir)
        preflight.check(given, workdir)
        return
    if mode == "eval":
        evaluating.check_run(workdir)
        metrics.check_workdir(workdir)
        config = job.open_config(workdir, given, overrides)
        print("\n".join(evaluating.evaluate(config, workdir, step or "last")))
        return
    with contextlib.ExitStack() as alone:
        with processes.together():
            metrics.check_workdir(workdir)
            text = alone.enter_context(lock.held(workdir)) if processes.first() else ""
        text = processes.agree(text)
        with processes.together():
            lock.check_shared(workdir, text)
            config = job.open_config(workdir, given, overrides)
            if config.export:
                results.check_exports(workdir)
        started = {"stop_after": stop_after, "restart_from": restart_from, "accepted": accepted}
        installed = failures.versions() | {"rftjax's code": inputs.of_package()}
        everything = installed | started | flatten(config)
        processes.same(
            {name: repr(value) for name, value in everything.items()},
            "Start each with the same command and the same installation",
        )
        # The state is not kept: the export reads a checkpoint, and memory holds one of them.
        done = train.train(config, workdir, stop_after, restart_from, accepted)[1]
        if done and config.export and processes.first():
            results.export_run(config, workdir)
        checkpoint.meet(f"the export of {workdir}", seconds=EXPORT_S)
    if processes.first():
        print(results.summary(workdir))
