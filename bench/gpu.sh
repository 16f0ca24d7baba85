#!/usr/bin/env bash
# Everything that needs a GPU, in one go of less than nine minutes on an H200:
#
#   bench/gpu.sh [tests] [kernels] [train] [large] [tune]        without names, all of them
#
# Runs from a bare checkout and installs nothing: python3 must have torch, triton, pytest,
# pytest-benchmark, psutil and nvidia-ml-py. Rows and tables go to $OUT, or bench/results/<gpu>/, as
# they are measured; $COMMIT names the commit where there is no git. Every step has a time limit,
# and one that fails does not stop the rest. Plots: python -m bench.report <that folder>
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())' \
    2>/dev/null) || { echo "bench/gpu.sh: torch finds no CUDA device" >&2; exit 1; }
out=${OUT:-bench/results/$gpu}
mkdir -p "$out"
log=$out/log.txt
: >"$log"
deadline=$((SECONDS + 530))
failed=0

step() { # name, seconds, command...
    local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS status
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left"
        failed=1
        return
    fi
    echo "== $name: $*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=1
    echo "== $name: status $status after $((SECONDS - began)) s: $(tail -n 1 "$log")"
}

measure() { # name, seconds, arguments of pytest...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" $python -m pytest -q -p no:cacheprovider --out="$out" \
        --commit="${COMMIT:-}" "$@"
}

ops=$($python -c 'from nanochat.kernels.registry import operations; print(*operations())')
for group in ${*:-tests kernels train large tune}; do
    case $group in
    tests)
        step tests 90 $python -m pytest -q -p no:cacheprovider -m gpu tests \
            --continue-on-collection-errors
        ;;
    kernels) # a process for each operation: a fault of one kernel leaves the others their GPU
        for op in $ops; do
            measure "$op" 40 bench/test_kernels.py --ops="$op" --workloads=d12,d20 --seconds=1
        done
        ;;
    train)
        measure "train d12" 100 bench/test_train_step.py --workloads=d12
        measure "train d20" 110 bench/test_train_step.py --workloads=d20
        ;;
    large)
        for op in $ops; do
            measure "$op d32" 30 bench/test_kernels.py --ops="$op" --workloads=d32 --seconds=1
        done
        ;;
    tune) step tune 300 $python -m bench.tune --seconds=5 --output="$out" --log="$out" ;;
    *)
        echo "bench/gpu.sh: $group is none of tests, kernels, train, large, tune" >&2
        exit 2
        ;;
    esac
done
echo "rows in $out, everything printed in $log"
exit $failed
