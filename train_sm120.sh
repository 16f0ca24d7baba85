#!/usr/bin/env bash
# Pretrains on every SM120 GPU of this machine (RTX 5090, RTX PRO 6000); the output also goes to logs/.
#
#     bash train_sm120.sh                                  configs/dual_gpu/d20_32gb.py
#     bash train_sm120.sh configs/dual_gpu/d20_96gb.py --kernels=reference
#     NPROC_PER_NODE=1 bash train_sm120.sh                 one GPU, the same batch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

config=configs/dual_gpu/d20_32gb.py
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    config=$1
    shift
fi
if [ ! -f "$config" ]; then
    echo "train_sm120: no config file '$config'; available:" config_dual_gpu.py configs/dual_gpu/*.py >&2
    exit 2
fi

export PATH="$PWD/.venv/bin:$PATH"
gpus=$(python - <<'PYTHON'
import torch

found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
if not found or set(found) != {(12, 0)}:
    names = ", ".join(f"sm_{major}{minor}" for major, minor in found) or "no GPU"
    raise SystemExit(
        f"train_sm120: wanted sm_120 GPUs only, found {names}; for others use train_dual_gpu.sh, "
        "or choose the GPUs with CUDA_VISIBLE_DEVICES"
    )
print(len(found))
PYTHON
)
mkdir -p logs
log="logs/train_sm120_$(date +%Y%m%d_%H%M%S).log"
echo "train_sm120: $config on ${NPROC_PER_NODE:-$gpus} GPUs, log in $log"
# tee -i survives Ctrl-C, so the lines about the last checkpoint still reach the log
torchrun --standalone --nproc_per_node="${NPROC_PER_NODE:-$gpus}" \
    -m scripts.base_train "$config" "$@" 2>&1 | tee -i "$log"
