#!/usr/bin/env bash
# A chat model of depth 32 from scratch on eight GPUs, the way speedrun.sh trains one of depth 20.
#
#     bash run1000.sh                           configs/run1000
#     bash run1000.sh --with=chat_rl            and reinforcement learning on GSM8K
#     NPROC_PER_NODE=1 bash run1000.sh          one GPU, the same batches
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
name=run1000.sh
source dev/stages.sh
begin configs/run1000 --skip=chat_rl --skip=chat_eval_base "$@"

bash dev/install.sh
export PATH="$PWD/.venv/bin:$PATH"
export NPROC_PER_NODE="${NPROC_PER_NODE:-8}"

# 800 shards of about 250 million characters hold 37.6 billion tokens of 4.8 characters, and more
once dataset base_data python -m nanochat.dataset --dataset=fineweb-edu -n 800
train_and_evaluate
