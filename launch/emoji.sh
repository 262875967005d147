#!/usr/bin/env bash
# From a bare machine to emoji drawn from captions: packages, images, text encoder, training.
# EMOJI=FOLDER uses existing images: emoji.json, and the images in google/. WORKDIR=FOLDER sets the
# folder of the training. Arguments go to binlatent.main, for example --config.seed=1. It takes
# about an hour on two CPU cores. After an interruption the same command continues.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
workdir=${WORKDIR:-runs/emoji}
local_only "$workdir"
mkdir -p "$workdir"

echo "Installing binlatent into ${VIRTUAL_ENV:-$CONDA_PREFIX}"
python -m pip install --quiet --disable-pip-version-check -e '.[texts]'

bash launch/fetch_emoji.sh "$workdir"
python -m binlatent.main --config=configs/emoji64.py --workdir="$workdir" \
  --config.data.path="${EMOJI:-$workdir/package}" "$@"

cat <<EOF

Done. In $workdir:
  samples.png          emoji from held-out captions, one row per prompt
  reconstructions.png  held-out emoji above their reconstructions
  inpainting.png       held-out emoji with masked parts filled in
  report.json          metrics
Next: ${activate}python -m binlatent.main --workdir=$workdir --mode=sample --prompt="a green heart" --out=hearts.png
EOF
