"""The command `rftjax`: a run, an evaluation or a check by its flags, or one of a few other commands by name."""

from __future__ import annotations

import os
import sys
from importlib import metadata

from absl import app

from rftjax import compare
from rftjax.config import specs
from rftjax.config.flags import WITHOUT_SPEC
from rftjax.devices import huge_pages
from rftjax.weights import fetch_model

USAGE = """usage: rftjax --config=SPEC --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE]
                                         MODE is train, check, plan, eval, score, serve or chat
       rftjax chat MODEL | RUN           talks to a model or to a run's best checkpoint, in the terminal
       rftjax serve MODEL | RUN          serves it in OpenAI's formats (flags as above follow)
       rftjax score RUN                  scores a run's rollouts again, with --config.evaluator=...
       rftjax compare RUN [RUN ...]      what differs between runs, and what they learned
       rftjax fetch-model                fetches the small model of the specs quickstart and multi_turn
       rftjax version                    says which version this is, and JAX's and Flax's

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
    if command in ("version", "--version"):
        versions = (f"{name} {metadata.version(name)}" for name in ("rftjax", "jax", "flax"))
        sys.stdout.write(", ".join(versions) + "\n")
        return
    if command in ("", "help", "-h", "--help"):
        sys.stderr.write(USAGE.format(names=", ".join(specs.names())))
        sys.exit(0 if command else 2)
    if command in WITHOUT_SPEC:
        if not sys.argv[2:]:
            sys.exit(f"error: rftjax {command}: give a model, or the workdir of a run")
        sys.argv[1:3] = [f"--mode={command}", _model_or_run(command, sys.argv[2])]
    elif not command.startswith("-"):
        sys.exit(
            f"error: rftjax {command}: no such command; there is chat, serve, score, compare, fetch-model and version,"
            " and --config=SPEC --workdir=DIR for a run (--mode=check, plan or eval for what these do)"
        )
    from rftjax.config.flags import parse_flags
    from rftjax.main import main

    app.run(main, flags_parser=parse_flags)


def _model_or_run(command: str, place: str) -> str:
    """Returns the flag that names a model or a run's workdir; a flag stays as it is."""
    if place.startswith("-"):
        return place
    is_run = os.path.isdir(os.path.join(os.path.expanduser(place), "checkpoints"))
    if is_run or command == "score":
        return f"--workdir={place}"
    return f"--config.model.path={place}"


def program() -> None:
    """Runs the command as a program of its own, in huge pages."""
    huge_pages.start_again()
    run()


if __name__ == "__main__":
    program()
