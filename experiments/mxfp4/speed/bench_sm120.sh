#!/usr/bin/env bash
# Fills the "not measured" cells on an RTX 5090 (or another GPU with block-scaled tensor cores):
#
#   bash experiments/mxfp4/speed/bench_sm120.sh
#
# Products, quantizers, layers and decoding; then 30 training steps of d8, d12 and d20 in bfloat16
# and by mx8f_mx4b, on the embedded corpus. About ten minutes. Results: experiments/mxfp4/results/<gpu>/
# (or $OUT), and the table on the screen. Without such a GPU it says so and measures nothing.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

$python -m experiments.mxfp4.speed.bench --check || exit 1
gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
out=${OUT:-experiments/mxfp4/results/$gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat-bench-sm120}

$python -m pytest -q -p no:cacheprovider -m gpu experiments/mxfp4/tests
$python -m experiments.mxfp4.speed.bench --output="$out/bench.json"

[ -d "$NANOCHAT_BASE_DIR/base_data_embedded" ] || $python -m nanochat.dataset --dataset=embedded
[ -d "$NANOCHAT_BASE_DIR/tokenizer" ] ||
    $python -m scripts.tok_train --dataset=embedded --vocab_size=32768
groups=()
for depth in 8 12 20; do
    batch=$((depth > 12 ? 4 : 8))
    for recipe in "" mx8f_mx4b; do
        tag=bench_d${depth}_${recipe:-plain}
        rm -rf "$NANOCHAT_BASE_DIR/base_checkpoints/$tag"
        precision=(--precision=plain)
        [ -n "$recipe" ] && precision=(--precision=mxfp4 --mx_recipe="$recipe")
        $python -m scripts.base_train --dataset=embedded --depth=$depth --num_iterations=30 \
            --device_batch_size=$batch --total_batch_size=65536 --eval_tokens=65536 \
            --sample_every=-1 --compile --model_tag="$tag" "${precision[@]}"
    done
    runs=$NANOCHAT_BASE_DIR/base_checkpoints
    groups+=("d$depth=$runs/bench_d${depth}_plain:$runs/bench_d${depth}_mx8f_mx4b")
done
$python -m experiments.mxfp4.speed.measured "$out" "${groups[@]}"
