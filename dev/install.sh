#!/usr/bin/env bash
# Installs everything into .venv: uv if it is missing, then the project, its development tools and
# rustbpe. Running it again only repairs what has changed.
#
#     bash dev/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_uv() {
    if command -v uv >/dev/null; then
        uv=(uv)
    elif python3 -m uv --version >/dev/null 2>&1; then
        uv=(python3 -m uv)
    elif [ -x build/uv/bin/uv ]; then
        uv=(build/uv/bin/uv)
    else
        return 1
    fi
}

if ! find_uv; then
    echo "install: uv is missing; installing it with pip"
    # A distribution's Python may refuse packages of its own (PEP 668): then a small one holds uv.
    python3 -m pip install --quiet uv 2>/dev/null ||
        { python3 -m venv build/uv && build/uv/bin/pip install --quiet uv; } || {
        echo "install: cannot install uv: python3 needs pip or venv, and a package index" >&2
        exit 1
    }
    find_uv
fi

if [ ! -f rustbpe/pyproject.toml ]; then
    reason="this checkout has no rustbpe/pyproject.toml"
elif ! command -v cargo >/dev/null; then
    reason="cargo is missing (a Rust toolchain brings it)"
elif echo "install: uv sync, building rustbpe from source" && "${uv[@]}" sync; then
    reason=""
else
    reason="the build above failed"
fi
if [ -n "$reason" ]; then
    echo "install: rustbpe is not built from source: $reason"
    echo "install: uv sync with the published rustbpe instead, which has the same interface"
    "${uv[@]}" sync --no-sources-package rustbpe
fi
echo "install: ready, Python is .venv/bin/python"
