#!/usr/bin/env bash
# Measures the table of docs/performance.md on one GPU, with random weights and no data:
#   bash launch/benchmark.sh
# Writes performance.jsonl, a line a row, and performance.md, the table, into OUT (`benchmark` if not
# set). Arguments go to every call of binlatent.benchmark, for example --repeats=5.
# Ends after 8 minutes at the latest, with the rows that it has by then; the most wanted come first.
# Tried: tiny networks, on a CPU (JAX_PLATFORMS=cpu); compiling for an H100 without one. Not tried
# yet: a GPU.
set -euo pipefail
out=$(realpath -m "${OUT:-benchmark}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Installs nothing and makes no virtual environment: a GPU's machine often comes with its JAX.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
  source .venv/bin/activate
fi
python3 - <<'EOF'
import sys

try:
    import binlatent.benchmark
    import jax
except ImportError as error:
    sys.exit(f'{error}: pip install -e . "jax[cuda13]"')
if jax.default_backend() != "gpu" and jax.config.jax_platforms != "cpu":
    sys.exit('JAX sees no GPU here: pip install -U "jax[cuda13]", and see what nvidia-smi says.')
EOF
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # one, unless you name others
mkdir -p "$out"
: > "$out/performance.jsonl"
options=(--config.dtype=bfloat16 --out="$out/performance.jsonl" "$@")

# Ctrl-C ends the program that runs, which says so by its exit code; the rows before still count.
interrupted=
trap 'interrupted=1' INT

measure() {
  if [ -n "$interrupted" ]; then
    return
  fi
  echo "$*  ($SECONDS s so far)" >&2
  if [ "$SECONDS" -ge 460 ]; then
    echo "Left out, as the 8 minutes are over." >&2
    return
  fi
  timeout --foreground $((470 - SECONDS)) python3 -m binlatent.benchmark "$@" "${options[@]}" > /dev/null ||
    echo "Failed or cut off; the table goes on without it." >&2
}

# 24 x 512 without classes and 24 x 768 with them, at 256 and 1,024 tokens.
churches=(--config=configs/churches256.py --config.prior.cache_codes=True)
imagenet=(--config=configs/imagenet256.py --config.prior.cache_codes=True
  --config.data.num_classes=1000)
ffhq=(--config=configs/ffhq1024.py --config.prior.cache_codes=True)
imagenet512=("${imagenet[@]}" --config.data.image_size=512
  "--config.autoencoder.attention_resolutions=(32,)")

measure sample "${churches[@]}" --batch_size=1 --steps=16 --steps=64
measure sample "${churches[@]}" --batch_size=64 --steps=16
measure train_prior "${imagenet[@]}" --batch_size=64
measure sample "${imagenet[@]}" --batch_size=1 --batch_size=64 --steps=16
measure train_autoencoder "${churches[@]}" --batch_size=8
measure train_prior "${churches[@]}" --batch_size=64
measure train_prior "${imagenet512[@]}" --batch_size=16
measure decode "${churches[@]}" --batch_size=1 --batch_size=64
measure encode "${churches[@]}" --batch_size=64
measure train_prior "${ffhq[@]}" --batch_size=16
measure network "${churches[@]}" --batch_size=1 --batch_size=64
measure network "${imagenet[@]}" --batch_size=64
measure network "${ffhq[@]}" --batch_size=1 --batch_size=16
measure network "${imagenet512[@]}" --batch_size=16

python3 - "$out" <<'EOF'
import json
import sys
from pathlib import Path

from binlatent import speed

out = Path(sys.argv[1])
rows = [json.loads(line) for line in (out / "performance.jsonl").read_text().splitlines()]
if not rows:
    sys.exit("No row was measured; what went wrong is above.")
(out / "performance.md").write_text(speed.table(rows))
EOF
cat "$out/performance.md"
