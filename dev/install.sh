#!/usr/bin/env bash
# Installs everything into .venv: uv if it is missing, then the project, its development tools and
# rustbpe. Nothing happens if nothing has changed since the last time; `rm -r .venv` starts over.
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

# What an installation depends on: the requirements, the sources of rustbpe, and the compiler.
fingerprint() {
    {
        cat pyproject.toml
        find rustbpe -name target -prune -o -type f \( -name '*.rs' -o -name '*.toml' -o -name '*.pyi' \) \
            -print | sort | xargs cat
        command -v cargo || true
    } | cksum
}

stamp=.venv/installed
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
    echo "install: nothing has changed, .venv is up to date"
    exit
fi

if ! find_uv; then
    echo "install: uv is missing; installing it with pip"
    # A distribution's Python may refuse to install packages (PEP 668): use a small venv for uv.
    python3 -m pip install --quiet uv 2>/dev/null ||
        { python3 -m venv build/uv && build/uv/bin/pip install --quiet uv; } || {
        echo "install: cannot install uv: python3 needs pip or venv, and a package index" >&2
        exit 1
    }
    find_uv
fi

# --inexact keeps what you have added to .venv, such as the extras `wandb` and `page`.
if [ ! -f rustbpe/pyproject.toml ]; then
    reason="this checkout has no rustbpe/pyproject.toml"
elif ! command -v cargo >/dev/null; then
    reason="cargo is missing (it comes with a Rust toolchain)"
elif echo "install: uv sync, building rustbpe from source" && "${uv[@]}" sync --inexact; then
    reason=""
else
    reason="the build above failed"
fi
if [ -n "$reason" ]; then
    echo "install: rustbpe is not built from source: $reason"
    echo "install: falling back to the published rustbpe, which has the same interface"
    "${uv[@]}" sync --inexact --no-sources-package rustbpe
fi
fingerprint >"$stamp"
echo "install: done, Python is .venv/bin/python"
