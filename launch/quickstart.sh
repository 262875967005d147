#!/usr/bin/env bash
# Installs binlatent, trains both stages on real digits, samples, and says where the pictures are.
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
  samples.png          new digits, a row a class
  reconstructions.png  test digits above their reconstructions
  inpainting.png       parts of test digits, drawn anew
  trajectory.png       from random bits to digits
  report.json          the numbers
Next: ${activate}python -m binlatent.main --workdir=$workdir --mode=sample --label=7 --num=20
EOF
