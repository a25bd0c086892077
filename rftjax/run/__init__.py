"""The parts of one run: workdir, build, checkpoints, evaluation, the check, and the way out."""
