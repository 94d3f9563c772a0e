#!/bin/bash
# Submits the latents of the ablations, which all processes of the job encode together:
#   bash training/hpc/latents.sh inputs --site my_cluster.yaml                       posters and autoencoder
#   bash training/hpc/latents.sh latents --site my_cluster.yaml --after latents-inputs    when that was submitted
# Further arguments are those of submit.py, such as --dry_run.
set -euo pipefail
part=${1:-latents}
shift || true
case "$part" in
inputs | latents) ;;
*) echo "error: the part is '$part'; use inputs or latents" >&2; exit 2 ;;
esac
submit=("${PYTHON:-python}" "$(dirname "$0")/submit.py")
if [ "$part" = inputs ]; then
    exec "${submit[@]}" --name latents-inputs "$@" -- \
        training/hpc/make_inputs.py data/ablation/posters runs/ablation/autoencoder/pipeline \
        --configs configs/experiments/latent_diffusion/ablation/capacity_unet64_d3.yaml
fi
exec "${submit[@]}" --name latents "$@" -- \
    data_scripts/precompute_latents.py --dataset_name data/ablation/posters --resolution 128 \
    --vae runs/ablation/autoencoder --output_dir data/ablation/latents
