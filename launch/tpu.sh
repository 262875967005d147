#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM; arguments go to binlatent.main:
#   export TPU=name ZONE=us-central2-b
#   bash launch/tpu.sh --config=configs/churches256.py --workdir=/mnt/shared/runs/churches256 \
#     --config.autoencoder.train.batch_size=32 --config.autoencoder.train.learning_rate=1e-3
#   bash launch/tpu.sh        shows the log of that training again, and waits for its end
#   bash launch/tpu.sh stop   saves a checkpoint and ends it
# The number of all devices must divide the batch sizes, here up to 32: see launch/slurm.sh.
# The training continues if the connection is lost. Each host writes ~/binlatent.log.
# Each host needs this checkout in ~/binlatent, with `pip install -U "jax[tpu]" -e .` done there.
# --workdir and the data must be on a file system that all hosts share. JAX finds the hosts itself.
# Tested with a stand-in for gcloud. Not tested on a TPU.
set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"

# Runs on each host. The training has a session of its own, so that SIGHUP does not reach it.
read -r -d '' remote <<'REMOTE' || true
cd ~/binlatent || exit
pid=$(cat ~/binlatent.pid 2> /dev/null)
if [ "${1:-}" = stop ]; then
  kill -TERM -- "-$pid"
elif [ $# -gt 0 ]; then
  if kill -0 "$pid" 2> /dev/null; then
    echo "A training runs already: wait, or end it by launch/tpu.sh stop." >&2
    exit 1
  fi
  rm -f ~/binlatent.code
  : > ~/binlatent.log  # tail may start first
  setsid nohup bash -c 'trap : TERM; python3 -m binlatent.main "$@"; echo $? > ~/binlatent.code' \
    binlatent "$@" > ~/binlatent.log 2>&1 < /dev/null &
  pid=$!
  echo "$pid" > ~/binlatent.pid
fi
tail --pid="$pid" --lines=+1 --follow ~/binlatent.log
exit "$(cat ~/binlatent.code)"
REMOTE
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="$(printf '%q ' bash -c "$remote" binlatent "$@")"
