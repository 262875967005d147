# Sourced by the other scripts: enters the checkout, and a virtual environment if none is active.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
activate=""  # printed before commands, to activate the environment
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/pip ]; then
    # Debian's python3 may lack the parts that make a virtual environment.
    python3 -m venv .venv || {
      rm -rf .venv
      echo "python3 cannot make a virtual environment: install the package python3-venv." >&2
      exit 1
    }
  fi
  source .venv/bin/activate
  activate="source .venv/bin/activate; "
fi

local_only() {  # refuses a URL, which would become a folder
  if [[ $1 == *://* ]]; then
    echo "WORKDIR=$1 is not a local path: mount it, and give the path where it is mounted." >&2
    exit 1
  fi
}
