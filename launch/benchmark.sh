#!/usr/bin/env bash
# Measures the speed of the paper's networks on one GPU, with random weights and no data:
#   bash launch/benchmark.sh
# Writes performance.jsonl, one line per row, and performance.md, a table, into OUT (`benchmark` if
# not set). Arguments go to binlatent.benchmark, for example --repeats=3. Ends after 8 minutes with exit
# code 124 if rows are missing; run again, it measures those.
# Not tried yet: a GPU.
set -euo pipefail
out=$(realpath -m "${OUT:-benchmark}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Installs nothing and makes no virtual environment: a GPU's machine often comes with its JAX.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
  source .venv/bin/activate
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # one, unless you name others
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}  # an error where there is no GPU
mkdir -p "$out"
timeout --foreground --kill-after=5 470 \
  python3 -m binlatent.benchmark paper "$@" --out="$out/performance.jsonl" \
  | tee "$out/performance.md"
