#!/usr/bin/env bash
# Runs the tests, and sets up first where nothing is installed yet. Arguments go to pytest:
#
#   ./tests/run.sh                     everything that this machine can run
#   ./tests/run.sh tests/test_mask.py -k block
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source setup.sh requirements-dev.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one process per core, one thread each
exec "$PYTHON" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
