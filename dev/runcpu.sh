#!/usr/bin/env bash
# The main job on the CPU, from nothing: install, corpus, tokenizer, base training, report.
#
#     bash dev/runcpu.sh
#
# A finished stage is skipped and an interrupted training goes on where it stopped, so running this
# again after Ctrl-C loses nothing. Everything lives under NANOCHAT_BASE_DIR (~/.cache/nanochat);
# remove its runcpu/ folder to run every stage anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'echo "runcpu: stopped; run it again to go on" >&2; exit 130' INT TERM

config=configs/cpu_small.py
tag=cpu_small
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
marks="$NANOCHAT_BASE_DIR/runcpu"
mkdir -p "$marks"
ran_one=false

# stage NAME OUTPUT COMMAND...: skipped where it finished before, its OUTPUT (below the base
# directory) is still there, and no earlier stage has just run.
stage() {
    local name=$1 output=$NANOCHAT_BASE_DIR/$2
    shift 2
    if [ "$ran_one" = false ] && [ -f "$marks/$name" ] && [ -e "$output" ]; then
        printf '\n== %s: done before (%s)\n' "$name" "$output"
        return
    fi
    printf '\n== %s: %s\n' "$name" "$*"
    rm -f "$marks/$name"
    ran_one=true
    "$@"
    touch "$marks/$name"
}

bash dev/install.sh
python=.venv/bin/python

stage dataset base_data_embedded "$python" -m nanochat.dataset --dataset=embedded
stage tok_train tokenizer/tokenizer_ranks.json "$python" -m scripts.tok_train --dataset=embedded --vocab_size=4096
if [ "$ran_one" = true ] && [ -e "$NANOCHAT_BASE_DIR/base_checkpoints/$tag" ]; then
    printf '\nruncpu: removing the model %s of the former tokenizer\n' "$tag"
    rm -r "$NANOCHAT_BASE_DIR/base_checkpoints/$tag"
fi
stage base_train "base_checkpoints/$tag/latest.pt" \
    "$python" -m scripts.base_train "$config" --model_tag="$tag" --resume
stage tok_eval tokenizer/tokenizer_ranks.json "$python" -m scripts.tok_eval
stage base_loss "base_checkpoints/$tag/latest.pt" \
    "$python" -m scripts.base_loss --checkpoint="base_checkpoints/$tag/latest.pt" --device=cpu
stage report report/report.md "$python" -m nanochat.report generate

printf '\nruncpu: finished; the report is %s\n' "$NANOCHAT_BASE_DIR/report/report.md"
