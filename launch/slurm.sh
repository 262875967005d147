#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, one process per GPU; arguments go to binlatent.main:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh \
#     --config=configs/churches256.py --workdir=/shared/runs/churches256 \
#     --config.autoencoder.train.batch_size=32 --config.autoencoder.train.learning_rate=1e-3
# Batch sizes are global and must be multiples of the number of GPUs: here 32 images are two on each
# of 16 GPUs. The prior's batch size is 32 by default. For k times the batch size, use about sqrt(k)
# times Adam's learning rate (Malladi et al., NeurIPS 2022), here twice the rate for 4 times the
# batch, and keep warmup_steps. This rule was not measured here.
# Submit it from the checkout, with the environment active. --workdir and the data must be on a file
# system that all nodes share. Do not bind GPUs to tasks (--gpus-per-task): each task needs to see
# all GPUs of its node, from which JAX takes the one with the task's local number.
# Tested on a CPU, with two processes and the variables that srun sets. Not tested on a cluster.
#SBATCH --job-name=binlatent
#SBATCH --output=%x-%j.out
#SBATCH --requeue
# If one process fails, all stop. SIGTERM comes two minutes before the time limit: the training
# saves and ends with code 143, so a job with --dependency=afternotok:JOB continues it.
#SBATCH --signal=TERM@120
set -euo pipefail
srun --kill-on-bad-exit=1 --unbuffered python -m binlatent.main "$@"
