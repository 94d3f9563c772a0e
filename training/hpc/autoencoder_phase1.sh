#!/bin/bash
# Submits phase 1, which autoencoder (configs/experiments/autoencoder/phase1):
#   bash training/hpc/autoencoder_phase1.sh all --site my_cluster.yaml
#   bash training/hpc/autoencoder_phase1.sh S2     the experiments with these heads: S1, S2, S3 or S4
#   bash training/hpc/autoencoder_phase1.sh 9      one experiment, by its number
# Further arguments are those of submit.py, such as --dry_run.
set -euo pipefail
part=${1:-all}
shift || true
case "$part" in
all) files='phase1_*' ;;
S[1-4]) files="phase1_*_AE_${part}_*" ;;
*) files="phase1_${part}_*" ;;
esac
exec "${PYTHON:-python}" "$(dirname "$0")/submit.py" --name "phase1-$part" \
    --array "configs/experiments/autoencoder/phase1/$files.yaml" "$@"
