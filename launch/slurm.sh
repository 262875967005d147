#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, one process a GPU; arguments go to binlatent.main:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh \
#     --config=configs/churches256.py --workdir=/shared/runs/churches256
# Submit it from the checkout, with the environment active; --workdir and the data are on a file
# system that all nodes share. Do not bind GPUs to tasks (--gpus-per-task): JAX takes that of the
# task's local number among all of the node.
# Tried: two processes with the variables that srun sets, on a CPU. Not tried yet: a cluster.
#SBATCH --job-name=binlatent
#SBATCH --output=%x-%j.out
#SBATCH --requeue
# All stop with the first that fails. SIGTERM two minutes before the end saves first; the job then
# ends with code 143, so that --dependency=afternotok:JOB starts one that goes on.
#SBATCH --signal=TERM@120
set -euo pipefail
srun --kill-on-bad-exit=1 --unbuffered python -m binlatent.main "$@"
