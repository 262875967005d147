#!/usr/bin/env bash
# From a bare machine to emoji drawn from captions: packages, images, text encoder, training.
# EMOJI=FOLDER takes images that are there: emoji.json, and the images in google/. WORKDIR=FOLDER
# says where to train. Arguments go to binlatent.main, for example --config.seed=1. It takes about
# an hour on two CPU cores; interrupted, the same command goes on.
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
  samples.png          emoji of names that were held out, a row a prompt
  reconstructions.png  held-out emoji above their reconstructions
  inpainting.png       parts of held-out emoji, drawn anew
  report.json          the numbers
Next: ${activate}python -m binlatent.main --workdir=$workdir --mode=sample --prompt="a green heart"
EOF
