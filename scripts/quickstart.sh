#!/usr/bin/env bash
# Trains a small language model from nothing: ./scripts/quickstart.sh [WORKDIR]
#
# Installs the project, fetches the model, runs experiments/quickstart.py; the run itself prints the held-out reward
# before and after and where the exported model lies. The same command continues a run that was interrupted.
# Further arguments after WORKDIR go to rftjax.main (for example --config.steps=10).
set -euo pipefail

here="$(pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir="$PWD/workdir/quickstart"
if [[ $# -gt 0 && "$1" != --* ]]; then
  case "$1" in /*) workdir="$1" ;; *) workdir="$here/$1" ;; esac
  shift
fi
./scripts/setup.sh quickstart
.venv/bin/python scripts/fetch_model.py
exec .venv/bin/python -m rftjax.main --config=experiments/quickstart.py --workdir="$workdir" "$@"
