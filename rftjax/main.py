"""Flags, the config's check, and one of the modes: train, eval, check, plan, serve, chat or score."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from rftjax.config.fields import cache_folder
from rftjax.config.flags import WITHOUT_SPEC, parse_flags
from rftjax.devices import huge_pages

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Directory of the run; one with a checkpoint goes on from there."
)
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "check", "plan", *WITHOUT_SPEC], "What to do."
)
DEVICE = flags.DEFINE_string(
    "device", "H100", "Kind of device that --mode=plan plans for; docs/planning.md lists them."
)
DEVICES = flags.DEFINE_integer(
    "devices", 0, "Number of devices that --mode=plan plans for (0: the fewest that hold the job)."
)
PRICE = flags.DEFINE_float("price", 0.0, "Price of a device hour, for the cost in --mode=plan.")
COMPILE = flags.DEFINE_bool(
    "compile", False, "Have XLA compile the step for the devices of --mode=plan, without them."
)
RESTART_FROM = flags.DEFINE_integer(
    "restart_from", -1, "Go back to the checkpoint of this step and drop what follows it (-1: no)."
)
ACCEPT = flags.DEFINE_list(
    "accept_changed", [], "Inputs of the run that may differ from those that it began with."
)
ROLLOUTS = flags.DEFINE_string(
    "rollouts",
    "",
    "What --mode=score scores: a run's workdir, or a JSONL file of rollouts or conversations (the workdir's own).",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "For a run of several processes: HOST:PORT of process 0, or auto (Slurm, Cloud TPU, GKE); none: one process.",
)
PROCESSES = flags.DEFINE_integer("processes", 0, "How many processes there are, with HOST:PORT.")
PROCESS = flags.DEFINE_integer("process", -1, "The number of this process, with HOST:PORT.")
INTERRUPTED = 130  # the exit code of a run that a signal ended
STOP_AFTER = flags.DEFINE_integer(
    "stop_after", 0, "End cleanly after this step (0: at the config's last)."
)
STEP = flags.DEFINE_string(
    "step",
    "",
    "Step that --mode=eval evaluates: a checkpoint's, best, or last (the default); serve and chat take the best.",
)


def main(argv: list[str]) -> None:
    """Runs the mode; errors that the user can mend are printed without a traceback, others are kept in the workdir."""
    if argv[1:]:
        sys.exit(
            f"error: unknown arguments {argv[1:]}; settings are given as --config.section.field=value"
        )
    served = MODE.value in WITHOUT_SPEC
    if not (WORKDIR.value or served or MODE.value == "plan"):
        sys.exit("error: --workdir: must be given, a directory for the run's files")
    if STOP_AFTER.value < 0:
        sys.exit(
            f"error: --stop_after={STOP_AFTER.value}: must be a step, or 0 for the config's last"
        )
    if STEP.value and not (MODE.value == "eval" or (served and WORKDIR.value)):
        sys.exit(
            f"error: --step={STEP.value}: names a checkpoint of --workdir for --mode=eval, serve or chat; leave it out"
        )
    if RESTART_FROM.value < -1 or (RESTART_FROM.value >= 0 and MODE.value != "train"):
        sys.exit(
            f"error: --restart_from={RESTART_FROM.value}: must be a step with a checkpoint, in mode train"
        )
    if ROLLOUTS.value and MODE.value != "score":
        sys.exit(f"error: --rollouts={ROLLOUTS.value}: is what --mode=score scores; leave it out")
    for flag in (DEVICE, DEVICES, PRICE, COMPILE):
        if flag.present and MODE.value != "plan":
            sys.exit(
                f"error: --{flag.name}={flag.value}: is what --mode=plan plans with; leave it out"
            )
    _check_processes()
    logging.set_verbosity(logging.WARNING)
    # Elsewhere, as in a script's background, it is ignored.
    if heeded := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    import jax

    from rftjax import modes
    from rftjax.devices import processes
    from rftjax.run import failures
    from rftjax.run.interruption import Interrupted

    # A second start finds its compiled programs here; JAX_COMPILATION_CACHE_DIR names another place.
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache_folder(), "compiled"))
    if MODE.value == "plan":
        # No device is used; a plugin for some would look for them, and a program for devices that are not here is not
        # one to keep.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        if COORDINATOR.value:
            processes.start(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        jax.device_count()
    except (RuntimeError, AssertionError):  # what JAX raises without the backend
        platforms = os.environ.get("JAX_PLATFORMS", "")
        sys.exit(
            f"error: JAX_PLATFORMS={platforms!r}: JAX finds no such device; unset it, or install the accelerator's"
            " plugin (./scripts/setup.sh cuda or tpu)"
        )
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    workdir = Path(WORKDIR.value).expanduser().absolute() if WORKDIR.value else None
    back = {"restart_from": RESTART_FROM.value, "accepted": ACCEPT.value}
    planned = {"device": DEVICE.value, "devices": DEVICES.value, "price": PRICE.value}
    planned["compiles"] = COMPILE.value
    run = (CONFIG.value, overrides, workdir, STOP_AFTER.value, STEP.value)
    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        modes.run(MODE.value, *run, **back, **planned, rollouts=ROLLOUTS.value)
    except (Interrupted, KeyboardInterrupt) as error:
        print(failures.interrupted(error, RESTART_FROM.value >= 0), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if message := failures.explain(error) or failures.unread(error):
            logging.debug("the traceback", exc_info=True)
            sys.exit(f"error: {message}")
        if path := None if served or workdir is None else failures.record(workdir, error):
            print(
                f"error: a fault of rftjax or of the machine, as below; for a report it is in {path}",
                file=sys.stderr,
            )
        raise


def _end_at_once(number: int, frame: object) -> None:
    """Ends the program; an exception would be lost where a library that is being imported catches all of them."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _check_processes() -> None:
    """Ends the program where the flags do not say which of how many processes this is."""
    where, several, this = COORDINATOR.value, PROCESSES.value, PROCESS.value
    if where and MODE.value != "train":
        sys.exit(
            f"error: --coordinator={where}: several processes run --mode=train only; start one alone"
        )
    if where and where != "auto" and not (":" in where and 0 <= this < several):
        sys.exit(
            f"error: --coordinator={where}: must be auto, or HOST:PORT with --processes=N and --process=I, from 0 to"
            f" N - 1 and another for each; there are {several} and {this}"
        )
    if (several or this >= 0) and (not where or where == "auto"):
        sys.exit(
            f"error: --processes={several}, --process={this}: go with --coordinator=HOST:PORT; leave them out"
        )


if __name__ == "__main__":
    huge_pages.start_again()
    app.run(main, flags_parser=parse_flags)
