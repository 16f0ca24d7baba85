#!/usr/bin/env bash
# A chat model of depth 20 from scratch on eight GPUs: tokenizer, base training on 11.2 billion
# tokens, mid-training, fine-tuning, evaluations after each, report.
#
#     bash speedrun.sh                          configs/speedrun
#     bash speedrun.sh --with=chat_rl           and reinforcement learning on GSM8K
#     bash speedrun.sh --skip=base_eval         without a stage
#     NPROC_PER_NODE=1 bash speedrun.sh         one GPU, the same batches
#
# Run it again after an interruption and it continues where it stopped. Everything lives under
# NANOCHAT_BASE_DIR (~/.cache/nanochat).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
name=speedrun.sh
source dev/stages.sh
begin configs/speedrun --skip=chat_rl --skip=chat_eval_base "$@"

bash dev/install.sh
export PATH="$PWD/.venv/bin:$PATH"
export NPROC_PER_NODE="${NPROC_PER_NODE:-8}"

# 240 shards of about 250 million characters hold 11.2 billion tokens of 4.8 characters, and more
once dataset base_data python -m nanochat.dataset --dataset=fineweb-edu -n 240
train_and_evaluate
