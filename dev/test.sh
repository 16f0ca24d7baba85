#!/usr/bin/env bash
# Installs everything and runs every check: ruff, pyright, the tests, and cargo where it is there.
#
#     bash dev/test.sh                         everything
#     bash dev/test.sh tests/test_gpt.py -k x  the checks, and pytest with these arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'echo "test: stopped" >&2; exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }

bash dev/install.sh
export PATH="$PWD/.venv/bin:$PATH"

say "ruff"
ruff check
ruff format --check
say "pyright"
pyright
if [ -f rustbpe/Cargo.toml ] && command -v cargo >/dev/null; then
    say "cargo"
    (
        cd rustbpe
        cargo fmt --all --check
        cargo clippy --workspace --all-targets -- -D warnings
        cargo test --workspace
    )
else
    say "cargo: skipped, there is no cargo or no rustbpe/Cargo.toml"
fi
say "pytest"
# A worker for each core, each with one thread, and a file's tests together with what they share.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -q -n auto --maxprocesses=8 --dist=loadfile "$@"
