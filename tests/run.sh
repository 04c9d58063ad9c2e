#!/usr/bin/env bash
# Installs what is missing, runs the checks and the tests.
#
#   bash tests/run.sh            everything in its short form (what CI runs)
#   bash tests/run.sh --fast     without the tests that start servers or launchers
#   bash tests/run.sh --long     the full figures as well
#
# Anything behind the options goes to pytest, as in: bash tests/run.sh --fast -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/venv.sh

marks="not long"
case "${1:-}" in
  --fast) marks="not long and not services" && shift ;;
  --long) marks="" && shift ;;
esac

make_venv test

say "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .

say "pytest"
# One thread a process: tests start several ranks on few cores.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "$marks" "$@"
