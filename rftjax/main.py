"""Flags, the config's check, and one of three modes: train, eval or check."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from rftjax.errors import UserError
from rftjax.fields import cache_folder
from rftjax.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Directory of the run; one with a checkpoint goes on from there."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "check"], "What to do.")
STOP_AFTER = flags.DEFINE_integer(
    "stop_after", 0, "End cleanly after this step (0: at the config's last)."
)
STEP = flags.DEFINE_string(
    "step", "", "Step that --mode=eval evaluates: a checkpoint's, best, or last (the default)."
)


def main(argv: list[str]) -> None:
    """Runs the mode; errors that the user can mend are printed without a traceback."""
    if argv[1:]:
        sys.exit(
            f"error: unknown arguments {argv[1:]}; settings are given as --config.section.field=value"
        )
    if not WORKDIR.value:
        sys.exit("error: --workdir: must be given, a directory for the run's files")
    if STOP_AFTER.value < 0:
        sys.exit(
            f"error: --stop_after={STOP_AFTER.value}: must be a step, or 0 for the config's last"
        )
    if STEP.value and MODE.value != "eval":
        sys.exit(f"error: --step={STEP.value}: is what --mode=eval evaluates; leave it out")
    logging.set_verbosity(logging.WARNING)
    import jax

    from rftjax import modes

    # A second start finds its compiled programs here; JAX_COMPILATION_CACHE_DIR names another place.
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache_folder(), "compiled"))
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    try:
        workdir = Path(WORKDIR.value).absolute()
        modes.run(MODE.value, CONFIG.value, overrides, workdir, STOP_AFTER.value, STEP.value)
    except (UserError, OSError) as error:
        logging.debug("the traceback", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
