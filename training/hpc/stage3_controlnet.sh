#!/bin/bash
# Submits stage 3, a ControlNet on the model of stage 2:
#   bash training/hpc/stage3_controlnet.sh --site my_cluster.yaml --after stage2
#   bash training/hpc/stage3_controlnet.sh --dry_run
# The arguments are those of submit.py.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/submit.py" --name stage3 "$@" -- \
    training/train_controlnet.py --config configs/experiments/latent_diffusion/ablation/stage3_controlnet.yaml
