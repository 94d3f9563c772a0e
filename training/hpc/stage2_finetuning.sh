#!/bin/bash
# Submits stage 2, fine-tuning of a diffusion model in three ways; that model is made first if it is missing:
#   bash training/hpc/stage2_finetuning.sh --site my_cluster.yaml
#   bash training/hpc/stage2_finetuning.sh --dry_run
# The arguments are those of submit.py.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/submit.py" --name stage2 \
    --array 'configs/experiments/latent_diffusion/ablation/stage2_finetune_*.yaml' "$@"
