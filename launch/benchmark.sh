#!/usr/bin/env bash
# Measures the table of docs/performance.md on one GPU, with random weights and no data:
#   bash launch/benchmark.sh
# Writes performance.jsonl, a line a row, and performance.md, the table, into OUT (`benchmark` if not
# set). Takes --repeats and --peak_tflops of binlatent.benchmark, for the rows that are missing.
# Ends after 8 minutes at the latest, with the rows that it has by then, the most wanted first, and
# then exits with 124. Run again, it measures what is missing, a row that ended it last; delete OUT
# to measure anew.
# Tried: tiny networks, on a CPU (JAX_PLATFORMS=cpu); compiling for an H100 without one. Not tried
# yet: a GPU.
set -euo pipefail
out=$(realpath -m "${OUT:-benchmark}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Installs nothing and makes no virtual environment: a GPU's machine often comes with its JAX.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
  source .venv/bin/activate
fi
for argument in "$@"; do
  case $argument in
    --out* | --json*)
      echo "$argument is not for this script, which writes lines of JSON into OUT=DIR." >&2
      exit 2
      ;;
    --help | -h) exec sed -n '/^set -/q; s/^# //p' launch/benchmark.sh ;;
  esac
done
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # one, unless you name others
python3 - <<'EOF'
import sys

try:
    import binlatent.benchmark
    import jax
except ImportError as error:
    sys.exit(f'{error}: in a virtual environment, pip install -e . "jax[cuda13]"')
try:
    backend = jax.default_backend()
except (AssertionError, RuntimeError) as error:  # the first without a text, where CUDA is missing
    backend = (str(error) or "no device").splitlines()[0]
if backend != "gpu" and jax.config.jax_platforms != "cpu":
    sys.exit(
        f"JAX sees no GPU here ({backend}): see what nvidia-smi says, and pip install -U "
        '"jax[cuda13]", or "jax[cuda12]" if its driver is older than 580.'
    )
EOF
mkdir -p "$out"

interrupted=
trap 'interrupted=1' INT  # ends the program that measures; the rows before still count
status=0
left=$((SECONDS < 469 ? 470 - SECONDS : 1))
timeout --foreground --kill-after=5 "$left" \
  python3 -m binlatent.benchmark paper "$@" --out="$out/performance.jsonl" > /dev/null || status=$?
if [ "$status" -eq 2 ]; then
  exit 2  # a misspelt argument
elif [ "$status" -gt 124 ] && [ -z "$interrupted" ] && [ "$SECONDS" -lt 470 ]; then
  echo "That row ended the program. Run it again: it goes on with the others." >&2
elif [ -z "$interrupted" ] && [ "$SECONDS" -ge 470 ]; then
  echo "The 8 minutes are over. Run it again: it goes on with the rows that are missing." >&2
fi

timeout --foreground 60 python3 - "$out" <<'EOF'
import sys
from pathlib import Path

from binlatent import paper_sizes, speed
from binlatent.errors import UserError

out = Path(sys.argv[1])
try:
    rows = paper_sizes.known(out / "performance.jsonl", paper_sizes.rows())
except UserError as error:
    sys.exit(str(error))
if not rows:
    sys.exit("No row was measured; what went wrong is above.")
(out / "performance.md").write_text(speed.table(list(rows.values())))
EOF
cat "$out/performance.md"
exit $status
