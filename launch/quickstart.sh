#!/usr/bin/env bash
# Installs binlatent, trains both stages on digits, draws samples, and lists the pictures.
# Arguments go to binlatent.main, for example --config.seed=1.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
workdir=${WORKDIR:-runs/digits}
local_only "$workdir"

echo "Installing binlatent into ${VIRTUAL_ENV:-$CONDA_PREFIX}"
start=$SECONDS
python -m pip install --quiet --disable-pip-version-check -e .
echo "Installed in $((SECONDS - start)) s"

python -m binlatent.main --config=configs/digits.py --workdir="$workdir" "$@"

cat <<EOF

Done. In $workdir:
  samples.png          new digits, one row per class
  reconstructions.png  test digits above their reconstructions
  inpainting.png       test digits with masked parts filled in
  trajectory.png       from random bits to digits
  report.json          metrics
Next: ${activate}python -m binlatent.main --workdir=$workdir --mode=sample --label=7 --num=20 --out=sevens.png
EOF
