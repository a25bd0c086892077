"""The command `rftjax`: a run, an evaluation or a check by its flags, or one of a few other commands by name."""

from __future__ import annotations

import sys

from absl import app

from rftjax import compare
from rftjax.config import specs
from rftjax.weights import fetch_model

USAGE = """usage: rftjax --config=SPEC --workdir=DIR [--mode=check|train|eval] [--config.FIELD=VALUE ...]
       rftjax compare RUN [RUN ...]      what differs between runs, and what they learned
       rftjax fetch-model                fetches the small model of the specs quickstart and multi_turn

SPEC is a file, or one of {names}; NAME:debug is a short form.
"""


def run() -> None:
    """Runs the command of the arguments."""
    command = sys.argv[1] if sys.argv[1:] else ""
    if command == "compare":
        sys.exit(compare.main(sys.argv[2:]))
    if command == "fetch-model":
        fetch_model.main()
        return
    if command in ("", "help", "-h", "--help"):
        sys.stderr.write(USAGE.format(names=", ".join(specs.names())))
        sys.exit(0 if command else 2)
    from rftjax.config.flags import parse_flags
    from rftjax.main import main

    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
