#!/bin/bash
# Submits ablations of latent diffusion (configs/experiments/latent_diffusion/ablation), with their inputs:
#   bash training/hpc/diffusion_ablations.sh all --site my_cluster.yaml
#   bash training/hpc/diffusion_ablations.sh capacity      a series: capacity, attention, scheduler or prediction
#   bash training/hpc/diffusion_ablations.sh selected      one experiment of each series
#   bash training/hpc/diffusion_ablations.sh capacity_unet64_d3,prediction_v     those that are named
# Further arguments are those of submit.py, such as --dry_run.
set -euo pipefail
part=${1:-all}
shift || true
case "$part" in
all) names='capacity_*,attention_*,scheduler_*,prediction_*' ;;
capacity | attention | scheduler | prediction) names="${part}_*" ;;
selected) names=capacity_unet96_d3,attention_none,scheduler_zero_snr,prediction_v ;;
*) names=$part part=named ;;
esac
IFS=, read -ra names <<<"$names"
names=("${names[@]/#/configs/experiments/latent_diffusion/ablation/}")
exec "${PYTHON:-python}" "$(dirname "$0")/submit.py" --name "ablation-$part" \
    --array "${names[@]/%/.yaml}" "$@"
