#!/usr/bin/env bash
# Installs packages for the tests, runs these; arguments go to pytest, for example -m "not slow".
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python -m pip install --quiet --disable-pip-version-check -e '.[test]'
# No restarts: pytest-xdist waits for ever for the tests of a crashed worker.
python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
