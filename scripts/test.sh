#!/usr/bin/env bash
# Lint, import rules, types and tests, from nothing: ./scripts/test.sh [PYTEST ARGUMENT ...]
#
# Each stage is named and timed; the first that fails ends the run. JOBS=N sets the number of test processes (2).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh test quickstart
.venv/bin/python scripts/fetch_model.py

began=$SECONDS
stage() {
  local name="$1" start=$SECONDS
  shift
  echo "== $name"
  "$@" || {
    local status=$?
    echo "test: $name failed after $((SECONDS - start)) s" >&2
    exit "$status"
  }
  echo "== $name: passed in $((SECONDS - start)) s"
}

# lint-imports and pyright look for the project and its libraries with the Python that is first on PATH.
export PATH="$PWD/.venv/bin:$PATH"
stage "lint" ruff check --no-cache .
stage "format" ruff format --no-cache --check .
stage "import rules" lint-imports --no-cache
stage "types" pyright
stage "tests" python -m pytest -q -n "${JOBS:-2}" --dist loadfile "$@"
echo "test: everything passed in $((SECONDS - began)) s"
