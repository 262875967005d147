#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, one process a GPU; arguments go to binlatent.main:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh \
#     --config=configs/churches256.py --workdir=/shared/runs/churches256 \
#     --config.autoencoder.train.batch_size=32 --config.autoencoder.train.learning_rate=1e-3
# A batch size is global: 32 images are two on each of these 16 GPUs, and their number must divide
# it. The prior's is 32 by default. For k times the batch, Adam takes about sqrt(k) times the rate
# (Malladi et al., NeurIPS 2022), here twice the rate for 4 times the batch; keep warmup_steps. This
# rule was not measured here.
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
