#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest, for example -m "not slow".
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python -m pip install --quiet --disable-pip-version-check -e '.[test]'
# Without a restart: pytest-xdist waits for ever for the tests of a worker that crashed.
python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
