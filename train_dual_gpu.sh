#!/usr/bin/env bash
# Pretrains on two GPUs with a config file; the output also goes to logs/.
#
#     bash train_dual_gpu.sh                                       config_dual_gpu.py
#     bash train_dual_gpu.sh configs/dual_gpu/stable_26gb.py
#     bash train_dual_gpu.sh configs/dual_gpu/stable_26gb.py --depth=12 --resume
#     NPROC_PER_NODE=1 bash train_dual_gpu.sh                      one GPU, the same batch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

config=config_dual_gpu.py
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    config=$1
    shift
fi
if [ ! -f "$config" ]; then
    echo "train_dual_gpu: no config file '$config'; available:" config_dual_gpu.py configs/dual_gpu/*.py >&2
    exit 2
fi

export PATH="$PWD/.venv/bin:$PATH"
mkdir -p logs
log="logs/train_dual_gpu_$(date +%Y%m%d_%H%M%S).log"
echo "train_dual_gpu: $config, log in $log"
# tee -i survives Ctrl-C, so the lines about the last checkpoint still reach the log
torchrun --standalone --nproc_per_node="${NPROC_PER_NODE:-2}" \
    -m scripts.base_train "$config" "$@" 2>&1 | tee -i "$log"
