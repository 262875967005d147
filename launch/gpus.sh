#!/usr/bin/env bash
# Trains on all GPUs of one machine; arguments go to binlatent.main:
#   bash launch/gpus.sh --config=configs/churches256.py --workdir=runs/churches256
# The number of GPUs must divide the batch sizes, which are global: see launch/slurm.sh.
# One process uses all GPUs, also without this script; the script only checks that JAX sees them.
# CUDA_VISIBLE_DEVICES=0,1 selects some of them.
# Tested without a GPU, which it refuses. Not tested with several GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python - <<'EOF'
import sys
import jax

if jax.default_backend() != "gpu":
    sys.exit('JAX sees no GPU here: pip install -U "jax[cuda13]", and see what nvidia-smi says.')
print(f"{jax.device_count()} GPUs of the kind {jax.devices()[0].device_kind}")
EOF
python -m binlatent.main "$@"
