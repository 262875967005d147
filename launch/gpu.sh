#!/usr/bin/env bash
# On one GPU, in at most 14 minutes: measures rows of the benchmark, then trains and measures
# cifar10:gpu.
#   bash launch/gpu.sh
# After a kill or the time limit, the same command with the same WORKDIR continues; completed parts
# are skipped. Arguments go to binlatent.main, for example --config.seed=1.
#
#   IMAGES   archive of train/CLASS/*.jpg and test/CLASS/*.jpg, default cifar10.tar.gz:
#              tar czf cifar10.tar.gz -C DIR train test
#   WEIGHTS  folder with inception.npz or efficientnet.npz, the network of the metrics; without
#              either it is a classifier. docs/evaluation.md describes how to make them
#   OUT      folder of results, default gpu: 8 files of at most 16 MiB each
#   WORKDIR  folder of images and checkpoints, 4 GB, default runs/gpu
#   LIMIT    total seconds, default 840; RESERVE, seconds reserved for measuring, default 170;
#              BENCHMARK, seconds for the benchmark at the start, default 90. The benchmark also
#              gets the time that is left at the end
#   WHEELS   folder of wheels for a machine without a network, installed into WORKDIR. The machine
#              needs jax[cuda13], flax, optax, orbax-checkpoint, scipy, matplotlib and Pillow. These
#              wheels are added; PY is the version of Python, such as 3.12:
#              pip download --no-deps --only-binary=:all: --python-version PY \
#                --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest WHEELS \
#                grain array_record ml_collections portpicker cloudpickle tqdm scikit-image \
#                lazy-loader 'orbax-checkpoint<1'
# Without a GPU it fails, unless JAX_PLATFORMS=cpu is set for a test.
# Tested on a CPU, with tiny steps and with kills. Not tested on a GPU.
set -euo pipefail
for path in "${OUT:-}" "${WORKDIR:-}"; do
  if [[ $path == *://* ]]; then  # it would become a folder
    echo "$path is not a local path: mount it, and give the path where it is mounted." >&2
    exit 1
  fi
done
out=$(realpath -m "${OUT:-gpu}")
work=$(realpath -m "${WORKDIR:-runs/gpu}")
images=$(realpath -m "${IMAGES:-cifar10.tar.gz}")
weights=$(realpath -m "${WEIGHTS:-.}")
wheels=${WHEELS:+$(realpath -m "$WHEELS")}
limit=${LIMIT:-840} reserve=${RESERVE:-170} benchmark=${BENCHMARK:-90}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
  source .venv/bin/activate
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}  # one GPU by default
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}  # fails without a GPU
run=$work/run  # the workdir of binlatent.main
if [ ! -d "$work/images" ] && [ ! -f "$images" ]; then
  echo "There is no archive $images: set IMAGES=... to it, or make one of a folder DIR with" \
    "train/CLASS/*.jpg and test/CLASS/*.jpg: tar czf cifar10.tar.gz -C DIR train test" >&2
  exit 1
fi
mkdir -p "$out" "$work/done" "$run"
exec > >(tee -a "$work/log.txt") 2>&1

is_done() { [ -f "$work/done/$1" ]; }
mark() { touch "$work/done/$1"; }
left() { echo $((limit - 20 - SECONDS)); }  # 20 s to save after SIGTERM, and to collect

# Runs a command for at most $1 seconds; returns 124 if it did not end, or had no time to start.
within() {
  local seconds=$1 status=0
  shift
  [ "$seconds" -ge 20 ] || return 124
  timeout --foreground --kill-after=15 "$seconds" "$@" || status=$?
  echo "[$SECONDS s] Ended with $status: ${*: -2}" >&2
  return "$status"
}

# Copies a file to OUT; a kill leaves no partial file.
bring() {
  [ -f "$1" ] || return 0
  cp "$1" "$out/$2.part" && mv "$out/$2.part" "$out/$2"
}

# Copies all results that exist; also at the start, because OUT may be a new folder.
collect() {
  bring "$work/performance.jsonl" performance.jsonl
  local name
  for name in "$run"/{samples,reconstructions}.png "$work"/kept/guidance*.npz; do
    bring "$name" "$(basename "$name")"
  done
  (
    shopt -s nullglob
    cd "$work"
    tar czf results.tar.gz --ignore-failed-read --warning=no-file-changed log.txt \
      performance*.md run/*.json{l,} run/evaluation/*.json run/figures/*.png
  ) || true
  bring "$work/results.tar.gz" results.tar.gz
}

measure_rows() {  # for $1 seconds
  within "$1" python3 -m binlatent.benchmark paper --out="$work/performance.jsonl" \
    > "$work/performance.md"
}

if [ -n "$wheels" ]; then
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
  if ! is_done wheels; then
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
      --target "$work/site" "$wheels"/*.whl
    mark wheels
  fi
fi
timeout --foreground 120 python3 -c "
import jax
try:
    devices = jax.devices()
except (AssertionError, RuntimeError) as error:  # without CUDA jaxlib has no driver to assert
    reason = ' '.join(str(error).split()) or 'jax has no CUDA'
    raise SystemExit(
        f'JAX {jax.__version__} finds no GPU ({reason}): run this where nvidia-smi lists one, '
        'with jax[cuda13] installed, or set JAX_PLATFORMS=cpu for a test.')
print(f'JAX {jax.__version__}: {len(devices)} of the kind {devices[0].device_kind}')"

if [ ! -d "$work/images" ]; then
  rm -rf "$work/unpacked"
  mkdir "$work/unpacked"
  tar xzf "$images" -C "$work/unpacked"
  mv "$work/unpacked" "$work/images"
fi
network=classifier
for name in inception efficientnet; do
  if [ -f "$weights/$name.npz" ]; then
    network=$name
    break
  fi
done
config=(--config=configs/cifar10.py:gpu --workdir="$run")
config+=(--config.data.name=folder --config.data.path="$work/images")
config+=(--config.evaluate.network="$network")
[ "$network" = classifier ] || config+=(--config.evaluate.weights="$weights/$network.npz")
main=(python3 -m binlatent.main "${config[@]}" "$@")
collect

if ! is_done benchmark; then
  measure_rows "$((benchmark < $(left) ? benchmark : $(left)))" || true
  mark benchmark
  collect
fi
if ! is_done autoencoder; then
  within $(($(left) - reserve)) "${main[@]}" --mode=train_autoencoder && mark autoencoder
  collect
fi
if is_done autoencoder && ! is_done reconstructions; then
  within $(($(left) - reserve)) "${main[@]}" --mode=evaluate --metrics=rfid,rkid,psnr,ssim \
    && within "$(left)" "${main[@]}" --mode=reconstruct && mark reconstructions
  collect
fi
if is_done autoencoder && ! is_done prior; then
  within $(($(left) - reserve)) "${main[@]}" --mode=train_prior && mark prior
  collect
fi

# An unfinished prior is measured too, and again when it is finished.
if [ -d "$run/prior" ]; then
  for guidance in 0 1; do
    is_done "guidance$guidance" && continue
    within "$(left)" "${main[@]}" --mode=evaluate --metrics=fid,kid --keep=npz \
      --guidance=$guidance || continue
    python3 - "$run/evaluation" "$work/kept" "guidance$guidance" <<'EOF'
import pathlib
import sys

import numpy as np

evaluation, kept = map(pathlib.Path, sys.argv[1:3])
newest = max(evaluation.glob("samples_*/samples_*.npz"), key=lambda path: path.stat().st_mtime)
images = np.load(newest)["arr_0"][:10_000]
kept.mkdir(exist_ok=True)
for part, start in enumerate(range(0, len(images), 5_000)):  # 15.4 MB each before compression
    np.savez_compressed(kept / "unfinished", arr_0=images[start : start + 5_000])
    (kept / "unfinished.npz").rename(kept / f"{sys.argv[3]}_{part}.npz")
EOF
    is_done prior && mark "guidance$guidance"
    collect
  done
  if ! is_done pictures; then
    within "$(left)" "${main[@]}" --mode=sample && is_done prior && mark pictures
    collect
  fi
  if ! is_done report; then
    within "$(left)" "${main[@]}" --mode=evaluate && is_done prior && mark report
    collect
  fi
fi
if ! is_done rows; then
  measure_rows "$(left)" && mark rows
  collect
fi

missing=()
for name in autoencoder reconstructions prior guidance0 guidance1 pictures report; do
  is_done "$name" || missing+=("$name")
done
echo "[$SECONDS s] In $out:" && ls -l "$out"
if [ "${#missing[@]}" -gt 0 ]; then
  echo "Not done: ${missing[*]}. The same command goes on from here." >&2
  exit 1
fi
