#!/usr/bin/env bash
# The whole pipeline on the CPU, from scratch and without downloading any data: install, corpus,
# tokenizer, base training, mid-training, fine-tuning, reinforcement learning, an evaluation after
# each, report, one answer.
#
#     bash dev/runcpu.sh                        configs/cpu_small
#     bash dev/runcpu.sh --skip=chat_rl         without a stage
#     bash dev/runcpu.sh configs/my_small       your own config files
#
# Run it again after Ctrl-C and nothing is lost: finished stages are skipped. Everything lives under
# NANOCHAT_BASE_DIR (~/.cache/nanochat); remove its runs/ folder to repeat every stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=dev/runcpu.sh
source dev/stages.sh
begin configs/cpu_small "$@"

bash dev/install.sh
export PATH="$PWD/.venv/bin:$PATH"

once dataset base_data_embedded python -m nanochat.dataset --dataset=embedded
train_and_evaluate
