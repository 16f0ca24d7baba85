#!/usr/bin/env bash
# What needs a GPU, the most valuable first, in one go of at most nine minutes:
#
#   bench/gpu.sh [tests] [train] [kernels] [small] [tune] [large]   without names, all but large
#
# Runs from a bare checkout and installs nothing: python3 must have torch, triton, numpy, pytest,
# pytest-benchmark, psutil and nvidia-ml-py; a step that lacks another package is left out and says
# so. Rows and tables go to $OUT, or bench/results/<gpu>/, as they are measured; $COMMIT names the
# commit where there is no git. The steps' seconds add up to less than the whole; what one leaves
# over the next may use. One that fails does not stop the rest. At the end: the forecast of every
# kernel beside its measurement, also in forecasts.md. Plots: python -m bench.report <that folder>
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
due=$SECONDS # when the steps so far must have ended
failed=0

step() { # name, seconds, command...
    local name=$1 own=$log.step began=$SECONDS status missing
    due=$((due + $2))
    shift 2
    echo "== $name: $*" >>"$log"
    timeout --kill-after=5 $((due - SECONDS > 5 ? due - SECONDS : 5)) "$@" >"$own" 2>&1
    status=$?
    cat "$own" >>"$log"
    missing=$(grep -om 1 "ModuleNotFoundError: No module named .*" "$own")
    if [ "$status" -ne 0 ] && [ -n "$missing" ]; then
        echo "== $name: left out, ${missing#*: }"
    else
        [ "$status" -eq 0 ] || failed=1
        echo "== $name: status $status after $((SECONDS - began)) s: $(tail -n 1 "$own")"
    fi
    rm -f "$own"
}

measure() { # name, seconds, arguments of pytest...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" $python -m pytest -q -p no:cacheprovider --out="$out" \
        --commit="${COMMIT:-}" "$@"
}

# a process for each operation: a fault of one kernel leaves the others their GPU
every_op() { # size, seconds for each
    local op
    for op in $($python -c 'from nanochat.kernels.registry import operations; print(*operations())')
    do
        measure "$op $1" "$2" bench/test_kernels.py --ops="$op" --workloads="$1" --seconds=1
    done
}

for group in ${*:-tests train kernels small tune}; do
    case $group in
    tests) # a process for each file, so that a package that is not there costs one file
        for file in $(grep -rl --include='test_*.py' 'mark\.gpu' tests experiments | sort -r); do
            step "$file" 15 $python -m pytest -q -p no:cacheprovider -m gpu "$file"
        done
        ;;
    train) measure "train d20" 110 bench/test_train_step.py --workloads=d20 ;;
    kernels) every_op d20 15 ;;
    small)
        measure "train d12" 60 bench/test_train_step.py --workloads=d12
        every_op d12 5
        ;;
    tune) step tune 50 $python -m bench.tune --seconds=5 --output="$out" --log="$out" ;;
    large) every_op d32 30 ;;
    *)
        echo "bench/gpu.sh: $group is none of tests, train, kernels, small, tune, large" >&2
        exit 2
        ;;
    esac
done
step forecasts 20 sh -c "$python -m bench.forecasts '$out' >'$out/forecasts.md'"
cat "$out/forecasts.md"
echo "rows in $out, everything printed in $log"
exit $failed
