#!/usr/bin/env bash
# Installs everything and runs every check: ruff, pyright, cargo where there is one, and the tests.
#
#     bash dev/test.sh                         everything that continuous integration runs
#     bash dev/test.sh --fast                  ruff, and the tests not marked `long`
#     bash dev/test.sh tests/test_gpt.py -k x  every check, and pytest with these arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=false
if [ "${1:-}" = --fast ]; then
    fast=true
    shift
fi

say() { printf '\n== %s\n' "$*"; }

bash dev/install.sh
export PATH="$PWD/.venv/bin:$PATH"

say "ruff"
ruff check
ruff format --check

# The slow checks run beside the tests: each has its output in a file, printed once it has ended.
logs=$(mktemp -d)
names=()
pids=()
stop() {
    for pid in ${pids[@]+"${pids[@]}"}; do  # bash before 4.4 calls an empty array unbound
        kill -- "-$pid" 2>/dev/null || true
    done
    rm -rf "$logs"
}
trap stop EXIT
trap 'echo "test: stopped" >&2; exit 130' INT TERM

# start NAME COMMAND...: in a process group of its own, so that stop reaches its children.
start() {
    local name=$1
    shift
    set -m
    "$@" >"$logs/$name" 2>&1 &
    set +m
    names+=("$name")
    pids+=("$!")
}

check_rust() {
    cd rustbpe &&
        cargo fmt --all --check &&
        cargo clippy --workspace --all-targets -- -D warnings &&
        cargo test --workspace
}

# A worker for each core, each with one thread. A file stays on one worker, with the fixtures that
# its tests share, and files start in the order in which conftest.py sorts them: longest first.
run_tests() {
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -q -n auto --maxprocesses=8 \
        --dist=loadfile --no-loadscope-reorder "$@"
}

failed=()
if [ "$fast" = true ]; then
    say "pytest, without the tests marked long"
    run_tests -m "not long" "$@" || failed+=(pytest)
else
    start pyright pyright
    if [ -f rustbpe/Cargo.toml ] && command -v cargo >/dev/null; then
        start cargo check_rust
    else
        say "cargo: skipped, there is no cargo or no rustbpe/Cargo.toml"
    fi
    say "pytest (beside it: ${names[*]})"
    run_tests "$@" || failed+=(pytest)
fi
for ((i = 0; i < ${#names[@]}; i++)); do
    wait "${pids[$i]}" || failed+=("${names[$i]}")
    say "${names[$i]}"
    cat "$logs/${names[$i]}"
done
if [ "${#failed[@]}" -gt 0 ]; then
    say "failed: ${failed[*]}"
    exit 1
fi
say "everything passed"
