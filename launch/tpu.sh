#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM; arguments go to binlatent.main:
#   TPU=name ZONE=us-central2-b bash launch/tpu.sh \
#     --config=configs/churches256.py --workdir=/mnt/shared/runs/churches256
# Each host has this checkout in ~/binlatent, `pip install -U "jax[tpu]" -e .` done there, and
# --workdir and the data on a file system that all share. JAX finds the hosts by itself.
# Not tried yet: we had no TPU.
set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/binlatent && python3 -m binlatent.main $(printf '%q ' "$@")"
