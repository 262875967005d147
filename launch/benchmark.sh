#!/usr/bin/env bash
# Measures the speed of the paper's networks on one GPU, with random weights and no data:
#   bash launch/benchmark.sh
# Writes performance.jsonl, one line per row, and performance.md, a table, into OUT (`benchmark` if
# not set). Arguments go to binlatent.benchmark, for example --repeats=3. After 8 minutes it ends.
# With exit code 124 rows are missing: run it again to measure them.
# Not tested on a GPU.
set -euo pipefail
out=$(realpath -m "${OUT:-benchmark}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Installs nothing and makes no virtual environment: GPU machines often have their own JAX.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
  source .venv/bin/activate
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # one GPU by default
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}  # fails without a GPU
mkdir -p "$out"
timeout --foreground --kill-after=5 470 \
  python3 -m binlatent.benchmark paper "$@" --out="$out/performance.jsonl" \
  | tee "$out/performance.md"
